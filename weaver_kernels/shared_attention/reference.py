"""The meaning of `shared_attention`, with the whole map written out."""

from __future__ import annotations

import torch

from weaver_kernels.checks import own_precision, require
from weaver_kernels.shared_attention.checks import shape_reasons

__all__ = ["shared_attention_reference"]


@own_precision
def shared_attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None
) -> torch.Tensor:
    """`softmax(scale Q K^T) V_r` for every row r; arguments of `shared_attention`.

    In float64 for float64 and in float32 otherwise.
    """
    require("shared_attention", shape_reasons(q, k, v, scale))
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = torch.einsum("thd,lhd->htl", q[0].to(work), k[0].to(work)) * scale
    return torch.einsum("htl,rlhd->rthd", logits.softmax(-1), v.to(work)).to(q.dtype)
