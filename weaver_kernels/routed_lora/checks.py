"""What `routed_lora` can't take, told in full."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from weaver_kernels.routed_lora.adapters import AdapterStack

__all__ = ["output_size", "shape_reasons", "value_reasons"]


def output_size(size: int, taps: int, stride: int, padding: int, dilation: int) -> int:
    """Outputs of a convolution along an axis of `size`."""
    return (size + 2 * padding - dilation * (taps - 1) - 1) // stride + 1


def shape_reasons(y, x, adapters, weights, adapter_index, stride, padding, dilation) -> list[str]:
    """Reasons seen in shapes, dtypes and devices, without reading a tensor; empty when everything fits."""
    if not isinstance(adapters, AdapterStack):
        return [f"adapters must be an AdapterStack, got a {type(adapters).__name__}"]
    reasons = []
    down, up = adapters.down, adapters.up
    dims, of_what = (3, "Linear: [B, T, C]") if down.ndim == 2 else (4, "convolution: [B, C, H, W]")
    if x.ndim != dims or y.ndim != dims:
        reasons.append(f"x and y must be those of a {of_what}, got {tuple(x.shape)} and {tuple(y.shape)}")
    if weights.ndim != 3 or not weights.is_floating_point():
        reasons.append(f"weights must be [B, S, T] floating-point, got {tuple(weights.shape)} {weights.dtype}")
    if not y.dtype == x.dtype == down.dtype == up.dtype or not y.is_floating_point():
        got = f"{y.dtype}, {x.dtype}, {down.dtype}"
        reasons.append(f"y, x and adapters must share a floating-point dtype, got {got}")
    if stride < 1 or dilation < 1 or padding < 0:
        got = f"{stride}, {dilation}, {padding}"
        reasons.append(f"stride and dilation must be 1 or more and padding 0 or more, got {got}")
    if down.ndim == 2 and (stride, padding, dilation) != (1, 0, 1):
        reasons.append("a Linear has no stride, padding or dilation")
    if y is x or _start_together(y, x):
        reasons.append("y and x are one memory: x must stay as it is")
    others = [one.device for one in (x, down, adapters.offsets, weights, adapter_index) if one is not None]
    if others.count(y.device) != len(others):
        names = sorted({str(y.device), *map(str, others)})
        reasons.append(f"tensors are on several devices: {', '.join(names)}")
    if reasons:
        return reasons
    rows, n_slots, n_tokens = weights.shape
    inner, outer = (2, 2) if down.ndim == 2 else (1, 1)
    if x.shape[inner] != down.shape[1] or y.shape[outer] != up.shape[1]:
        got = f"{x.shape[inner]} and {y.shape[outer]}"
        reasons.append(f"adapters take {down.shape[1]} channels to {up.shape[1]}, x and y have {got}")
    if down.ndim == 2:
        expected = (rows, n_tokens)
        if tuple(x.shape[:2]) != expected or tuple(y.shape[:2]) != expected:
            got = f"x {tuple(x.shape)} and y {tuple(y.shape)}"
            reasons.append(f"{got} do not go with weights {tuple(weights.shape)}")
    else:
        sides = zip(x.shape[2:], down.shape[2:], strict=True)
        size = [output_size(side, taps, stride, padding, dilation) for side, taps in sides]
        if list(y.shape[2:]) != size or len(x) != len(y):
            reasons.append(f"x {tuple(x.shape)} gives a map of {size[0]} x {size[1]}, y is {tuple(y.shape)}")
        if rows != len(y) or n_tokens != y.shape[2] * y.shape[3]:
            reasons.append(f"y {tuple(y.shape)} does not go with weights {tuple(weights.shape)}")
    if adapter_index is None:
        if len(adapters) != n_slots:
            got = f"weights have {n_slots} contexts and there are {len(adapters)} adapters"
            reasons.append(f"{got}: pass adapter_index [B, S]")
    elif adapter_index.shape != (rows, n_slots) or adapter_index.dtype not in (torch.int32, torch.int64):
        got = f"{tuple(adapter_index.shape)} {adapter_index.dtype}"
        reasons.append(f"adapter_index must be {(rows, n_slots)} integers, got {got}")
    return reasons


def _start_together(y: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether both begin at one place of memory, so that a second adapter would read what the first has added."""
    if torch.compiler.is_compiling():  # it can't trace the question
        return False
    return y.data_ptr() == x.data_ptr() != 0  # 0: there are no numbers


def value_reasons(index: Sequence[Sequence[int]], n_adapters: int) -> list[str]:
    """Reasons seen in the numbers of `adapter_index`, read to the host."""
    if all(0 <= adapter < n_adapters for row in index for adapter in row):
        return []
    return [f"adapter_index must lie in 0..{n_adapters - 1}"]
