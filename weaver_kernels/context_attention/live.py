"""`context_attention` in plain PyTorch, for every device without the kernel: only live tokens are computed."""

from __future__ import annotations

import torch

from weaver_kernels.checks import own_precision, require
from weaver_kernels.context_attention.checks import value_reasons
from weaver_kernels.tuning import config_table

__all__ = ["live_context_attention"]


@own_precision
def live_context_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    weights: torch.Tensor,
    context_index: torch.Tensor | None,
    key_lengths: torch.Tensor | None,
    scale: float,
    tokens: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
) -> torch.Tensor:
    """The operation, context by context: gather its live tokens, attend, weigh, add into their rows.

    Arguments are those of `context_attention`, and `tokens` [B, S, T] with `counts` [B, S] of `live_tokens`; without
    them they are taken from `weights`. A context that is alive on most tokens is computed on all of them, because
    gathering costs more; and on small maps all contexts of a row are, in one product, because calls cost more
    (`configs/live_tokens.json`).

    Attention is written out rather than left to `scaled_dot_product_attention`, whose blocks are mostly overhead at 77
    keys: 0.86 of its time at T = 9216, H = 5, D = 64 and 0.75 at T = 576, H = 20 (one x86 core, float32).
    Logits and sums are in float32, or float64 for float64.
    """
    settings = config_table("live_tokens")
    rows, n_contexts, n_tokens = weights.shape
    index = [list(range(n_contexts))] * rows if context_index is None else context_index.tolist()
    lengths = [k.shape[1]] * k.shape[0] if key_lengths is None else key_lengths.tolist()
    require("context_attention", value_reasons(index, lengths, k.shape))
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.empty(rows, n_tokens, *q.shape[-2:], dtype=work, device=q.device)
    live_counts = ((weights != 0).sum(-1) if counts is None else counts).tolist()
    for b in range(rows):
        parts = []  # (gathered, context, slot), those on all tokens first: the first of them fills `out`
        live_slots = [s for s, count in enumerate(live_counts[b]) if count and lengths[index[b][s]]]
        span = slice(live_slots[0], live_slots[-1] + 1) if len(live_slots) > 1 and q.ndim == 4 else slice(0)
        if together := _together(index[b][span], live_counts[b][span], lengths, q.shape, k.shape[1], settings["call"]):
            _side_by_side(out[b], q[b], k[together], v[together], weights[b, span], scale)
            continue
        for s in live_slots:
            count = live_counts[b][s]
            dense = n_tokens <= settings["dense_tokens"] or count >= settings["dense_share"] * n_tokens
            parts.append((not dense, index[b][s], s))
        parts.sort()
        if not parts or parts[0][0]:
            out[b].zero_()
        for i, (gathered, context, s) in enumerate(parts):
            query = q[b] if q.ndim == 4 else q[b, s]  # [T, H, D]
            keys = k[context, : lengths[context]].to(work).permute(1, 2, 0)  # [H, D, L]
            values = v[context, : lengths[context]].to(work).transpose(0, 1)  # [H, L, D]
            if not gathered:
                _on_all(out[b], query, keys, values, weights[b, s], scale, settings["chunk"], add=i > 0)
                continue
            live = weights[b, s].nonzero()[:, 0] if tokens is None else tokens[b, s, : live_counts[b][s]]
            _on_some(out[b], query, keys, values, weights[b, s], live, scale, settings["chunk"])
    return out.to(q.dtype)


def _together(contexts, counts, lengths, shape, length, call) -> slice | None:
    """The part of `k` that a row's contexts from its first live one to its last are, where all of them on all tokens
    cost less: the calls that are saved are worth `call` scores each, and there are so many more for dead tokens.

    contexts : their numbers, counts : tokens each is alive on, shape : of q, [B, T, H, D]
    """
    n_contexts, live = len(contexts), sum(map(bool, counts))
    if live < 2 or contexts != list(range(contexts[0], contexts[0] + n_contexts)):
        return None
    if any(lengths[context] < length for context in contexts):
        return None
    more = (n_contexts * shape[1] - sum(counts)) * shape[2] * length
    return slice(contexts[0], contexts[0] + n_contexts) if more <= call * (live - 1) else None


def _side_by_side(out, query, k, v, weights, scale) -> None:
    """Write contexts k, v [S, L, H, D] into `out` [T, H, D], their keys in one row; query [T, H, D], weights [S, T]."""
    keys, values = (x.to(out.dtype) for x in (k, v))
    keys = keys.flatten(0, 1).permute(1, 2, 0)  # [H, D, S * L]
    scores = torch.baddbmm(keys.new_empty(()), query.to(out.dtype).transpose(0, 1), keys, beta=0, alpha=scale)
    scores = scores.unflatten(-1, k.shape[:2]).permute(2, 0, 1, 3).softmax(-1)  # [S, H, T, L]
    scores.mul_(weights.to(out.dtype)[:, None, :, None])
    found = torch.bmm(scores.flatten(0, 1), values.transpose(1, 2).flatten(0, 1))  # [S * H, T, D], each context whole
    out.copy_(found.unflatten(0, (len(k), -1)).sum(0).transpose(0, 1))


# A chunk's scores stay in the cache. Its result is added to `out` whole: a product that begins at what `out` holds
# would round each of its terms to the size of the sum. It is a tensor of its own: a batched product into a view that
# lies as [T, H, D] is done head by head (1.4 times the time at T = 144, H = 20).


def _on_all(out, query, keys, values, weight, scale, chunk, *, add: bool) -> None:
    """Add one context to `out` [T, H, D], or write it there."""
    for start in range(0, len(weight), chunk):
        part = slice(start, start + chunk)
        found = torch.bmm(_weighted_scores(query[part], keys, weight[part], scale), values).transpose(0, 1)
        if add:
            out[part] += found
        else:
            out[part] = found


def _on_some(out, query, keys, values, weight, live, scale, chunk) -> None:
    """Add one context to `out` [T, H, D] on the tokens `live`."""
    for start in range(0, len(live), chunk):
        part = live[start : start + chunk]
        scores = _weighted_scores(query.index_select(0, part), keys, weight.index_select(0, part), scale)
        out.index_add_(0, part, torch.bmm(scores, values).transpose(0, 1))


def _weighted_scores(query, keys, weight, scale) -> torch.Tensor:
    """`w softmax(scale q K^T)`, [H, t, L]: query [t, H, D], keys [H, D, L], weight [t]."""
    query = query.to(keys.dtype).transpose(0, 1)
    scores = torch.baddbmm(keys.new_empty(()), query, keys, beta=0, alpha=scale)
    return scores.softmax(-1).mul_(weight.to(keys.dtype)[:, None])
