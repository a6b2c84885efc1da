"""`routed_lora` as it is called: the live-token implementation, its registration, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from operations.cases import assert_compiled_once, soft_weights
from operations.lora_cases import (
    assert_dead_untouched,
    assert_within_twice_eager,
    fresh,
    make_lora,
    part,
    planned,
    poison_dead,
    truth,
)
from weaver_kernels import AdapterStack, ContextPlan, LowRank, routed_lora, routed_lora_reference
from weaver_kernels.routed_lora import live, maps

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
MAP = {"size": (11, 13), "c": 6, "o": 10, "b": 2}
SHAPES = {
    "plain": {"t": 300, "s": 5},
    "one-token": {"t": 1, "c": 8, "s": 1},
    "seventy": {"t": 144, "s": 70, "c": 9, "weights": soft_weights},
    "strided": {"b": 3, "t": 130, "adapters": 9, "strided": True, "weights": soft_weights},
    "ranks-to-128": {"b": 2, "t": 67, "ranks": (128, 1, 64, 17), "s": 4, "c": 130, "o": 70},
    "rank-300": {"t": 90, "ranks": (300, 2), "s": 2, "c": 20, "o": 30, "weights": soft_weights},
    "1x1": {**MAP, "weights": soft_weights},
    "1x1-channels-last": {**MAP, "channels_last": True},
    "1x1-padded": {**MAP, "padding": 1},
    "3x3": {**MAP, "taps": 3, "padding": 1},
    "3x3-stride": {**MAP, "taps": 3, "padding": 1, "stride": 2, "weights": soft_weights},
    "3x3-dilated": {**MAP, "taps": 3, "padding": 2, "dilation": 2},
    "4x4-far-outside": {**MAP, "taps": 4, "padding": 6, "stride": 3},
    "3x3-channels-last": {**MAP, "taps": 3, "padding": 1, "channels_last": True, "adapters": 7},
    "3x3-strided": {**MAP, "taps": 3, "padding": 1, "strided": True},
}


def few(b, s, t, rng):
    """Each context on a few tokens side by side, the last row on none."""
    weights = torch.zeros(b, s, t)
    for row in range(b - 1 or 1):
        for slot in range(s):
            start = int(torch.randint(0, t, (1,), generator=rng))
            weights[row, slot, start : start + max(t // 8, 1)] = torch.randn(1, generator=rng)
    return weights


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["together", "on-all", "gathered", "3x3", "1x1-channels-last"])
def test_adapters_that_cancel_are_summed_before_they_are_rounded(how, dtype, monkeypatch):
    rng, taps = torch.Generator().manual_seed(0), {"3x3": (3, 3), "1x1-channels-last": (1, 1)}.get(how, ())
    calls = live.config_table("live_lora") | {"call": 10**12 if how == "together" else -1}
    monkeypatch.setattr(live, "config_table", lambda name: calls)
    x, y = torch.randn(2, 1, 8, 20, 20, generator=rng).to(dtype)
    if "last" in how:
        x, y = (one.to(memory_format=torch.channels_last) for one in (x, y))
    elif not taps:
        x, y = (one.flatten(2).mT for one in (x, y))
    down, up = torch.randn(3, 8, *taps, generator=rng).to(dtype), torch.randn(8, 3, generator=rng).to(dtype)
    almost = up + 0.01 * torch.randn(8, 3, generator=rng).to(dtype)
    pairs = [LowRank(down, one.view(8, 3, *(1 for _ in taps))) for one in (up, -almost)]
    adapters, weights = AdapterStack.of(pairs).to(dtype=dtype), torch.ones(1, 2, 400)
    if how == "gathered":
        weights[:, :, 100:] = 0
    around = {"padding": 1} if how == "3x3" else {}
    wide = adapters.to(dtype=torch.float64)
    expected = routed_lora_reference(y.double(), x.double(), wide, weights, **around)
    once = expected.abs() * torch.finfo(dtype).eps / 2
    found = routed_lora(y.clone(memory_format=torch.preserve_format), x, adapters, weights, **around)
    assert ((found.double() - expected).abs() <= once + 1e-5).all()


@DTYPES
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_within_twice_eager(shape, dtype):
    case = make_lora(**shape, dtype=dtype)
    assert_within_twice_eager(routed_lora(**fresh(case)), case)
    assert_within_twice_eager(routed_lora(**planned(fresh(case))), case)


@pytest.mark.parametrize("together", [-1, 10**12], ids=["by-themselves", "together"])
@pytest.mark.parametrize("weights", [few, soft_weights], ids=["few", "soft"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_float64_is_the_reference(shape, weights, together, monkeypatch):
    settings = live.config_table("live_lora")
    monkeypatch.setattr(live, "config_table", lambda name: settings | {"call": together, "numbers": 700, "spare": 3})
    case = make_lora(**shape | {"weights": weights}, dtype=torch.float64)
    for arguments in (fresh(case), planned(fresh(case))):
        torch.testing.assert_close(routed_lora(**arguments), truth(case), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_all_ranks_on_all_tokens_is_the_same(shape):
    """What a GPU computes where the kernel can't take the ranks."""
    case = make_lora(**shape, dtype=torch.float64)
    y, stack = case["y"].clone(), case["adapters"]
    around = [case.get(name, default) for name, default in (("stride", 1), ("padding", 0), ("dilation", 1))]
    tables, index = (stack.down, stack.up, stack.offsets), case.get("adapter_index")
    live.stacked_routed_lora(y, case["x"], *tables, case["weights"].double(), index, *around)
    torch.testing.assert_close(y, truth(case), rtol=1e-12, atol=1e-12)


