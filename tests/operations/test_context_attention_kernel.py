"""The Triton kernel, interpreted on the CPU, against float64."""

from __future__ import annotations

import re
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from operations.cases import assert_within_twice_eager, make_case, soft_weights
from operations.interpreted import as_on_a_gpu, interpreter_fault, needs_interpreter, run_interpreted, with_wide_offsets

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])


def check(tile=16, **shape):
    case = make_case(**shape)
    assert_within_twice_eager(run_interpreted(case, tile), case)


@DTYPES
@pytest.mark.parametrize("d", [40, 64])
def test_queries_that_are_read_again_for_every_context(d, dtype):
    """Shared ones, which a configuration may send through the pipeline with keys and values."""
    case = make_case(b=2, t=40, h=2, d=d, length=77, s=3, dtype=dtype, weights=soft_weights)
    assert_within_twice_eager(run_interpreted(case, reload=True), case)


@DTYPES
@pytest.mark.parametrize("d", [8, 24, 40, 64, 80, 160, 256])
def test_head_dims(d, dtype):
    check(d=d, t=19, length=77, dtype=dtype)


@DTYPES
@pytest.mark.parametrize("length", [1, 16, 33, 77, 100, 128, 130, 154])
def test_text_lengths(length, dtype):
    check(length=length, t=17, s=2, dtype=dtype)


@DTYPES
@pytest.mark.parametrize("length", [80, 81, 128])
def test_keys_of_wide_heads_that_do_not_fit_at_once(length, dtype):
    check(length=length, t=17, s=2, d=160, dtype=dtype)


@pytest.mark.parametrize("length", [20, 77, 150], ids="of-{}".format)
@pytest.mark.parametrize("weights", [None, soft_weights], ids=["hard", "soft"])
def test_ragged_contexts_one_of_them_empty(length, weights):
    check(length=length, ragged=True, b=2, t=17, **({"weights": weights} if weights else {}))


@pytest.mark.parametrize("s", [1, 2, 7, 63, 70])
def test_numbers_of_contexts(s):
    check(s=s, t=16, length=5, weights=soft_weights if s < 10 else sparse)


def sparse(b, s, t, rng):
    """Two contexts a token, out of many, the last among them."""
    weights = torch.zeros(b, s, t)
    weights.scatter_(1, torch.tensor([0, s - 1])[None, :, None].expand(b, 2, t), torch.randn(b, 2, t, generator=rng))
    return weights


@pytest.mark.parametrize("t", [1, 15, 16, 33])
@pytest.mark.parametrize("b", [1, 3], ids="rows-{}".format)
def test_token_counts(t, b):
    check(t=t, b=b, s=2, length=9)


@DTYPES
@pytest.mark.parametrize("q_each", [False, True], ids=["shared-q", "q-each"])
def test_sliced_views_and_an_index(q_each, dtype):
    check(q_each=q_each, strided=True, contexts=5, b=2, h=2, d=40, t=17, length=18, dtype=dtype)


def test_views_of_the_layout_of_a_unet():
    """[B, T, H * D] projections as heads, keys and values as two halves of one product."""
    case = make_case(h=3, d=8, t=20)
    both = torch.stack([case["k"], case["v"]], dim=2)  # [S', L, 2, H, D]
    case |= {"k": both[:, :, 0], "v": both[:, :, 1], "q": case["q"].flatten(-2).unflatten(-1, (3, 8))}
    assert_within_twice_eager(run_interpreted(case), case)


def test_all_weights_zero_is_zero():
    case = make_case(b=2)
    case["weights"].zero_()
    assert torch.equal(run_interpreted(case), torch.zeros_like(case["q"]))


def test_contexts_that_are_alive_nowhere_are_not_read():
    case = make_case(s=4)
    whole = run_interpreted(case)
    case["weights"][:, 1] = 0
    case["k"][1] = case["v"][1] = torch.nan
    rest = run_interpreted(case)
    assert torch.isfinite(rest).all() and not torch.equal(whole, rest)


@pytest.mark.parametrize("name", ["context_index", "key_lengths"])
@pytest.mark.parametrize("number", [-1, 1000, 2**40])
def test_a_number_out_of_range_makes_nan_of_its_tiles_and_reads_nothing(number, name):
    """Context 0 is alive on the first tile but for its last token, context 1 on that and on the second."""
    case = make_case(s=2, t=32, indexed=True, weights=lambda b, s, t, rng: torch.zeros(b, s, t))
    case["weights"][0, 0, :15] = case["weights"][0, 1, 15:] = 1
    case |= {"context_index": torch.tensor([[0, 1]]), "key_lengths": torch.tensor([20, 20])}
    right = run_interpreted(case)
    case[name].flatten()[0] = number
    out = run_interpreted(case)
    assert out[:, :16].isnan().all() and torch.equal(out[:, 16:], right[:, 16:])


