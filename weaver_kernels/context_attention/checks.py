"""What `context_attention` can't take, told in full."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

__all__ = ["shape_reasons", "value_reasons"]


def shape_reasons(q, k, v, weights, context_index, key_lengths, scale) -> list[str]:
    """Reasons seen in shapes, dtypes and devices, without reading a tensor; empty when everything fits."""
    reasons = []
    # Read once, and nothing is cut: on a launch's way each look at a tensor is a fifth of a microsecond.
    q_shape, k_shape, w_shape, dtype, device = q.shape, k.shape, weights.shape, q.dtype, q.device
    if len(q_shape) not in (4, 5):
        reasons.append(f"q must be [B, T, H, D] or [B, S, T, H, D], got {tuple(q_shape)}")
    if len(k_shape) != 4 or k_shape != v.shape:
        reasons.append(f"k and v must be [S', L, H, D] of one shape, got {tuple(k_shape)} and {tuple(v.shape)}")
    if len(w_shape) != 3 or not weights.is_floating_point():
        reasons.append(f"weights must be [B, S, T] floating-point, got {tuple(w_shape)} {weights.dtype}")
    if not dtype == k.dtype == v.dtype or not dtype.is_floating_point:
        reasons.append(f"q, k, v must share a floating-point dtype, got {dtype}, {k.dtype}, {v.dtype}")
    if scale is not None and not 0 < scale < math.inf:
        reasons.append(f"scale must be positive and finite, got {scale}")
    others = [x.device for x in (k, v, weights, context_index, key_lengths) if x is not None]
    if others.count(device) != len(others):
        names = sorted({str(device), *map(str, others)})
        reasons.append(f"tensors are on several devices: {', '.join(names)}")
    if reasons:
        return reasons
    rows, n_contexts, tokens = w_shape
    n_all, _, heads, dim = k_shape
    if not heads or not dim:
        reasons.append(f"there are no heads or dimensions: k is {tuple(k_shape)}")
    shared, each = (rows, tokens, heads, dim), (rows, n_contexts, tokens, heads, dim)
    if q_shape != shared and q_shape != each:
        if q_shape[-2:] != k_shape[-2:]:
            reasons.append(f"q has (heads, dim) {tuple(q_shape[-2:])}, k has {tuple(k_shape[-2:])}")
        if q_shape[:-2] not in (shared[:-2], each[:-2]):
            reasons.append(f"q {tuple(q_shape)} does not go with weights {tuple(w_shape)}")
    if context_index is None:
        if n_all != n_contexts:
            reasons.append(f"weights have {n_contexts} contexts and k has {n_all}: pass context_index [B, S]")
    elif context_index.shape != (rows, n_contexts) or not _integers(context_index):
        got = f"{tuple(context_index.shape)} {context_index.dtype}"
        reasons.append(f"context_index must be {(rows, n_contexts)} integers, got {got}")
    if key_lengths is not None and (key_lengths.shape != (n_all,) or not _integers(key_lengths)):
        got = f"{tuple(key_lengths.shape)} {key_lengths.dtype}"
        reasons.append(f"key_lengths must be {(n_all,)} integers, got {got}")
    return reasons


def value_reasons(index: Sequence[Sequence[int]], lengths: Sequence[int], key_shape: Sequence[int]) -> list[str]:
    """Reasons seen in the numbers of `context_index` and `key_lengths`, read to the host."""
    n_contexts, n_keys = key_shape[:2]
    reasons = []
    if not all(0 <= context < n_contexts for row in index for context in row):
        reasons.append(f"context_index must lie in 0..{n_contexts - 1}")
    if not all(0 <= length <= n_keys for length in lengths):
        reasons.append(f"key_lengths must lie in 0..{n_keys}")
    return reasons


def _integers(x: torch.Tensor) -> bool:
    return x.dtype in (torch.int32, torch.int64)
