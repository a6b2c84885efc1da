"""`routed_lora` in plain PyTorch, for every device without the kernel: only live tokens are computed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F

from weaver_kernels.checks import own_precision, require
from weaver_kernels.routed_lora.checks import value_reasons
from weaver_kernels.routed_lora.maps import add_on_map
from weaver_kernels.tuning import config_table

__all__ = ["live_routed_lora", "stacked_routed_lora"]


@own_precision
def live_routed_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    starts: Sequence[int],
    weights: torch.Tensor,
    adapter_index: torch.Tensor | None,
    tokens: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
    around: tuple[int, int, int] = (1, 0, 1),
) -> None:
    """The operation, adapter by adapter, on `y` itself.

    Arguments are those of `routed_lora`, and `tokens` [B, S, T] with `counts` [B, S] of `live_tokens`; without them
    they are taken from `weights`. `around` is stride, padding and dilation.

    Of a Linear an adapter's live tokens are gathered, a cacheful at a time; one that is alive on most tokens is
    computed on all of them, and on small maps all adapters of a row are, with fewer calls, because calls cost more
    (`configs/live_lora.json`). Of a convolution the part of the map is taken that the live tokens are in. Products and
    sums are in float32, or float64 for float64, and a row is rounded once.
    """
    settings = config_table("live_lora")
    rows, n_slots, n_tokens = weights.shape
    index = [list(range(n_slots))] * rows if adapter_index is None else adapter_index.tolist()
    require("routed_lora", value_reasons(index, len(starts) - 1))
    live_counts = ((weights != 0).sum(-1) if counts is None else counts).tolist()
    work = torch.float64 if y.dtype == torch.float64 else torch.float32
    down, up = down.to(work), up.to(work)
    width = down.shape[1] + up.shape[1]
    ranks = [end - start for start, end in pairwise(starts)]
    pairs = list(zip(down.split(ranks), up.split(ranks), strict=True))
    # What is taken out of a tensor once is not taken out again for each adapter: on a small map that is half the time.
    for b, (row, given, weight) in enumerate(zip(y.unbind(), x.unbind(), weights.unbind(), strict=True)):
        live = [s for s in range(n_slots) if live_counts[b][s] and ranks[index[b][s]]]
        if not live:
            continue
        out = row.to(work)  # the row itself, but of half precision a copy: its changes are summed before it is rounded
        each = weight.unbind()
        slots = slice(live[0], live[-1] + 1) if len(live) > 1 else slice(0)
        sizes = [ranks[adapter] for adapter in index[b][slots]]
        if down.ndim == 4:
            for s in live:
                add_on_map(out, given, *pairs[index[b][s]], each[s], live_counts[b][s], settings, *around)
        elif _together(index[b][slots], live_counts[b][slots], sizes, n_tokens, width, settings["call"]):
            whole = slice(starts[index[b][live[0]]], starts[index[b][live[-1]] + 1])
            _side_by_side(out, given, down[whole], up[whole], weight[slots], sizes)
        else:
            which = None if tokens is None else tokens[b].unbind()
            for s in live:
                some = None
                if n_tokens > settings["dense_tokens"] and live_counts[b][s] < settings["dense_share"] * n_tokens:
                    some = each[s].nonzero()[:, 0] if which is None else which[s][: live_counts[b][s]].long()
                _add(out, given, *pairs[index[b][s]], each[s], some, settings["numbers"])
        if out is not row:
            row.copy_(out)


def _together(adapters, counts, ranks, n_tokens, width, call) -> bool:
    """Whether a row's adapters from its first live one to its last cost less side by side on all tokens: the
    calls that are saved are worth `call` products each, and there are so many more for dead tokens.

    adapters : their numbers, counts : tokens each is alive on, width : inputs and outputs of the layer
    """
    if not adapters or adapters != list(range(adapters[0], adapters[0] + len(adapters))):
        return False
    more = sum((n_tokens - count) * rank for count, rank in zip(counts, ranks, strict=True)) * width
    return more <= call * (sum(map(bool, counts)) - 1)


def _side_by_side(y, x, down, up, weights, ranks) -> None:
    """Add adapters down [R, C] and up [R, O], of these ranks, to y [T, O]: x [T, C], weights [S, T].

    Each is added whole: one sum over the ranks of all, or a product that begins from y, would have up to four times its
    error in float32.
    """
    each = torch.tensor(ranks, device=y.device)
    inner = _inner(x, down, weights.repeat_interleave(each, 0, output_size=len(down)))
    for one, outer in zip(inner.split(ranks), up.split(ranks), strict=True):
        y.add_(torch.mm(one.T, outer))


def _add(y, x, down, up, weight, live, numbers) -> None:
    """Add one adapter, down [r, C] and up [r, O], to y [T, O] on the tokens `live`, or on all: x [T, C], weight [T].

    So many tokens at a time that what is read and written of them, `numbers` in all, stays in the cache.
    """
    step = max(1, numbers // (x.shape[1] + y.shape[1]))
    for start in range(0, len(weight) if live is None else len(live), step):
        if live is None:
            part = slice(start, start + step)
            y[part].add_(torch.mm(_inner(x[part], down, weight[part]).T, up))
        else:
            part = live[start : start + step]
            inner = _inner(x.index_select(0, part), down, weight.index_select(0, part))
            y.index_add_(0, part, torch.mm(inner.T, up))


def _inner(x, down, weights) -> torch.Tensor:
    """`w (down x^T)`, [r, t]: x [t, C], weights [r, t] or [t]. Ranks are rows, as few columns are slow in a product."""
    return torch.mm(down, x.to(down.dtype).T).mul_(weights.to(down.dtype))


@own_precision
def stacked_routed_lora(y, x, down, up, offsets, weights, adapter_index, stride, padding, dilation) -> None:
    """The operation on `y` itself where the kernel can't take the ranks: all adapters on all tokens, the dead ones
    times zero.

    It never waits for the device, so that a CUDA graph can hold it, and costs as much as all ranks together. Arguments
    are those of `routed_lora`, its stack taken apart.
    """
    rows, n_slots, _ = weights.shape
    adapters = torch.arange(len(offsets) - 1, device=y.device)
    owner = adapters.repeat_interleave(offsets.diff(), output_size=len(down))  # [R], whose each rank is
    index = adapters.expand(rows, n_slots) if adapter_index is None else adapter_index
    work = torch.promote_types(weights.dtype, torch.float32)
    share = weights.to(work).mT @ (index[:, :, None] == owner).to(work)  # [B, T, R]
    if down.ndim == 2:
        y += ((x @ down.T) * share.to(x.dtype)) @ up
    else:
        inner = F.conv2d(x, down, None, stride, padding, dilation).flatten(2) * share.mT.to(x.dtype)
        y += (up.T @ inner).view_as(y)
