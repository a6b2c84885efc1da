"""All contexts' keys and values of a layer, against one context at a time in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from weaver_kernels import (
    ContextKV,
    ContextPlan,
    LowRank,
    ProjectionChange,
    context_attention,
    equal_contexts,
    project_contexts,
    project_contexts_reference,
)

CONTEXTS, LENGTH, CHANNELS, HEADS, DIM = 5, 17, 96, 3, 8
WIDTH = HEADS * DIM


def make(dtype=torch.float64, amount=0.1):
    rng = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

    def low_rank(rank):
        return LowRank(amount * random(rank, CHANNELS), random(WIDTH, rank) * rank**-0.5)

    text = random(CONTEXTS, LENGTH, CHANNELS)
    weights = [random(WIDTH, CHANNELS) * CHANNELS**-0.5 for _ in range(2)]
    changes = {
        1: ProjectionChange(k=amount * random(WIDTH, CHANNELS), v=amount * random(WIDTH, CHANNELS)),
        2: ProjectionChange(v=low_rank(2)),
        3: ProjectionChange(k=low_rank(4), v=low_rank(1)),
        4: ProjectionChange(k=amount * random(WIDTH, CHANNELS), v=low_rank(3)),
    }
    return text, *weights, HEADS, changes


def double(change):
    if change is None or isinstance(change, torch.Tensor):
        return None if change is None else change.double()
    return type(change)(*map(double, change))


@pytest.mark.parametrize("kept", [(), (1,), (2, 3), (1, 2, 3, 4)], ids=["base", "full", "factors", "all"])
def test_is_the_reference(kept):
    *arguments, changes = make()
    changes = {s: changes[s] for s in kept}
    ours = project_contexts(*arguments, changes)
    keys, values = project_contexts_reference(*arguments, changes)
    torch.testing.assert_close(ours.keys, keys, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.values, values, rtol=1e-12, atol=1e-12)


def added(text, base, heads, change):
    """Eager, as adapters do it: the base model's projection and the change's, added."""
    projected = F.linear(text, base)
    if isinstance(change, LowRank):
        projected = projected + F.linear(F.linear(text, change.down), change.up)
    elif change is not None:
        projected = projected + F.linear(text, change)
    return projected.unflatten(-1, (heads, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_within_twice_eager(dtype):
    text, weight_k, weight_v, heads, changes = make(dtype)
    doubles = {s: double(change) for s, change in changes.items()}
    true = project_contexts_reference(text.double(), weight_k.double(), weight_v.double(), heads, doubles)
    ours = project_contexts(text, weight_k, weight_v, heads, changes)
    nothing = ProjectionChange()
    for got, base, name, expected in zip((ours.keys, ours.values), (weight_k, weight_v), "kv", true, strict=True):
        eager = torch.stack([added(text[s], base, heads, getattr(changes.get(s, nothing), name)) for s in range(5)])
        assert got.dtype == dtype
        assert (got.double() - expected).abs().max() <= 2 * (eager.double() - expected).abs().max()


def test_a_change_smaller_than_the_rounding_of_the_weights_is_kept():
    text, weight_k, weight_v, heads, _ = make(torch.float16)
    signs = torch.tensor([1.0, -1.0]).repeat(CHANNELS // 2).half()
    text, weight_k = signs.expand_as(text), torch.full_like(weight_k, 0.1)  # neighbours of 0.1 are 6e-5 apart
    delta = 2e-5 * signs.expand_as(weight_k)
    assert torch.equal(weight_k + delta, weight_k)
    keys = project_contexts(text, weight_k, weight_v, heads, {1: ProjectionChange(k=delta)}).keys
    assert not keys[0].any()
    torch.testing.assert_close(keys[1], torch.full_like(keys[1], 2e-5 * CHANNELS), rtol=1e-2, atol=0)


def test_writes_into_buffers_and_is_what_attention_takes():
    *arguments, changes = make(torch.float32)
    made = project_contexts(*arguments, changes)
    buffers = ContextKV(*(torch.full_like(x, torch.nan) for x in (made.keys, made.values)))
    assert project_contexts(*arguments, changes, out=buffers) is buffers
    assert torch.equal(buffers.keys, made.keys) and torch.equal(buffers.values, made.values)
    q, weights = torch.randn(1, 9, HEADS, DIM), torch.randn(1, CONTEXTS, 9)
    views, copies = (context_attention(q, kv.keys, kv.values, weights) for kv in (made, buffers))
    torch.testing.assert_close(views, copies)


def test_autocast_of_the_caller_rounds_nothing():
    *arguments, changes = make(torch.float32)
    expected = project_contexts(*arguments, changes), project_contexts_reference(*arguments, changes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = project_contexts(*arguments, changes), project_contexts_reference(*arguments, changes)
    for ours, own in zip(found, expected, strict=True):
        pairs = zip(*((x.keys, x.values) if isinstance(x, ContextKV) else x for x in (ours, own)), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def test_equal_contexts_merge_in_a_plan():
    text, *_ = make()
    text[3], text[4] = text[1], text[1]
    same_as = equal_contexts(text, [None, "cat", "cat", "cat", "dog"])
    assert same_as.tolist() == [0, 1, 2, 1, 4]
    weights = torch.rand(1, CONTEXTS, 4)
    plan = ContextPlan(weights, same_as=same_as)
    assert torch.equal(plan.weights[0, 1], weights[0, 1] + weights[0, 3]) and not plan.weights[0, 3].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": torch.zeros(17, CHANNELS)}, r"text must be \[S', L, C\]"),
        ({"weight_v": torch.zeros(WIDTH, 9)}, "of one shape"),
        ({"text": torch.zeros(5, 17, 9)}, "text has 9 channels, the weights take 96"),
        ({"heads": 5}, "24 outputs can't be 5 heads"),
        ({"changes": {5: ProjectionChange()}}, r"contexts \[5\], text has 0..4"),
        ({"changes": {0: ProjectionChange(v=torch.zeros(2, 2))}}, r"v of context 0 must be \(24, 96\), got \(2, 2\)"),
        (
            {"changes": {0: ProjectionChange(k=LowRank(torch.zeros(2, CHANNELS), torch.zeros(24, 3)))}},
            r"k of context 0 must be \[r, 96\] and \[24, r\]",
        ),
        ({"out": ContextKV(torch.zeros(1), torch.zeros(1))}, "out.keys must be .*; out.values must be"),
        ({"weight_k": torch.zeros(WIDTH, CHANNELS, requires_grad=True)}, "inference only, and weight_k"),
        (
            {"changes": {1: ProjectionChange(k=torch.zeros(WIDTH, CHANNELS, requires_grad=True))}},
            "inference only, and k of context 1 requires grad",
        ),
        (
            {
                "changes": {
                    1: ProjectionChange(v=LowRank(torch.zeros(2, CHANNELS).requires_grad_(), torch.zeros(24, 2)))
                }
            },
            "inference only, and v.down of context 1 requires grad",
        ),
        ({"text": torch.zeros(5, 17, CHANNELS, dtype=torch.int64)}, "text must be floating-point, got torch.int64"),
        (
            {"changes": {1: ProjectionChange(k=torch.zeros(WIDTH, CHANNELS, dtype=torch.int8))}},
            "k of context 1 must be floating-point, got torch.int8",
        ),
        ({"weight_v": torch.zeros(WIDTH, CHANNELS, device="meta")}, "text is on cpu, weight_v on meta"),
        (
            {"out": ContextKV(*(torch.zeros(5, 17, HEADS, DIM, device=device) for device in ("cpu", "meta")))},
            "text is on cpu, out.values on meta",
        ),
        ({"changes": [ProjectionChange()]}, "changes must be .*, got a list"),
        ({"changes": {0: torch.zeros(WIDTH, CHANNELS)}}, "context 0 must be a ProjectionChange, got a Tensor"),
        ({"changes": {"0": ProjectionChange()}}, "context '0', expected a whole number"),
        ({"changes": {0: ProjectionChange(k=LowRank(torch.zeros(()), torch.zeros(())))}}, "k of context 0 must be a"),
    ],
    ids=[
        *("text", "weights", "channels", "heads", "contexts", "full", "factors", "out", "gradients"),
        *("gradients-of-full", "gradients-of-factors", "integers", "integers-of-full", "device", "device-of-out"),
        *("no-mapping", "no-change", "no-number", "no-matrices"),
    ],
)
def test_bad_input(change, message):
    arguments = dict(zip(("text", "weight_k", "weight_v", "heads", "changes"), make(torch.float32), strict=True))
    with pytest.raises(ValueError, match=message):
        project_contexts(**arguments | change)


def test_comparing_texts_takes_no_room_for_every_pair_of_them():
    from torch.profiler import ProfilerActivity, profile

    text = torch.randn(40, 16, 64)[torch.arange(40) % 20]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        assert equal_contexts(text, [None] * 40).tolist() == [s % 20 for s in range(40)]
    assert max(event.cpu_memory_usage for event in profiler.key_averages()) < 8 * text.nbytes


def test_no_context_is_equal_to_any():
    assert equal_contexts(torch.zeros(0, 2, 3), []).dtype == torch.int64


def test_texts_and_weights_are_counted():
    with pytest.raises(ValueError, match="5 texts and 1 weights"):
        equal_contexts(make()[0], [None])