@pytest.mark.parametrize("tile", [32, 64], ids="of-{}".format)
def test_tile_sizes_agree(tile):
    case = make_case(t=40, s=2, length=12, weights=soft_weights, b=2)
    torch.testing.assert_close(run_interpreted(case, tile), run_interpreted(case, 16), rtol=1e-5, atol=1e-6)


def test_tokens_in_another_order_give_the_same():
    case = make_case(t=45, s=5, length=12)
    shuffle = torch.randperm(45, generator=torch.Generator().manual_seed(1))
    moved = case | {"q": case["q"][:, shuffle], "weights": case["weights"][:, :, shuffle]}
    torch.testing.assert_close(run_interpreted(moved), run_interpreted(case)[:, shuffle], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [77, 150], ids=["one-pass", "two-passes"])
def test_logits_beyond_the_range_of_fp16(length):
    case = make_case(length=length, t=17, d=64, amplitude=60.0, dtype=torch.float16) | {"scale": 1.0}
    logits = torch.einsum("bthd,slhd->bshtl", case["q"].double(), case["k"].double())
    assert logits.abs().max() > torch.finfo(torch.float16).max
    assert_within_twice_eager(run_interpreted(case), case)


@pytest.mark.parametrize("scale", [0.01, 3.0])
def test_scale(scale):
    case = make_case() | {"scale": scale}
    assert_within_twice_eager(run_interpreted(case), case)


def test_offsets_of_tokens_as_64_bits(monkeypatch):
    """The variant for rows past 2**31 elements, on a small row."""
    needs_interpreter()
    from weaver_kernels.context_attention import launch

    with_wide_offsets(monkeypatch, launch, at=-3)
    check(b=2, d=40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["kernel", "gathered"])
@pytest.mark.parametrize("planned", [False, True], ids=["no-plan", "plan"])
def test_what_runs_on_a_gpu_up_to_the_launch(planned, dtype, monkeypatch):
    """The GPU's implementation with the table's configuration for 8.6, on CPU tensors."""
    from weaver_kernels import ContextPlan
    from weaver_kernels.context_attention import op

    as_on_a_gpu(monkeypatch, op)
    case = make_case(b=2, t=70, d=40, contexts=5, length=9, dtype=dtype)
    of_case = ContextPlan(case["weights"], case["context_index"], merge=False)
    assert len(of_case.tile_sizes) > 1
    arguments = (case["q"].transpose(2, 3).contiguous().transpose(2, 3), case["k"], case["v"], of_case.weights)
    out = op._cuda(*arguments, of_case.context_index, None, of_case.lists if planned else None, 40**-0.5)
    assert_within_twice_eager(out, case)


@pytest.mark.parametrize("lengths", [torch.tensor([[9, 1], [3, 2], [5, 4]])[:, 0], torch.tensor([7]).expand(3)])
def test_lengths_that_do_not_lie_side_by_side(lengths, monkeypatch):
    from weaver_kernels.context_attention import op

    needs_interpreter()
    monkeypatch.setattr(op, "kernel_arch", lambda device: 86)
    case = make_case(t=16, d=16, s=3, length=9)
    case["key_lengths"] = lengths
    out = op._cuda(case["q"], case["k"], case["v"], case["weights"], None, lengths, None, 0.25)
    assert_within_twice_eager(out, case)


def test_nothing_to_compute_is_not_launched(monkeypatch):
    from weaver_kernels.context_attention import op

    monkeypatch.setattr(op, "kernel_arch", lambda device: 86)
    for shape in ({"t": 0}, {"length": 0}):
        case = make_case(**shape)
        out = op._cuda(case["q"], case["k"], case["v"], case["weights"], None, None, None, 0.25)
        assert torch.equal(out, torch.zeros_like(case["q"]))


@pytest.mark.parametrize("weight", [1e-4, -1e-3, 200.0])
@pytest.mark.parametrize("length", [77, 150], ids=["one-pass", "two-passes"])
def test_weights_at_the_ends_of_the_range_of_fp16(weight, length):
    """A share of a weight for each of 77 keys is below float16's normal numbers, which the kernel must not round to."""
    weights = {"weights": lambda b, s, t, rng: torch.full((b, s, t), weight)}
    check(t=16, s=2, length=length, d=64, dtype=torch.float16, **weights)


def test_the_versions_that_are_pinned_can_interpret():
    """Or every test here would be skipped where nobody looks."""
    pinned = re.search(r"^numpy==(.+)$", (Path(__file__).parents[2] / "constraints.txt").read_text(), re.MULTILINE)
    if metadata.version("numpy") == pinned.group(1) and find_spec("triton"):
        assert interpreter_fault() == ""


def test_versions_that_cannot_interpret_are_named():
    assert "numpy before 2.4" in interpreter_fault("3.6.0", "2.5.2")
    assert interpreter_fault("3.6.0", "2.3.5") == interpreter_fault("3.8.0", "2.4.6") == ""