def test_y_itself_is_written_and_given_back():
    case = fresh(make_lora())
    before = case["y"].clone()
    assert routed_lora(**case) is case["y"] and not torch.equal(case["y"], before)


@pytest.mark.parametrize("shape", [SHAPES["plain"], SHAPES["3x3"]], ids=["linear", "3x3"])
def test_what_no_adapter_is_alive_on_is_not_touched(shape):
    """Nor is it read, and a row without any costs no product."""
    case = make_lora(**shape | {"b": 2, "weights": few})
    dead = poison_dead(case)
    assert_dead_untouched(routed_lora(**planned(case)), dead)


def test_all_weights_zero_and_nothing_there():
    for shape in ({"t": 0}, {"b": 0}, {}, {"ranks": (0, 0, 5)}):
        case = make_lora(**shape, weights=lambda b, s, t, rng: torch.zeros(b, s, t))
        if "ranks" in shape:
            case["weights"][:, :2] = 1
        assert torch.equal(routed_lora(**fresh(case)), case["y"])


@pytest.mark.parametrize("shape", [{}, {**MAP, "taps": 3, "padding": 1}, MAP], ids=["linear", "3x3", "1x1"])
def test_one_adapter_over_everything_is_the_layer_with_merged_weights(shape):
    case = make_lora(**shape, s=1, ranks=(8,), dtype=torch.float64, weights=lambda b, s, t, rng: torch.ones(b, s, t))
    x, (down, up) = case["x"], (case["adapters"].down, case["adapters"].up)
    weight = torch.randn(up.shape[1], *down.shape[1:], dtype=torch.float64)
    merged = weight + torch.einsum("ro,r...->o...", up, down)
    layer = F.linear if x.ndim == 3 else lambda x, weight: F.conv2d(x, weight, padding=case["padding"])
    out = routed_lora(**case | {"y": layer(x, weight)})
    torch.testing.assert_close(out, layer(x, merged), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "shape", [{"t": 60}, {**MAP, "size": (12, 10), "taps": 3, "padding": 1}], ids=["linear", "3x3"]
)
def test_only_live_tokens_are_computed(shape, monkeypatch):
    """Twice as many adapters on half of the tokens each take as many products."""
    settings = live.config_table("live_lora")
    monkeypatch.setattr(live, "config_table", lambda name: settings | {"call": -1, "dense_tokens": 0, "spare": 0})
    multiplied = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b: multiplied.append(a.numel() * b.shape[1]) or mm(a, b))

    def products(n):
        def side_by_side(b, s, t, rng):
            return (torch.arange(t) * n // t == torch.arange(n)[:, None]).float().expand(b, -1, -1)

        multiplied.clear()
        routed_lora(**make_lora(**shape, s=n, ranks=(4,), weights=side_by_side))
        return sum(multiplied)

    assert products(12) == products(6) == products(2)


def test_an_adapter_on_most_tokens_is_not_gathered(monkeypatch):
    case = make_lora(s=1, t=100)
    case["weights"][0, 0, :5] = 0
    monkeypatch.setattr(torch.Tensor, "index_add_", None)
    assert_within_twice_eager(routed_lora(**fresh(case)), case)


def test_boxes_hold_what_is_alive_and_little_else():
    alive = torch.zeros(40, 30, dtype=torch.bool)
    alive[3:20, 2:9] = alive[30:34, 20:28] = True
    found = maps.boxes(alive, 20)
    assert found == [(3, 20, 2, 9), (30, 34, 20, 28)]
    assert maps.boxes(alive[:2], 20) == []


def test_equal_adapters_are_merged_by_the_plan():
    case = make_lora(s=4, ranks=(5,), dtype=torch.float64, weights=soft_weights)
    case["adapters"] = AdapterStack.of([LowRank(torch.randn(5, 24), torch.randn(20, 5))] * 4).to(dtype=torch.float64)
    case["weights"] = case["weights"].double()
    merged = planned(fresh(case))
    merged["plan"].update(case["weights"], None, torch.zeros(4, dtype=torch.int64))
    assert (merged["weights"] != 0).any(-1).sum() == 1
    torch.testing.assert_close(routed_lora(**merged), truth(case), rtol=1e-12, atol=1e-12)


def test_tokens_in_another_order_give_the_same():
    case = make_lora(t=45, s=5, dtype=torch.float64)
    shuffle = torch.randperm(45, generator=torch.Generator().manual_seed(1))
    moved = {name: case[name][:, shuffle] for name in ("y", "x")} | {"weights": case["weights"][:, :, shuffle]}
    torch.testing.assert_close(routed_lora(**case | moved), truth(case)[:, shuffle], rtol=1e-12, atol=1e-12)


def test_a_stack_has_the_factors_side_by_side():
    a, b = LowRank(torch.randn(2, 5), torch.randn(7, 2)), LowRank(torch.randn(3, 5).half(), torch.randn(7, 3).half())
    stack = AdapterStack.of([a, None, b], scales=[2.0, 9.0, 0.5])
    assert (len(stack), stack.starts, stack.most, stack.down.dtype) == (3, (0, 2, 2, 5), 3, torch.float32)
    assert torch.equal(stack.down, torch.cat([a.down, b.down.float()])) and stack.up.is_contiguous()
    assert torch.equal(stack.up, torch.cat([2 * a.up.T, 0.5 * b.up.float().T]))
    half = stack.to(dtype=torch.float16)
    assert half.down.dtype == half.up.dtype == torch.float16 and half.offsets.tolist() == [0, 2, 2, 5]
    conv = AdapterStack.of([LowRank(torch.randn(4, 6, 3, 3), torch.randn(8, 4, 1, 1))])
    assert conv.up.shape == (4, 8) and conv.down.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("factors", "scales", "message"),
    [
        ([None, None], None, "at least one adapter"),
        ([LowRank(torch.zeros(2, 5), torch.zeros(7, 3))], None, r"adapter 0 must be .* \(2, 5\) and up \(7, 3\)"),
        ([LowRank(torch.zeros(0, 5), torch.zeros(7, 0))], None, "rank 0: None is one that changes nothing"),
        ([LowRank(torch.zeros(2, 5), torch.zeros(7, 2))], [1.0, 2.0], "1 factors and 2 scales"),
        (
            [LowRank(torch.zeros(2, 5), torch.zeros(7, 2)), LowRank(torch.zeros(2, 6), torch.zeros(7, 2))],
            None,
            "1 is of",
        ),
        ([LowRank(torch.zeros(2, 5).int(), torch.zeros(7, 2))], None, "floating-point, got torch.int32"),
    ],
    ids=["none", "shapes", "rank", "scales", "another-layer", "dtype"],
)
def test_factors_that_make_no_stack(factors, scales, message):
    with pytest.raises(ValueError, match=message):
        AdapterStack.of(factors, scales)


