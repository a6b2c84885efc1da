"""`context_attention` as it is called: the live-token implementation, its registration, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from operations.cases import assert_compiled_once, assert_within_twice_eager, make_case, soft_weights, truth
from weaver_kernels import ContextPlan, context_attention, context_attention_reference
from weaver_kernels.context_attention import live

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def planned(case: dict) -> dict:
    """The same case with a plan."""
    plan = ContextPlan(case["weights"], case.get("context_index"), merge=case["q"].ndim == 4)
    return case | {"weights": plan.weights, "context_index": plan.context_index, "plan": plan}


@DTYPES
@pytest.mark.parametrize(
    "shape",
    [
        {"t": 300, "h": 2, "d": 40, "length": 77, "s": 5},
        {"t": 1, "d": 8, "length": 1, "s": 1},
        {"t": 144, "s": 70, "length": 9, "weights": soft_weights},
        {"b": 3, "t": 130, "contexts": 9, "ragged": True, "strided": True, "weights": soft_weights},
        {"b": 2, "t": 67, "q_each": True, "d": 300},
    ],
    ids=["plain", "one-token", "seventy", "ragged-strided", "q-each"],
)
def test_within_twice_eager(shape, dtype):
    case = make_case(**shape, dtype=dtype)
    assert_within_twice_eager(context_attention(**case), case)
    assert_within_twice_eager(context_attention(**planned(case)), case)


@pytest.mark.parametrize("t", [33, 1500], ids=["one-chunk", "chunks"])
@pytest.mark.parametrize("weights", [None, soft_weights], ids=["hard", "soft"])
def test_float64_is_the_reference(t, weights):
    case = make_case(t=t, b=2, s=4, dtype=torch.float64, **({"weights": weights} if weights else {}))
    for arguments in (case, planned(case)):
        torch.testing.assert_close(context_attention(**arguments), truth(case), rtol=1e-12, atol=1e-12)


def test_logits_beyond_the_range_of_fp16():
    case = make_case(t=50, d=64, amplitude=60.0, dtype=torch.float16) | {"scale": 1.0}
    assert_within_twice_eager(context_attention(**case), case)


def test_a_small_context_keeps_its_digits_beside_a_large_one():
    """Contexts are added whole: term by term, each of 192 would be rounded to the size of the first context."""
    case = make_case(s=2, t=64, d=8, length=192)
    case["weights"] = torch.ones(1, 2, 64)
    case["v"][0] = 100
    first, second = ({"weights": case["weights"] * torch.tensor([keep])[..., None]} for keep in ([1.0, 0], [0, 1.0]))
    added = context_attention(**case).double() - context_attention(**case | first)
    assert (added - truth(case | second)).abs().max() < torch.finfo(torch.float32).eps * 100


@pytest.mark.parametrize("index", [[1, 2, 3], [3, 1, 2], [1, 1, 2]], ids=["in order", "shuffled", "twice"])
@pytest.mark.parametrize("lengths", [None, [6, 6, 6, 2], [6, 6, 0, 6]], ids=["full", "ragged", "one empty"])
def test_contexts_of_small_maps_together_are_those_by_themselves(index, lengths, monkeypatch):
    case = make_case(s=3, t=20, length=6, contexts=4, dtype=torch.float64)
    case |= {"context_index": torch.tensor([index]), "key_lengths": lengths and torch.tensor(lengths)}
    case["weights"][0, :, ::3] = 0
    together, settings = context_attention(**case), live.config_table("live_tokens")
    monkeypatch.setattr(live, "config_table", lambda name: settings | {"call": -1})
    torch.testing.assert_close(together, context_attention(**case), rtol=1e-12, atol=1e-12)


def test_only_live_tokens_are_computed(monkeypatch):
    """A context on a fifth of the tokens costs a fifth: its queries elsewhere may be anything."""
    case = make_case(s=2, t=100, dtype=torch.float64)
    case["weights"] = torch.zeros(1, 2, 100)
    case["weights"][0, 0, ::5] = 2.0
    expected = truth(case)
    seen = []
    scores = live._weighted_scores
    monkeypatch.setattr(live, "_weighted_scores", lambda q, *rest: seen.append(len(q)) or scores(q, *rest))
    case["q"][:, 1::5] = torch.nan
    out = context_attention(**case)
    assert seen == [20]
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_a_context_on_most_tokens_is_not_gathered(monkeypatch):
    case = make_case(s=1, t=100)
    case["weights"][0, 0, :5] = 0
    monkeypatch.setattr(torch.Tensor, "index_add_", None)
    assert_within_twice_eager(context_attention(**case), case)


def test_nothing_alive_and_nothing_there():
    case = make_case(b=2)
    assert torch.equal(context_attention(**case | {"weights": torch.zeros(2, 3, 40)}), torch.zeros_like(case["q"]))
    empty = make_case(t=0)
    assert context_attention(**empty).shape == (1, 0, 1, 16)
    no_keys = make_case(length=0)
    assert torch.equal(context_attention(**no_keys), torch.zeros_like(no_keys["q"]))


@pytest.mark.parametrize("with_plan", [False, True], ids=["no-plan", "plan"])
def test_opcheck(with_plan):
    case = make_case(b=2, contexts=4, ragged=True, strided=True)
    plan = ContextPlan(case["weights"], case["context_index"])
    torch.library.opcheck(
        torch.ops.weaver_kernels.context_attention.default,
        (
            case["q"],
            case["k"],
            case["v"],
            plan.weights,
            plan.context_index,
            case["key_lengths"],
            plan.lists if with_plan else None,
            0.3,
        ),
    )


@pytest.mark.parametrize("with_plan", [False, True], ids=["no-plan", "plan"])
def test_compiles_in_one_graph_and_not_again_for_other_masks(with_plan):
    torch._dynamo.reset()
    compiled = torch.compile(context_attention, backend="aot_eager", fullgraph=True)
    case = make_case(b=2, contexts=4, t=50)
    assert_compiled_once(
        compiled, planned(case) if with_plan else case, case, "context_index", assert_within_twice_eager
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 7, 15)}, "q must be"),
        ({"weights": torch.zeros(1, 3, 40, dtype=torch.int32)}, "weights must be .* torch.int32"),
        ({"q": torch.zeros(1, 40, 1, 16, device="meta")}, "several devices: cpu, meta"),
        ({"q": torch.zeros(1, 40, 1, 0), "k": torch.zeros(3, 20, 1, 0), "v": torch.zeros(3, 20, 1, 0)}, "no heads"),
        ({"scale": 0.0}, "scale must be positive"),
        ({"scale": float("nan")}, "scale must be positive"),
        ({"context_index": torch.zeros(1, 3)}, "context_index must be .* integers"),
        ({"context_index": torch.full((1, 3), 3)}, "lie in 0..2"),
        ({"context_index": torch.full((1, 3), -1)}, "lie in 0..2"),
        ({"key_lengths": torch.tensor([20, 21, -1])}, "key_lengths must lie in 0..20"),
        ({"q": torch.zeros(1, 40, 1, 16, requires_grad=True)}, "inference only, and q requires grad"),
        ({"plan": ContextPlan(torch.ones(1, 3, 40), capacity=4)}, "pass plan.weights"),
        ({"plan": ContextPlan(torch.ones(1, 3, 40)), "q": torch.zeros(1, 3, 40, 1, 16)}, "merge=False"),
        ({"plan": ContextPlan(torch.ones(1, 3, 40), tile_sizes=(16,))}, r"tiles of \[16\] of its own"),
        ({"q": torch.zeros(1, 41, 1, 12)}, r"\(1, 12\), k has \(1, 16\); q .* does not go with weights"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        context_attention(**make_case() | change)


@pytest.mark.parametrize("foreign", ["weights", "context_index"])
def test_a_plan_takes_no_weights_and_no_index_but_its_own(foreign):
    """Of the same shape they would give another result without a word: the plan merges, and skips what it has dead."""
    case = planned(make_case(contexts=4))
    with pytest.raises(ValueError, match="plan is of other weights or of another index"):
        context_attention(**case | {foreign: case[foreign].clone()})


def test_a_plan_is_what_decides_which_tokens_are_computed(monkeypatch):
    """With it no call looks for live tokens again."""
    case = planned(make_case(t=100, s=4))
    expected = context_attention(**case)
    monkeypatch.setattr(torch.Tensor, "nonzero", None)
    monkeypatch.setattr(torch.Tensor, "__ne__", None)
    assert torch.equal(context_attention(**case), expected)


def test_gradients_elsewhere_are_nobodys_business():
    case = make_case()
    case["q"].requires_grad_()
    with torch.no_grad():
        assert_within_twice_eager(context_attention(**case), case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_autocast_of_the_caller_rounds_nothing(dtype):
    case = make_case(b=2, t=256, s=3, d=16, dtype=dtype)
    case["weights"] = torch.zeros(2, 3, 256)
    for s in range(3):
        case["weights"][:, s, 80 * s : 80 * (s + 1)] = 1  # gathered, each by itself
    expected = context_attention(**case), context_attention_reference(**case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = context_attention(**case), context_attention_reference(**case)
    assert all(map(torch.equal, found, expected))
