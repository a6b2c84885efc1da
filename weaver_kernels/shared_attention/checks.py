"""What `shared_attention` can't take, told in full."""

from __future__ import annotations

import math

__all__ = ["shape_reasons"]


def shape_reasons(q, k, v, scale) -> list[str]:
    """Reasons seen in shapes, dtypes and devices; empty when everything fits."""
    reasons = []
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        return [f"q, k, v must be [1, T, H, D], [1, L, H, D], [R, L, H, E], got {shapes}"]
    if len(q) != 1 or len(k) != 1:
        reasons.append(f"q and k must have one row, which all rows of v share, got {len(q)} and {len(k)}")
    if q.shape[-2:] != k.shape[-2:]:
        reasons.append(f"q has (heads, dim) {tuple(q.shape[-2:])}, k has {tuple(k.shape[-2:])}")
    if v.shape[1:3] != k.shape[1:3]:
        reasons.append(f"v has (keys, heads) {tuple(v.shape[1:3])}, k has {tuple(k.shape[1:3])}")
    if 0 in k.shape:
        reasons.append(f"there are no keys, heads or dimensions: k is {tuple(k.shape)}")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        reasons.append(f"q, k, v must share a floating-point dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if scale is not None and not 0 < scale < math.inf:
        reasons.append(f"scale must be positive and finite, got {scale}")
    if len({x.device for x in (q, k, v)}) > 1:
        reasons.append(f"tensors are on several devices: {q.device}, {k.device}, {v.device}")
    return reasons