@pytest.mark.parametrize("stacks", [[], [3, 1]])
def test_nothing_can_be_joined_of_no_stack(stacks):
    with pytest.raises(ValueError, match="no stack to join"):
        AdapterStack.joined(stacks)


@pytest.mark.parametrize("with_plan", [False, True], ids=["no-plan", "plan"])
@pytest.mark.parametrize("shape", [{"strided": True}, {**MAP, "taps": 3, "padding": 1}], ids=["linear", "3x3"])
def test_opcheck(shape, with_plan):
    case = make_lora(**{"b": 2, **shape}, adapters=4)
    plan, adapters = ContextPlan(case["weights"], case["adapter_index"]), case["adapters"]
    around = [case.get(name, default) for name, default in (("stride", 1), ("padding", 0), ("dilation", 1))]
    tensors = case["y"], case["x"], adapters.down, adapters.up, adapters.offsets, plan.weights, plan.context_index
    operation = torch.ops.weaver_kernels.routed_lora.default
    torch.library.opcheck(operation, (*tensors, plan.lists if with_plan else None, adapters.most, *around))


@pytest.mark.parametrize("with_plan", [False, True], ids=["no-plan", "plan"])
def test_compiles_in_one_graph_and_not_again_for_other_masks(with_plan):
    torch._dynamo.reset()
    compiled = torch.compile(lambda y, **others: routed_lora(y * 1, **others) * 1, backend="aot_eager", fullgraph=True)
    case = make_lora(b=2, adapters=4, t=50)
    assert_compiled_once(
        compiled, planned(case) if with_plan else case, case, "adapter_index", assert_within_twice_eager
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapters": None}, "must be an AdapterStack, got a NoneType"),
        ({"x": torch.zeros(1, 24, 5, 8)}, r"those of a Linear: \[B, T, C\]"),
        ({"x": torch.zeros(1, 40, 25)}, "take 24 channels to 20, x and y have 25 and 20"),
        ({"x": torch.zeros(1, 41, 24)}, r"x \(1, 41, 24\) and y \(1, 40, 20\) do not go with weights"),
        ({"x": torch.zeros(1, 40, 24).half()}, "share a floating-point dtype"),
        ({"x": torch.zeros(1, 40, 24, device="meta")}, "several devices: cpu, meta"),
        ({"weights": torch.zeros(1, 3, 40, dtype=torch.int32)}, "weights must be .* torch.int32"),
        ({"weights": torch.zeros(1, 2, 40)}, "weights have 2 contexts and there are 3 adapters"),
        ({"stride": 2}, "a Linear has no stride"),
        ({"stride": 0}, "must be 1 or more"),
        ({"adapter_index": torch.zeros(1, 3)}, "adapter_index must be .* integers"),
        ({"adapter_index": torch.full((1, 3), 3)}, "lie in 0..2"),
        ({"adapter_index": torch.full((1, 3), -1)}, "lie in 0..2"),
        ({"y": torch.zeros(1, 40, 20, requires_grad=True)}, "inference only, and y requires grad"),
        ({"plan": ContextPlan(torch.ones(1, 3, 40), capacity=4)}, "pass plan.weights"),
        ({"plan": ContextPlan(torch.ones(1, 3, 40), tile_sizes=(16,))}, r"tiles of \[16\] of its own"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        routed_lora(**make_lora() | change)


def test_bad_maps():
    case = make_lora(**MAP, taps=3, padding=1)
    with pytest.raises(ValueError, match="gives a map of 9 x 11, y is .2, 10, 11, 13."):
        routed_lora(**case | {"padding": 0})
    with pytest.raises(ValueError, match="y .* does not go with weights"):
        routed_lora(**case | {"weights": torch.zeros(2, 3, 144)})
    with pytest.raises(ValueError, match="those of a convolution"):
        routed_lora(**case | {"x": torch.zeros(2, 143, 6)})


@pytest.mark.parametrize("channels", [20, 24], ids=["all", "more"])
def test_x_and_y_of_one_memory_are_refused(channels):
    case, memory = make_lora(c=channels), torch.zeros(1, 40, 24)
    x, y = memory[..., :channels], memory[..., :20]
    for one, other in ((x, x), (x[:], x[:]), (x, y)):
        with pytest.raises(ValueError, match="y and x are one memory"):
            routed_lora(**case | {"x": one, "y": other})


def test_x_and_y_may_lie_side_by_side_in_one_memory():
    case, memory = make_lora(c=20), torch.zeros(1, 40, 40)
    beside = case | {"x": memory[..., :20].copy_(case["x"]), "y": memory[..., 20:].copy_(case["y"])}
    assert torch.equal(routed_lora(**beside), routed_lora(**case))


@pytest.mark.parametrize("foreign", ["weights", "adapter_index"])
def test_a_plan_takes_no_weights_and_no_index_but_its_own(foreign):
    case = planned(make_lora(adapters=4))
    with pytest.raises(ValueError, match="plan is of other weights or of another index"):
        routed_lora(**case | {foreign: case[foreign].clone()})


def test_gradients_elsewhere_are_nobodys_business():
    case = make_lora()
    case["x"].requires_grad_()
    with torch.no_grad():
        assert_within_twice_eager(routed_lora(**fresh(case)), case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [{"t": 256}, {**MAP, "taps": 3, "padding": 1}], ids=["linear", "3x3"])
def test_autocast_of_the_caller_rounds_nothing(shape, dtype):
    case = make_lora(**shape, dtype=dtype)
    expected = routed_lora(**fresh(case)), routed_lora_reference(**case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = routed_lora(**fresh(case)), routed_lora_reference(**case)
    assert all(map(torch.equal, found, expected))


def test_a_slice_of_channels_is_written_in_place():
    case = make_lora()
    wide = part(case["y"])
    routed_lora(**case | {"y": wide})
    assert_within_twice_eager(wide, case)
