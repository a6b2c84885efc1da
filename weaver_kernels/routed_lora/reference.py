"""The meaning of `routed_lora`, written to be read: one adapter of one row at a time, on every token."""

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
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
) -> torch.Tensor:
    """What `routed_lora` makes of `y`, which stays as it is:

    `y[b,t] + sum_s W[b,s,t] up_c^T (down_c x)[b,t]` with `c = adapter_index[b,s]`.

    Arguments, shapes and errors are those of `routed_lora`. Computed in float64 for float64 and in float32 otherwise;
    an adapter whose weights are zero on a whole row is not computed there.
    """
    reasons = shape_reasons(y, x, adapters, weights, adapter_index, stride, padding, dilation)
    given = {"y": y, "x": x, "down": adapters.down, "up": adapters.up} if not reasons else {}
    require("routed_lora", reasons + gradient_reasons(weights=weights, **given))
    work = torch.float64 if y.dtype == torch.float64 else torch.float32
    rows, n_slots, _ = weights.shape
    index = [list(range(n_slots))] * rows if adapter_index is None else adapter_index.tolist()
    require("routed_lora", value_reasons(index, len(adapters)))
    alive = (weights != 0).any(-1).tolist()

    out = y.to(work, copy=True)
    for b in range(rows):
        for s in range(n_slots):
            rank = slice(*adapters.starts[index[b][s] : index[b][s] + 2])
            down, up = adapters.down[rank].to(work), adapters.up[rank].to(work)
            weight = weights[b, s].to(work)
            if not alive[b][s] or not len(down):
                continue
            if down.ndim == 2:
                out[b] += weight[:, None] * (x[b].to(work) @ down.T @ up)
            else:
                inner = F.conv2d(x[b : b + 1].to(work), down, None, stride, padding, dilation)[0]  # [r, h, w]
                out[b] += weight.view(inner.shape[1:]) * torch.einsum("ro,rhw->ohw", up, inner)
    return out.to(y.dtype)
