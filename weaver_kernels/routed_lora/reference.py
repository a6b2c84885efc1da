"""The meaning of `routed_lora`, written to be read: one adapter of one row at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from weaver_kernels.checks import gradient_reasons, own_precision, require
from weaver_kernels.routed_lora.adapters import AdapterStack
from weaver_kernels.routed_lora.checks import shape_reasons, value_reasons

__all__ = ["routed_lora_reference"]


@own_precision
def routed_lora_reference(
    y: torch.Tensor,
    x: torch.Tensor,
    adapters: AdapterStack,
    weights: torch.Tensor,
    adapter_index: torch.Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
) -> torch.Tensor:
    """`y[b,t] + sum_s W[b,s,t] up_c^T down_c x[b,t]` with `c = adapter_index[b,s]`; arguments of `routed_lora`.

    A new tensor in y's dtype, computed in float64 for float64 and in float32 otherwise.
    """
    geometry = tuple(n for one in (stride, padding, dilation) for n in (one if isinstance(one, tuple) else (one, one)))
    reasons = shape_reasons(y, x, adapters, weights, adapter_index, geometry)
    require("routed_lora", reasons + gradient_reasons(y=y, x=x, down=adapters.down, up=adapters.up, weights=weights))
    rows, n_contexts, _ = weights.shape
    index = [list(range(n_contexts))] * rows if adapter_index is None else adapter_index.tolist()
    require("routed_lora", value_reasons(index, len(adapters)))
    work = torch.float64 if y.dtype == torch.float64 else torch.float32
    out = y.to(work, copy=True)
    for b in range(rows):
        for s in range(n_contexts):
            part = slice(adapters.starts[index[b][s]], adapters.starts[index[b][s] + 1])
            down, up, weight = adapters.down[part].to(work), adapters.up[part].to(work), weights[b, s].to(work)
            if not len(up) or not weight.any():
                continue
            if down.ndim == 2:
                out[b] += weight[:, None] * (x[b].to(work) @ down.T @ up)
            else:
                inner = F.conv2d(x[b].to(work), down, None, geometry[:2], geometry[2:4], geometry[4:])  # [r, h, w]
                out[b] += weight.view_as(inner[0]) * torch.einsum("ro,rhw->ohw", up, inner)
    return out.to(y.dtype)
