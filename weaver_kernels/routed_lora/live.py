"""`routed_lora` in plain PyTorch, for every device without the kernel: only live tokens are computed."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from weaver_kernels.checks import own_precision, require
from weaver_kernels.routed_lora.checks import Geometry, value_reasons
from weaver_kernels.tuning import config_table

__all__ = ["live_routed_lora", "stacked_routed_lora"]


@own_precision
def live_routed_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    starts: tuple[int, ...],
    weights: torch.Tensor,
    index: torch.Tensor | None,
    geometry: Geometry,
    tokens: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
) -> None:
    """Add into y, adapter by adapter: gather its live tokens, both products, weigh between them, add into their rows.

    Arguments are those of `routed_lora`, its stack taken apart, and `tokens` [B, S, T] with `counts` [B, S] of
    `live_tokens`. An adapter that is alive on most tokens of a map, or on any of a small one, is computed on all of
    them, because gathering costs more (`configs/routed_lora.json`); a convolution on the least rectangle that holds its
    live places. Products are in float32, or float64 for float64.
    """
    settings = config_table("routed_lora")["live"]
    rows, n_contexts, n_tokens = weights.shape
    index = [list(range(n_contexts))] * rows if index is None else index.tolist()
    require("routed_lora", value_reasons(index, len(starts) - 1))
    live_counts = ((weights != 0).sum(-1) if counts is None else counts).tolist()
    work = torch.float64 if y.dtype == torch.float64 else torch.float32
    for b in range(rows):
        for s in range(n_contexts):
            first, last = starts[index[b][s]], starts[index[b][s] + 1]
            if first == last or not live_counts[b][s]:
                continue
            factors = down[first:last].to(work), up[first:last].to(work)
            dense = n_tokens <= settings["dense_tokens"] or live_counts[b][s] >= settings["dense_share"] * n_tokens
            if down.ndim == 2 and dense:
                _on_all(y[b], x[b], *factors, weights[b, s])
                continue
            live = weights[b, s].nonzero()[:, 0] if tokens is None else tokens[b, s, : live_counts[b][s]]
            if down.ndim == 2:
                _on_some(y[b], x[b], *factors, weights[b, s], live)
            else:
                _on_rectangle(y[b], x[b], *factors, weights[b, s], live, geometry)


def _on_all(y, x, down, up, weight) -> None:
    """Add to y [T, O] for x [T, C]."""
    inner = torch.mm(x.to(down.dtype), down.T).mul_(weight.to(down.dtype)[:, None])
    if y.dtype == inner.dtype:
        y.addmm_(inner, up)
    else:
        y += torch.mm(inner, up)


def _on_some(y, x, down, up, weight, live) -> None:
    """Add to y [T, O] on the tokens `live`."""
    inner = torch.mm(x.index_select(0, live).to(down.dtype), down.T)
    inner.mul_(weight.index_select(0, live).to(down.dtype)[:, None])
    y.index_add_(0, live, torch.mm(inner, up).to(y.dtype))


def _on_rectangle(y, x, down, up, weight, live, geometry) -> None:
    """Add to y [O, h, w] for x [C, H, W], on the least rectangle of places that holds the live ones."""
    lines, columns = live // y.shape[2], live % y.shape[2]
    top, bottom, left, right = (int(n) for n in (lines.min(), lines.max() + 1, columns.min(), columns.max() + 1))
    stride, padding, dilation = geometry[:2], geometry[2:4], geometry[4:]
    read, added = [], []  # of each side: what is read, and how many zeros stand before and behind it
    for (begin, end), size, taps, step, pad, far in zip(
        ((top, bottom), (left, right)), x.shape[1:], down.shape[2:], stride, padding, dilation, strict=True
    ):
        first, last = begin * step - pad, (end - 1) * step - pad + far * (taps - 1) + 1
        read.append(slice(max(first, 0), min(last, size)))
        added.append((max(-first, 0), max(last - size, 0)))
    part = F.pad(x[:, read[0], read[1]].to(down.dtype), (*added[1], *added[0]))
    inner = F.conv2d(part, down, None, stride, 0, dilation)  # [r, bottom - top, right - left]
    inner.mul_(weight.view(y.shape[1:])[top:bottom, left:right].to(down.dtype))
    y[:, top:bottom, left:right] += torch.mm(up.T, inner.flatten(1)).view(-1, *inner.shape[1:])


@own_precision
def stacked_routed_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    starts: tuple[int, ...],
    weights: torch.Tensor,
    index: torch.Tensor | None,
    geometry: Geometry,
) -> None:
    """Add into y on a GPU without the kernel: all adapters on all tokens, the dead ones times zero.

    Never waits for the device, so that a CUDA graph can hold it. It costs as much as all ranks together.
    """
    rows, n_contexts, _ = weights.shape
    owners = torch.arange(len(starts) - 1, device=y.device).repeat_interleave(
        torch.tensor([end - begin for begin, end in zip(starts, starts[1:], strict=False)], device=y.device),
        output_size=len(down),
    )  # [R], whose each rank is
    if index is None:
        index = torch.arange(n_contexts, device=y.device).expand(rows, n_contexts)
    has = (index[:, :, None] == owners).to(torch.float32)  # [B, S, R]
    share = weights.to(torch.float32).mT @ has  # [B, T, R]
    if down.ndim == 2:
        inner = (x @ down.T) * share.to(x.dtype)
        y += inner @ up
    else:
        inner = F.conv2d(x, down, None, geometry[:2], geometry[2:4], geometry[4:]).flatten(2) * share.mT.to(x.dtype)
        y += (up.T @ inner).view_as(y)
