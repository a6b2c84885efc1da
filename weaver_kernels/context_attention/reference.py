"""The meaning of `context_attention`, written to be read: one context of one row at a time."""

from __future__ import annotations

import torch

__all__ = ["context_attention_reference"]


def context_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    weights: torch.Tensor,
    context_index: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    key_lengths: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-attention to several contexts at once, each weighted by token:

    `O[b,t,h] = sum_s W[b,s,t] softmax(scale q[b,t,h] . K[c,h]^T) V[c,h]` with `c = context_index[b,s]`.

    Masks, strengths, concept-free suppression and the choice of a row's contexts are all in `weights` (arXiv
    2404.03913, the equation of `h_fuse`, with its sums taken before the output projection). Rows B, tokens T,
    contexts S of a row out of S' in all, text length L, heads H, head dimension D. Inference only.

    Parameters
    ----------
    q : [B, T, H, D] shared by the contexts of a row, or [B, S, T, H, D] with a query for each
    k, v : [S', L, H, D]
    weights : [B, S, T], any sign; a context whose weights are zero on a whole row is not computed there
    context_index : [B, S] integers into S'; None takes context s for s (then S' = S)
    scale : None is `1 / sqrt(D)`
    key_lengths : [S'] integers, how many of the L keys of a context count; None is all; a context of length 0 adds
        nothing

    Returns
    -------
    [B, T, H, D] in q's dtype, computed in float64 for float64 and in float32 otherwise

    Raises
    ------
    ValueError with every reason, when shapes, dtypes or indices do not fit.
    """
    reasons = _reasons_not_supported(q, k, v, weights, context_index, key_lengths)
    if reasons:
        raise ValueError("context_attention: " + "; ".join(reasons))
    rows, n_contexts, tokens = weights.shape
    heads, dim = q.shape[-2:]
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = dim**-0.5 if scale is None else scale
    if context_index is None:
        index = [list(range(n_contexts))] * rows
    else:
        index = context_index.tolist()
    lengths = [k.shape[1]] * k.shape[0] if key_lengths is None else key_lengths.tolist()
    alive = (weights != 0).any(-1).tolist()

    out = torch.zeros(rows, tokens, heads, dim, dtype=work, device=q.device)
    for b in range(rows):
        for s in range(n_contexts):
            context = index[b][s]
            length = lengths[context]
            if not alive[b][s] or length == 0:
                continue
            q_bs = (q[b] if q.ndim == 4 else q[b, s]).to(work)  # [T, H, D]
            k_s, v_s = k[context, :length].to(work), v[context, :length].to(work)  # [L, H, D]
            attention = torch.einsum("thd,lhd->htl", q_bs, k_s).mul(scale).softmax(-1)
            out[b] += weights[b, s, :, None, None].to(work) * torch.einsum("htl,lhd->thd", attention, v_s)
    return out.to(q.dtype)


def _reasons_not_supported(q, k, v, weights, context_index, key_lengths) -> list[str]:
    reasons = []
    if q.ndim not in (4, 5):
        reasons.append(f"q must be [B, T, H, D] or [B, S, T, H, D], got {tuple(q.shape)}")
    if k.ndim != 4 or k.shape != v.shape:
        reasons.append(f"k and v must be [S', L, H, D] of one shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    if weights.ndim != 3:
        reasons.append(f"weights must be [B, S, T], got {tuple(weights.shape)}")
    if not q.dtype == k.dtype == v.dtype or not q.dtype.is_floating_point:
        reasons.append(f"q, k, v must share a floating-point dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if reasons:
        return reasons
    if q.shape[-2:] != k.shape[-2:]:
        reasons.append(f"q has (heads, dim) {tuple(q.shape[-2:])}, k has {tuple(k.shape[-2:])}")
    rows, n_contexts, tokens = weights.shape
    expected = (rows, tokens) if q.ndim == 4 else (rows, n_contexts, tokens)
    if q.shape[:-2] != expected:
        reasons.append(f"q {tuple(q.shape)} does not go with weights {tuple(weights.shape)}")
    if context_index is None:
        if k.shape[0] != n_contexts:
            reasons.append(f"weights have {n_contexts} contexts and k has {k.shape[0]}: pass context_index [B, S]")
    elif tuple(context_index.shape) != (rows, n_contexts):
        reasons.append(f"context_index must be {(rows, n_contexts)}, got {tuple(context_index.shape)}")
    elif context_index.numel() and not 0 <= int(context_index.min()) <= int(context_index.max()) < k.shape[0]:
        reasons.append(f"context_index must lie in 0..{k.shape[0] - 1}")
    if key_lengths is not None:
        if tuple(key_lengths.shape) != (k.shape[0],):
            reasons.append(f"key_lengths must be {(k.shape[0],)}, got {tuple(key_lengths.shape)}")
        elif key_lengths.numel() and not 0 <= int(key_lengths.min()) <= int(key_lengths.max()) <= k.shape[1]:
            reasons.append(f"key_lengths must lie in 0..{k.shape[1]}")
    return reasons
