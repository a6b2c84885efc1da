"""The Triton kernel of `routed_lora`, interpreted on the CPU, against float64."""

from __future__ import annotations

import pytest
import torch

from operations.cases import soft_weights
from operations.interpreted import as_on_a_gpu, lora_interpreted, needs_interpreter, with_wide_offsets
from operations.lora_cases import (
    assert_dead_untouched,
    assert_within_twice_eager,
    fresh,
    make_lora,
    part,
    poison_dead,
    truth,
)
from operations.test_routed_lora_op import few

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
MAP = {"size": (4, 6), "c": 9, "o": 10, "s": 2}


def check(tile=16, **shape):
    config = {name: shape.pop(name) for name in ("inputs", "outputs", "programs") if name in shape}
    case = make_lora(**shape)
    assert_within_twice_eager(lora_interpreted(fresh(case), tile, **config), case)


@DTYPES
@pytest.mark.parametrize("ranks", [(1,), (16,), (17, 1), (3, 0, 128)], ids=str)
def test_ranks(ranks, dtype):
    check(ranks=ranks, t=17, dtype=dtype)


@DTYPES
@pytest.mark.parametrize(("c", "o"), [(1, 1), (32, 64), (40, 130), (70, 33)])
def test_channels(c, o, dtype):
    check(c=c, o=o, t=17, s=2, dtype=dtype)


@pytest.mark.parametrize("programs", [1, 2, 100])
def test_outputs_are_parted_among_programs(programs):
    check(o=150, t=17, s=2, programs=programs)


@pytest.mark.parametrize("s", [1, 7, 63, 70])
def test_numbers_of_contexts(s):
    check(s=s, t=16, c=5, o=6, weights=soft_weights if s < 10 else sparse)


def sparse(b, s, t, rng):
    """Two contexts a token, out of many, the last among them."""
    weights = torch.zeros(b, s, t)
    weights.scatter_(1, torch.tensor([0, s - 1])[None, :, None].expand(b, 2, t), torch.randn(b, 2, t, generator=rng))
    return weights


@pytest.mark.parametrize("t", [1, 15, 16, 33])
@pytest.mark.parametrize("b", [1, 3], ids="rows-{}".format)
def test_token_counts(t, b):
    check(t=t, b=b, s=2)


@DTYPES
def test_sliced_views_and_an_index(dtype):
    check(strided=True, adapters=5, b=2, t=17, dtype=dtype, weights=soft_weights)


def test_channels_that_do_not_lie_side_by_side():
    case = make_lora(t=17, s=2)
    turned = {name: case[name].mT.contiguous().mT for name in ("y", "x")}
    assert_within_twice_eager(lora_interpreted(fresh(case | turned)), case)


@DTYPES
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "strided"])
@pytest.mark.parametrize(
    "layer",
    [{}, {"taps": 3, "padding": 1}, {"taps": 3, "padding": 1, "stride": 2}, {"taps": 3, "padding": 2, "dilation": 2}],
    ids=["1x1", "3x3", "3x3-stride", "3x3-dilated"],
)
def test_convolutions(layer, layout, dtype):
    check(**MAP, **layer, channels_last=layout == "channels-last", strided=layout == "strided", dtype=dtype)


def test_maps_of_one_row_and_of_one_column():
    for size in ((1, 9), (9, 1)):
        check(**MAP | {"size": size}, taps=3, padding=1)


def test_a_map_whose_places_are_not_evenly_spread_is_written_all_the_same():
    case = make_lora(**MAP, strided=True)
    assert case["y"].stride(2) != 6 * case["y"].stride(3)
    out = fresh(case)["y"]
    wide = part(out)
    lora_interpreted(case | {"y": wide})
    assert_within_twice_eager(wide, case)


@pytest.mark.parametrize("shape", [{"t": 60, "s": 2}, {**MAP, "taps": 3, "padding": 1}], ids=["linear", "3x3"])
def test_what_no_adapter_is_alive_on_is_neither_read_nor_written(shape):
    case = make_lora(**shape | {"b": 2, "weights": few, "ranks": (4,)})
    dead = poison_dead(case)
    assert_dead_untouched(lora_interpreted(case), dead)


