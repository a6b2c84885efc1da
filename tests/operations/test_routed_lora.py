"""Low-rank changes of a layer in their regions, against one adapter at a time in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from operations.cases import hard_weights, soft_weights
from operations.fuzz import blobs, dead
from operations.routed_cases import assert_routed, make_routed, routed_truth
from weaver_kernels import AdapterStack, ContextPlan, LowRank, routed_lora

CASES = {
    "one": dict(ranks=(5,), weights=soft_weights),
    "hard": dict(),
    "soft": dict(weights=soft_weights),
    "blobs": dict(t=300, weights=blobs, ranks=(1, 16, 128, 3)),
    "dead": dict(weights=dead),
    "one-token": dict(t=1, weights=soft_weights),
    "many": dict(s=70, ranks=(2, 7, 0, 1), weights=soft_weights, t=9),
    "indexed": dict(s=2, ranks=(3, 4, 5, 6, 7), weights=soft_weights),
    "strided": dict(strided=True, t=150, weights=blobs),
    "wide": dict(c=200, o=7, t=130, weights=blobs),
    "half": dict(dtype=torch.float16, t=200, weights=blobs),
    "bfloat16": dict(dtype=torch.bfloat16, t=200, weights=soft_weights),
    "double": dict(dtype=torch.float64, weights=soft_weights),
    "3x3": dict(convolution=((7, 9), 3, 1, 1, 1), weights=blobs),
    "3x3-soft": dict(convolution=((7, 9), 3, 1, 1, 1), weights=soft_weights),
    "1x1": dict(convolution=((7, 9), 1, 1, 0, 1), weights=blobs),
    "stride": dict(convolution=((9, 6), 3, 2, 1, 1), weights=soft_weights),
    "no-padding": dict(convolution=((9, 6), 3, 2, 0, 1), weights=blobs),
    "dilation": dict(convolution=((9, 11), 3, 1, 2, 2), weights=blobs),
    "channels-last": dict(convolution=((7, 9), 3, 1, 1, 1), weights=blobs, channels_last=True),
    "conv-half": dict(convolution=((7, 9), 3, 1, 1, 1), weights=soft_weights, dtype=torch.float16),
    "conv-strided": dict(convolution=((7, 9), 3, 1, 1, 1), weights=blobs, strided=True),
}


@pytest.mark.parametrize("planned", [False, True], ids=["", "planned"])
@pytest.mark.parametrize("name", CASES)
def test_is_the_reference(name, planned):
    case = make_routed(**CASES[name])
    arguments, given = dict(case), case["y"].clone()
    if planned:
        plan = ContextPlan(case["weights"], case.get("adapter_index"))
        arguments |= {"weights": plan.weights, "adapter_index": plan.context_index, "plan": plan}
    out = routed_lora(**arguments)
    assert out is case["y"]
    assert_routed(out, case | {"y": given})
    alive = case["weights"].any(1)
    alive = alive.view(-1, 1, *given.shape[2:]) if given.ndim == 4 else alive[..., None]
    still = ~alive.expand_as(given)
    assert torch.equal(out[still], given[still])  # to the bit, where nothing is alive


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_one_adapter_everywhere_is_the_layer_with_merged_weights(kind):
    rng = torch.Generator().manual_seed(0)
    window = (3, 3) if kind == "convolution" else ()
    weight = torch.randn(10, 6, *window, generator=rng, dtype=torch.float64)
    factors = LowRank(torch.randn(3, 6, *window, generator=rng).double(), torch.randn(10, 3, generator=rng).double())
    merged = weight + (factors.up @ factors.down.flatten(1)).view_as(weight)
    stack = AdapterStack.of([factors], scales=[1.0])
    if kind == "convolution":
        x = torch.randn(2, 6, 8, 5, generator=rng).double()
        y, expected = (F.conv2d(x, w, None, 2, 1) for w in (weight, merged))
        routed_lora(y, x, stack, torch.ones(2, 1, y[0, 0].numel()), stride=2, padding=1)
    else:
        x = torch.randn(2, 20, 6, generator=rng).double()
        y, expected = (F.linear(x, w) for w in (weight, merged))
        routed_lora(y, x, stack, torch.ones(2, 1, 20))
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


def test_stacks():
    factors = [LowRank(torch.ones(2, 4), torch.ones(3, 2)), None, LowRank(torch.ones(1, 4), torch.ones(3, 1))]
    stack = AdapterStack.of(factors, scales=[2.0, 9.0, 0.5])
    assert (len(stack), stack.starts, stack.down.shape, stack.up.shape) == (3, (0, 2, 2, 3), (3, 4), (3, 3))
    assert stack.up[:, 0].tolist() == [2, 2, 0.5]
    half = stack.to("cpu", torch.float16)
    assert half.down.dtype == half.up.dtype == torch.float16 and half.starts == stack.starts
    with pytest.raises(ValueError, match="there are no factors"):
        AdapterStack.of([None])
    odd = [factors[0], LowRank(torch.ones(2, 5), torch.ones(3, 2)), LowRank(torch.ones(2, 4), torch.ones(3, 3))]
    with pytest.raises(ValueError, match=r"scales must be 3 .*adapter 1 has .*\(2, 5\).*adapter 2 must be \[r, C\]"):
        AdapterStack.of(odd, scales=[1.0])


def test_everything_wrong_is_told_at_once():
    case = make_routed()
    wrong = case | {"y": case["y"][:, :7], "x": case["x"][..., :5], "adapter_index": torch.zeros(2, 9)}
    message = (
        r"routed_lora: y must be \(2, 40, 40\), got \(2, 7, 40\); x must be .*; adapter_index must be \(2, 3\) int"
    )
    with pytest.raises(ValueError, match=message):
        routed_lora(**wrong)
    with pytest.raises(ValueError, match="share a floating-point dtype, got torch.float32, torch.float16"):
        routed_lora(**case | {"x": case["x"].half()})
    with pytest.raises(ValueError, match="weights have 2 contexts and there are 3 adapters: pass an index"):
        routed_lora(**case | {"weights": case["weights"][:, :2]})
    with pytest.raises(ValueError, match=r"adapter_index must lie in 0..2"):
        routed_lora(**case | {"adapter_index": torch.full((2, 3), 3)})
    with pytest.raises(ValueError, match="plan is of other weights"):
        routed_lora(**case | {"plan": ContextPlan(case["weights"])})
    with pytest.raises(ValueError, match="inference only, and x requires grad"):
        routed_lora(**case | {"x": case["x"].clone().requires_grad_()})
    convolution = make_routed(convolution=((7, 9), 3, 1, 1, 1))
    with pytest.raises(ValueError, match="are not of the 5 x 7 places of the output"):
        routed_lora(**convolution | {"padding": 0})
    with pytest.raises(ValueError, match=r"a convolution's y and x must be \[B, O, h, w\]"):
        routed_lora(**convolution | {"x": case["x"]})


@pytest.mark.parametrize("kind", [{}, {"convolution": ((7, 9), 3, 1, 1, 1)}], ids=["linear", "convolution"])
def test_opcheck_and_compile(kind):
    case = make_routed(weights=blobs, **kind)
    plan, stack = ContextPlan(case["weights"]), case["adapters"]
    geometry = [case.get(name, default) for name, default in (("stride", 1), ("padding", 0), ("dilation", 1))]
    geometry = [n for n in geometry for _ in range(2)]
    arguments = (case["y"].clone(), case["x"], stack.down, stack.up, list(stack.starts), plan.weights)
    operation = torch.ops.weaver_kernels.routed_lora.default
    torch.library.opcheck(operation, (*arguments, plan.context_index, plan.lists, geometry))

    def call(y, x):
        planned = {"weights": plan.weights, "adapter_index": plan.context_index, "plan": plan}
        return routed_lora(
            y + 0, x, stack, **planned, **{k: case[k] for k in ("stride", "padding", "dilation") if k in case}
        )

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(case["y"], case["x"]), call(case["y"], case["x"]))


@pytest.mark.parametrize("name", ["hard", "soft", "indexed", "many", "3x3-soft", "stride"])
def test_all_ranks_side_by_side_is_the_same(name):
    """What a GPU without the kernel computes."""
    from weaver_kernels.routed_lora.live import stacked_routed_lora

    case = make_routed(**CASES[name] | {"dtype": torch.float64})
    true, stack, y = routed_truth(case), case["adapters"], case["y"]
    geometry = tuple(case.get(k, d) for k, d in (("stride", 1), ("padding", 0), ("dilation", 1)) for _ in range(2))
    index = case.get("adapter_index")
    stacked_routed_lora(y, case["x"], stack.down, stack.up, stack.starts, case["weights"], index, geometry)
    torch.testing.assert_close(y, true, rtol=1e-5, atol=1e-5)  # weights are float32


def test_under_autocast_it_keeps_its_own_precision():
    case = make_routed(weights=soft_weights)
    given = case["y"].clone()
    with torch.autocast("cpu", torch.bfloat16):
        out = routed_lora(**case)
    assert_routed(out, case | {"y": given})


def test_other_masks_in_the_same_plan():
    case = make_routed(weights=hard_weights)
    other = soft_weights(2, 3, 40, torch.Generator().manual_seed(5))
    plan, given = ContextPlan(case["weights"]), case["y"].clone()
    plan.update(other)
    planned = {"weights": plan.weights, "adapter_index": plan.context_index, "plan": plan}
    assert_routed(routed_lora(**case | planned), case | {"y": given, "weights": other})
