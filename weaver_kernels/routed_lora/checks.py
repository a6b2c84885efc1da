"""What `routed_lora` can't take, told in full."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from weaver_kernels.routed_lora.adapters import AdapterStack

__all__ = ["Geometry", "output_size", "shape_reasons", "value_reasons"]

Geometry = tuple[int, int, int, int, int, int]
"""Stride, padding and dilation of a convolution, each (vertical, horizontal)."""


def shape_reasons(y, x, adapters: AdapterStack, weights, index, geometry: Geometry) -> list[str]:
    """Reasons seen in shapes, dtypes and devices, without reading a tensor; empty when everything fits."""
    down, up = adapters.down, adapters.up
    reasons = []
    if weights.ndim != 3 or not weights.is_floating_point():
        reasons.append(f"weights must be [B, S, T] floating-point, got {tuple(weights.shape)} {weights.dtype}")
    if not y.dtype == x.dtype == down.dtype == up.dtype or not y.is_floating_point():
        got = f"{y.dtype}, {x.dtype}, {down.dtype}, {up.dtype}"
        reasons.append(f"y, x and the adapters' factors must share a floating-point dtype, got {got}")
    if len({z.device for z in (y, x, down, up, weights, *([] if index is None else [index]))}) > 1:
        devices = sorted({str(z.device) for z in (y, x, down, up, weights)})
        reasons.append(f"tensors are on several devices: {', '.join(devices)}")
    if down.ndim not in (2, 4) or up.ndim != 2 or len(up) != len(down) or adapters.starts[-1] != len(down):
        got = f"{tuple(down.shape)}, {tuple(up.shape)} and {adapters.starts[-1]} ranks"
        reasons.append(f"adapters must be down [R, C] or [R, C, kh, kw] and up [R, O], got {got}")
    if reasons:
        return reasons
    rows, n_contexts, tokens = weights.shape
    inputs, outputs = down.shape[1], up.shape[1]
    if down.ndim == 2:
        expected = {"y": (rows, tokens, outputs), "x": (rows, tokens, inputs)}
    else:
        if x.ndim != 4 or y.ndim != 4:
            return [f"a convolution's y and x must be [B, O, h, w] and [B, C, H, W], got {_pair(y, x)}"]
        size = output_size(x.shape[2:], down.shape[2:], geometry)
        expected = {"y": (rows, outputs, *size), "x": (rows, inputs, *x.shape[2:])}
        if size[0] * size[1] != tokens:
            reasons.append(f"weights {tuple(weights.shape)} are not of the {size[0]} x {size[1]} places of the output")
    for (name, shape), tensor in zip(expected.items(), (y, x), strict=True):
        if tuple(tensor.shape) != shape:
            reasons.append(f"{name} must be {shape}, got {tuple(tensor.shape)}")
    if index is None:
        if len(adapters) != n_contexts:
            reasons.append(f"weights have {n_contexts} contexts and there are {len(adapters)} adapters: pass an index")
    elif tuple(index.shape) != (rows, n_contexts) or index.dtype not in (torch.int32, torch.int64):
        reasons.append(f"adapter_index must be {(rows, n_contexts)} integers, got {tuple(index.shape)} {index.dtype}")
    return reasons


def value_reasons(index: Sequence[Sequence[int]], adapters: int) -> list[str]:
    """Reasons seen in the numbers of `adapter_index`, read to the host."""
    inside = all(0 <= one < adapters for row in index for one in row)
    return [] if inside else [f"adapter_index must lie in 0..{adapters - 1}"]


def output_size(size: Sequence[int], kernel: Sequence[int], geometry: Geometry) -> tuple[int, int]:
    """Height and width of a convolution's output."""
    sides = zip(size, kernel, geometry[:2], geometry[2:4], geometry[4:], strict=True)
    return tuple((n + 2 * pad - far * (taps - 1) - 1) // step + 1 for n, taps, step, pad, far in sides)


def _pair(y: torch.Tensor, x: torch.Tensor) -> str:
    return f"{tuple(y.shape)} and {tuple(x.shape)}"