@pytest.mark.parametrize("number", [-1, 1000, 2**40])
def test_a_number_out_of_range_is_nan_where_it_is_alive_and_reads_nothing(number):
    """Adapter 0, of no rank, is alive on the first half, adapter 1 on the second."""
    case = make_lora(s=2, t=32, indexed=True, ranks=(0, 4), weights=lambda b, s, t, rng: torch.zeros(b, s, t))
    case["weights"][0, 0, :16] = case["weights"][0, 1, 16:] = 1
    case["adapter_index"] = torch.tensor([[0, 1]])
    right = lora_interpreted(fresh(case))
    case["adapter_index"][0, 0] = number
    out = lora_interpreted(fresh(case))
    assert out[:, :16].isnan().all() and torch.equal(out[:, 16:], right[:, 16:])


def test_tile_sizes_agree():
    case = make_lora(t=40, s=2, weights=soft_weights)
    of_16, of_64 = (lora_interpreted(fresh(case), tile) for tile in (16, 64))
    torch.testing.assert_close(of_64, of_16, rtol=1e-5, atol=1e-6)


def test_tokens_in_another_order_give_the_same():
    case = make_lora(t=45, s=5)
    shuffle = torch.randperm(45, generator=torch.Generator().manual_seed(1))
    moved = case | {name: case[name][:, shuffle] for name in ("y", "x")} | {"weights": case["weights"][:, :, shuffle]}
    expected = lora_interpreted(fresh(case))[:, shuffle]
    torch.testing.assert_close(lora_interpreted(fresh(moved)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weight", [1e-4, 200.0])
def test_weights_at_the_ends_of_the_range_of_fp16(weight):
    check(t=16, s=2, dtype=torch.float16, weights=lambda b, s, t, rng: torch.full((b, s, t), weight))


@pytest.mark.parametrize("shape", [{"b": 2, "t": 17}, {**MAP, "taps": 3, "padding": 1}], ids=["linear", "3x3"])
def test_offsets_as_64_bits(shape, monkeypatch):
    """The variant for rows past 2**31 elements, on a small row."""
    needs_interpreter()
    from weaver_kernels.routed_lora import launch

    with_wide_offsets(monkeypatch, launch, at=-2)
    check(**shape)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=["kernel", "stacked"])
@pytest.mark.parametrize("with_plan", [False, True], ids=["no-plan", "plan"])
def test_what_runs_on_a_gpu_up_to_the_launch(with_plan, dtype, monkeypatch):
    """The GPU's implementation with the table's configuration for 8.6, on CPU tensors."""
    from weaver_kernels import ContextPlan
    from weaver_kernels.routed_lora import op

    as_on_a_gpu(monkeypatch, op)
    case = make_lora(b=2, t=70, adapters=5, dtype=dtype)
    of_case, adapters = ContextPlan(case["weights"], case["adapter_index"], merge=False), case["adapters"]
    assert len(of_case.tile_sizes) > 1
    y = case["y"].clone()
    tables = adapters.down, adapters.up, adapters.offsets, of_case.weights, of_case.context_index
    op._cuda(y, case["x"], *tables, of_case.lists if with_plan else None, adapters.most, 1, 0, 1)
    if dtype == torch.float64:
        torch.testing.assert_close(y, truth(case), rtol=1e-12, atol=1e-12)
    else:
        assert_within_twice_eager(y, case)


def test_nothing_to_compute_is_not_launched(monkeypatch):
    from weaver_kernels.routed_lora import op

    monkeypatch.setattr(op, "kernel_arch", lambda device: 86)
    monkeypatch.setattr(op, "_launch", None)
    for shape in ({"t": 0}, {"o": 0}):
        case = make_lora(**shape)
        adapters = case["adapters"]
        tables = adapters.down, adapters.up, adapters.offsets, case["weights"]
        op._cuda(case["y"], case["x"], *tables, None, None, adapters.most, 1, 0, 1)
