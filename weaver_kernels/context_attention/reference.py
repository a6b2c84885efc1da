"""The meaning of `context_attention`, written to be read: one context of one row at a time."""

from __future__ import annotations

import torch

from weaver_kernels.checks import gradient_reasons, own_precision, require
from weaver_kernels.context_attention.checks import shape_reasons, value_reasons

__all__ = ["context_attention_reference"]


@own_precision
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
    scale : positive; None is `1 / sqrt(D)`
    key_lengths : [S'] integers, how many of the L keys of a context count; None is all; a context of length 0 adds
        nothing

    Returns
    -------
    [B, T, H, D] in q's dtype, computed in float64 for float64 and in float32 otherwise

    Raises
    ------
    ValueError with every reason, when shapes, dtypes or indices do not fit or gradients are asked for.
    """
    reasons = shape_reasons(q, k, v, weights, context_index, key_lengths, scale)
    require("context_attention", reasons + gradient_reasons(q=q, k=k, v=v, weights=weights))
    rows, n_contexts, tokens = weights.shape
    heads, dim = q.shape[-2:]
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = dim**-0.5 if scale is None else scale
    if context_index is None:
        index = [list(range(n_contexts))] * rows
    else:
        index = context_index.tolist()
    lengths = [k.shape[1]] * k.shape[0] if key_lengths is None else key_lengths.tolist()
    require("context_attention", value_reasons(index, lengths, k.shape))
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
