"""The meaning of `context_attention`, against softmax attention written out and torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from weaver_kernels import context_attention_reference


def inputs(b=2, t=7, h=3, d=5, s=4, length=6, contexts=None, dtype=torch.float64, seed=0, per_context_q=False):
    rng = torch.Generator().manual_seed(seed)
    contexts = contexts or s
    q = torch.randn(*((b, s, t, h, d) if per_context_q else (b, t, h, d)), generator=rng, dtype=torch.float64)
    k, v = (torch.randn(contexts, length, h, d, generator=rng, dtype=torch.float64) for _ in range(2))
    weights = torch.randn(b, s, t, generator=rng)
    return q.to(dtype), k.to(dtype), v.to(dtype), weights


def one_by_one(q, k, v, weights, index, scale):
    """The definition, one number of the output's head vector at a time."""
    out = torch.zeros(weights.shape[0], weights.shape[2], *q.shape[-2:], dtype=torch.float64)
    for b, t, h in torch.cartesian_prod(*(torch.arange(n) for n in out.shape[:3])).tolist():
        for s in range(weights.shape[1]):
            c = index[b][s]
            query = q[b, t, h] if q.ndim == 4 else q[b, s, t, h]
            p = torch.exp(scale * k[c, :, h] @ query)
            out[b, t, h] += weights[b, s, t].double() * (p / p.sum()) @ v[c, :, h]
    return out


@pytest.mark.parametrize("per_context_q", [False, True], ids=["shared-q", "q-each"])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_is_the_definition(per_context_q, scale):
    q, k, v, weights = inputs(per_context_q=per_context_q, contexts=6)
    index = torch.tensor([[5, 0, 0, 3], [1, 2, 4, 5]])
    ours = context_attention_reference(q, k, v, weights, index, scale=scale)
    theirs = one_by_one(q, k, v, weights, index.tolist(), scale or q.shape[-1] ** -0.5)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_one_context_of_weight_one_is_plain_attention():
    q, k, v, _ = inputs(b=1, s=1)
    ours = context_attention_reference(q, k, v, torch.ones(1, 1, 7))
    theirs = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_linear_in_weights_and_zero_weights_are_skipped():
    q, k, v, weights = inputs(b=1)
    whole = context_attention_reference(q, k, v, weights)
    parts = 0
    for s in range(4):
        alone = torch.zeros_like(weights)
        alone[:, s] = weights[:, s]
        parts = parts + context_attention_reference(q, k, v, alone)
    torch.testing.assert_close(whole, parts, rtol=1e-12, atol=1e-12)
    poisoned = k.clone()
    poisoned[2] = torch.nan
    weights[:, 2] = 0
    assert torch.isfinite(context_attention_reference(q, poisoned, v, weights)).all()


def test_key_lengths_are_slices_and_length_zero_is_nothing():
    q, k, v, weights = inputs(b=1, s=3)
    ours = context_attention_reference(q, k, v, weights, key_lengths=torch.tensor([6, 0, 2]))
    first = context_attention_reference(q, k[:1], v[:1], weights[:, :1])
    last = context_attention_reference(q, k[2:, :2], v[2:, :2], weights[:, 2:])
    torch.testing.assert_close(ours, first + last, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_lower_precision_is_within_twice_eager(dtype):
    q, k, v, weights = inputs(t=33, d=16, length=77)
    truth = context_attention_reference(q, k, v, weights)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    ours = context_attention_reference(q, k, v, weights)
    eager = sum(
        weights[:, s, :, None, None].to(dtype)
        * F.scaled_dot_product_attention(
            q.transpose(1, 2), *(x[s].transpose(0, 1).expand(2, -1, -1, -1) for x in (k, v))
        ).transpose(1, 2)
        for s in range(4)
    )
    assert ours.dtype == dtype
    assert (ours.double() - truth).abs().max() <= 2 * (eager.double() - truth).abs().max()


def test_strided_views():
    q, k, v, weights = inputs(b=1, s=2)
    wide_q, wide_k = (torch.full((*x.shape[:-1], 9), torch.nan, dtype=x.dtype) for x in (q, k))
    wide_q[..., 2:7], wide_k[..., 4:] = q, k
    ours = context_attention_reference(wide_q[..., 2:7], wide_k[..., 4:], v, weights)
    torch.testing.assert_close(ours, context_attention_reference(q, k, v, weights), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 7, 15)}, "q must be"),
        ({"v": torch.zeros(4, 5, 3, 5)}, "k and v must be"),
        ({"weights": torch.zeros(2, 7)}, "weights must be"),
        ({"q": torch.zeros(2, 7, 3, 5, dtype=torch.float16)}, "share a floating-point dtype"),
        ({"q": torch.zeros(2, 7, 3, 6)}, r"q has \(heads, dim\) \(3, 6\)"),
        ({"q": torch.zeros(2, 8, 3, 5)}, "does not go with weights"),
        ({"weights": torch.zeros(2, 3, 7)}, "pass context_index"),
        ({"context_index": torch.zeros(2, 3, dtype=torch.long)}, "context_index must be"),
        ({"context_index": torch.full((2, 4), 4)}, "lie in 0..3"),
        ({"key_lengths": torch.tensor([6, 6, 6])}, "key_lengths must be"),
        ({"key_lengths": torch.tensor([6, 6, 7, -1])}, "lie in 0..6"),
        ({"weights": torch.zeros(2, 4, 7, requires_grad=True)}, "inference only, and weights requires grad"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input(change, message):
    arguments = dict(zip(("q", "k", "v", "weights"), inputs(dtype=torch.float32), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        context_attention_reference(**arguments)
