"""One attention map for several rows' values, against a map for each row."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from weaver_kernels import shared_attention, shared_attention_reference
from weaver_kernels.shared_attention import op


def make(rows=3, t=37, length=29, h=2, d=16, width=None, dtype=torch.float64):
    rng = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(*shape, generator=rng, dtype=torch.float64)
        for shape in ((1, t, h, d), (1, length, h, d), (rows, length, h, width or d))
    )
    return q.to(dtype), k.to(dtype), v.to(dtype)


def row_by_row(q, k, v, scale=None):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.cat([F.scaled_dot_product_attention(q, k, row[None], scale=scale) for row in v]).transpose(1, 2)


@pytest.mark.parametrize("shape", [{}, {"rows": 1, "t": 1, "length": 1}, {"rows": 5, "width": 7, "d": 40}], ids=str)
@pytest.mark.parametrize("scale", [None, 0.7])
def test_is_attention_row_by_row(shape, scale):
    case = make(**shape)
    expected = row_by_row(*case, scale)
    for attention in (shared_attention, shared_attention_reference):
        torch.testing.assert_close(attention(*case, scale=scale), expected, rtol=1e-12, atol=1e-12)


def test_blocks_of_queries_agree_with_the_whole(monkeypatch):
    case = make()
    whole = shared_attention(*case)
    monkeypatch.setitem(op._SETTINGS, "scores", 5 * 2 * 29)
    sizes = []
    product = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: sizes.append(a.shape[1]) or product(a, b))
    torch.testing.assert_close(shared_attention(*case), whole, rtol=1e-12, atol=1e-12)
    assert sizes == [5] * 7 + [2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_within_twice_eager(dtype):
    case = make(dtype=dtype, d=40)
    true = row_by_row(*(x.double() for x in case))
    ours, theirs = ((x.double() - true).abs().max() for x in (shared_attention(*case), row_by_row(*case)))
    assert ours <= 2 * theirs


def test_logits_beyond_the_range_of_fp16():
    q, k, v = make(dtype=torch.float16)
    out = shared_attention(q * 100, k * 100, v, scale=1.0)
    true = row_by_row(*(x.double() for x in (q * 100, k * 100, v)), scale=1.0)
    assert (out.double() - true).abs().max() < 1e-3


def test_views_of_wider_tensors():
    case = make()
    wide = [torch.full((*x.shape[:-1], 30), torch.nan, dtype=x.dtype) for x in case]
    for holder, x in zip(wide, case, strict=True):
        holder[..., 3:19] = x
    ours = shared_attention(*(holder[..., 3:19] for holder in wide))
    torch.testing.assert_close(ours, shared_attention(*case), rtol=1e-12, atol=1e-12)


def test_values_side_by_side_are_what_flex_attention_takes():
    """The arrangement for the GPU, with FlexAttention's own eager form."""
    case = make(dtype=torch.float32)
    compiled = torch.compile(lambda *x: op._flex(*x, 0.25, op.flex_blocks(90)), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*case), shared_attention_reference(*case), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("d", "width", "rows"),
    [(16, 16, [3]), (64, 64, [3]), (64, 96, [2, 1]), (80, 160, [1] * 3), (8, 16, []), (16, 8, []), (300, 16, [])],
    ids=str,
)
def test_what_flex_attention_is_handed(d, width, rows, monkeypatch):
    """A GPU's choice, on CPU tensors: values of at most 256 side by side, and no heads that FlexAttention refuses."""
    calls = []
    monkeypatch.setattr(op, "kernel_arch", lambda device: 90)
    monkeypatch.setattr(op, "_flex", lambda q, k, v, scale, blocks: calls.append(len(v)) or v)
    case = make(dtype=torch.float16, t=29, d=d, width=width)
    out = shared_attention(*case)
    assert calls == rows
    if not rows:
        torch.testing.assert_close(out, shared_attention_reference(*case), rtol=1e-2, atol=1e-3)


def test_blocks_of_flex_attention_are_the_tables(monkeypatch):
    """Its own choice follows the key width alone: at 64 it takes 256 KiB for values of 256, an H100 has 227."""
    given = []
    monkeypatch.setattr(op, "_compiled_flex", lambda: lambda q, k, v, **options: given.append(options) or v)
    monkeypatch.setattr(op, "kernel_arch", lambda device: 90)
    shared_attention(*make(dtype=torch.float16, t=29))
    assert (given[0]["kernel_options"]["BLOCK_M"], given[0]["kernel_options"]["BLOCK_N"]) == (128, 64)
    assert op.flex_blocks(90) != op.flex_blocks(86) == op.flex_blocks(121)


def test_every_size_is_compiled(monkeypatch):
    """PyTorch goes on uncompiled after 8 of them, with all scores in memory; here with something quick to compile."""
    compiled = []

    def attend(q, k, v, scale, kernel_options):
        return v * scale

    backend = torch.compile(attend, dynamic=False, backend=lambda graph, _: compiled.append(1) or graph.forward)
    monkeypatch.setattr(op, "_compiled_flex", lambda: backend)
    for n in range(1, 13):
        op._flex(*make(length=8 * n), 0.25, op.flex_blocks(90))
        assert len(compiled) == n


def test_compiles_in_one_graph():
    compiled = torch.compile(shared_attention, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*make()), shared_attention(*make()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(3, 4)}, r"must be \[1, T, H, D\]"),
        ({"q": torch.zeros(2, 37, 2, 16)}, "must have one row"),
        ({"q": torch.zeros(1, 37, 4, 8)}, r"q has \(heads, dim\) \(4, 8\)"),
        ({"v": torch.zeros(3, 28, 2, 16)}, r"v has \(keys, heads\) \(28, 2\)"),
        ({"v": torch.zeros(3, 29, 2, 16, dtype=torch.float16)}, "share a floating-point dtype"),
        ({"k": torch.zeros(1, 0, 2, 16), "v": torch.zeros(3, 0, 2, 16)}, "there are no keys"),
        (dict.fromkeys("qkv", torch.zeros(1, 29, 2, 0)), "no keys, heads or dimensions"),
        ({"scale": -1.0}, "scale must be positive"),
        ({"v": torch.zeros(3, 29, 2, 16, requires_grad=True)}, "inference only, and v requires grad"),
    ],
    ids=["axes", "rows", "heads", "keys", "dtype", "none", "no-dim", "scale", "gradients"],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        shared_attention(**dict(zip("qkv", make(dtype=torch.float32), strict=True)) | change)


def test_two_rows_of_queries_are_refused_by_the_reference_too():
    q, k, v = make(dtype=torch.float32)
    with pytest.raises(ValueError, match="must have one row"):
        shared_attention_reference(q.expand(2, -1, -1, -1), k, v)


def test_autocast_of_the_caller_rounds_nothing():
    q, k, v = make(dtype=torch.float32)
    expected = shared_attention(q, k, v), shared_attention_reference(q, k, v)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = shared_attention(q, k, v), shared_attention_reference(q, k, v)
    assert all(map(torch.equal, found, expected))
