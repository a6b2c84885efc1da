"""The Triton kernel of `context_attention`: a program computes one tile of tokens of one head of one row.

It walks the list of the contexts alive on its tile with one accumulator for all of them: a context's softmax is
finished before its values are added, so its weight goes into the probabilities, `O += (w p / l) V`. Names: `i_` which
program, `o_` offsets, `b_` a block in registers, `p_` a pointer to where a block begins.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["context_attention_kernel"]


@triton.jit
def _base(pointer, i, stride, ALIGN: tl.constexpr):
    """Where item i begins. Without the hint D = 40 loses its wide copies and spills: 40 is no multiple of 16."""
    return pointer + tl.multiple_of(i.to(tl.int64) * stride, ALIGN)


@triton.jit
def _rows(o_row, stride, ALIGN: tl.constexpr):
    """Where rows begin. Without the hint an odd number of heads of 40 has no wide copies: 120 is no multiple of 16."""
    return tl.multiple_of(o_row * stride, ALIGN)[:, None]


@triton.jit
def _load(
    p_x, o_row, stride_row, row_ok, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, ALIGN: tl.constexpr
):
    """Columns FIRST .. FIRST + WIDTH of the rows `o_row`, zero where a row is not ok and past column D."""
    o_d = FIRST + tl.arange(0, WIDTH)
    ok = row_ok[:, None]
    if FIRST + WIDTH > D:
        ok = ok & (o_d < D)[None, :]
    return tl.load(p_x + _rows(o_row, stride_row, ALIGN) + o_d[None, :], mask=ok, other=0.0)  # [rows, WIDTH]


@triton.jit
def _scores(
    b_q1, b_q2, p_k, o_l, n_keys, stride_l,
    WHOLE: tl.constexpr, L: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q K^T, not yet scaled, float32 [BT, BL], -inf for keys from n_keys on; WHOLE: there are none."""
    l_ok = o_l < L  # keys past n_keys are there and may be read: a mask known in advance takes fewer registers
    b_k1 = _load(p_k, o_l, stride_l, l_ok, 0, D1, D, ALIGN)
    b_s = tl.dot(b_q1, tl.trans(b_k1), input_precision=PRECISION)
    if D2 > 0:
        b_k2 = _load(p_k, o_l, stride_l, l_ok, D1, D2, D, ALIGN)
        b_s = tl.dot(b_q2, tl.trans(b_k2), b_s, input_precision=PRECISION)
    if not WHOLE:
        b_s = tl.where((o_l < n_keys)[None, :], b_s, float("-inf"))
    return b_s


@triton.jit
def _add_values(
    b_o1, b_o2, b_p, p_v, o_l, n_keys, stride_l,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """O + P V, with P [BT, BL] in V's type."""
    l_ok = o_l < n_keys
    b_v1 = _load(p_v, o_l, stride_l, l_ok, 0, D1, D, ALIGN)
    b_p = b_p.to(b_v1.dtype)
    b_o1 = tl.dot(b_p, b_v1, b_o1, input_precision=PRECISION)
    if D2 > 0:
        b_v2 = _load(p_v, o_l, stride_l, l_ok, D1, D2, D, ALIGN)
        b_o2 = tl.dot(b_p, b_v2, b_o2, input_precision=PRECISION)
    return b_o1, b_o2


@triton.jit
def _attend_once(
    b_o1, b_o2, b_q1, b_q2, b_w, p_k, p_v, n_keys, stride_kl, stride_vl, scale,
    L: tl.constexpr, L1: tl.constexpr, L2: tl.constexpr, RAGGED: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add a context whose keys fit in registers, as blocks of L1 and L2: their scores are computed once."""
    o_l1 = tl.arange(0, L1)
    WHOLE1: tl.constexpr = not RAGGED and L1 <= L
    b_s1 = _scores(b_q1, b_q2, p_k, o_l1, n_keys, stride_kl, WHOLE1, L, D, D1, D2, ALIGN, PRECISION)
    b_m = tl.max(b_s1, 1)
    if L2 > 0:
        o_l2 = L1 + tl.arange(0, L2)
        WHOLE2: tl.constexpr = not RAGGED and L1 + L2 <= L
        b_s2 = _scores(b_q1, b_q2, p_k, o_l2, n_keys, stride_kl, WHOLE2, L, D, D1, D2, ALIGN, PRECISION)
        b_m = tl.maximum(b_m, tl.max(b_s2, 1))
    b_m = tl.maximum(b_m * scale, -1e30)  # no key at all: exp2(-inf - m) is then 0, not NaN
    b_p1 = tl.exp2(b_s1 * scale - b_m[:, None])
    b_l = tl.sum(b_p1, 1)
    if L2 > 0:
        b_p2 = tl.exp2(b_s2 * scale - b_m[:, None])
        b_l += tl.sum(b_p2, 1)
    b_g = (b_w / tl.where(b_l > 0, b_l, 1.0))[:, None]
    b_o1, b_o2 = _add_values(b_o1, b_o2, b_p1 * b_g, p_v, o_l1, n_keys, stride_vl, D, D1, D2, ALIGN, PRECISION)
    if L2 > 0:
        b_o1, b_o2 = _add_values(b_o1, b_o2, b_p2 * b_g, p_v, o_l2, n_keys, stride_vl, D, D1, D2, ALIGN, PRECISION)
    return b_o1, b_o2


@triton.jit
def _attend_twice(
    b_o1, b_o2, b_q1, b_q2, b_w, p_k, p_v, n_keys, stride_kl, stride_vl, scale,
    L: tl.constexpr, LC: tl.constexpr, L1: tl.constexpr, L2: tl.constexpr, BT: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add a context of many keys, LC at a time: maxima and sums first, then the scores again and the values.

    Computing scores twice is what leaves one accumulator for all contexts.
    """
    b_m = tl.full([BT], -1e30, tl.float32)
    b_l = tl.full([BT], 0.0, tl.float32)
    for i_c in range(tl.cdiv(n_keys, LC)):
        end = tl.minimum(i_c * LC + LC, n_keys)
        o_l1 = i_c * LC + tl.arange(0, L1)
        b_s1 = _scores(b_q1, b_q2, p_k, o_l1, end, stride_kl, False, L, D, D1, D2, ALIGN, PRECISION)
        b_new = tl.maximum(b_m, tl.max(b_s1, 1) * scale)
        if L2 > 0:
            o_l2 = i_c * LC + L1 + tl.arange(0, L2)
            b_s2 = _scores(b_q1, b_q2, p_k, o_l2, end, stride_kl, False, L, D, D1, D2, ALIGN, PRECISION)
            b_new = tl.maximum(b_new, tl.max(b_s2, 1) * scale)
        b_l = b_l * tl.exp2(b_m - b_new) + tl.sum(tl.exp2(b_s1 * scale - b_new[:, None]), 1)
        if L2 > 0:
            b_l += tl.sum(tl.exp2(b_s2 * scale - b_new[:, None]), 1)
        b_m = b_new
    b_g = (b_w / tl.where(b_l > 0, b_l, 1.0))[:, None]
    for i_c in range(tl.cdiv(n_keys, LC)):
        end = tl.minimum(i_c * LC + LC, n_keys)
        o_l1 = i_c * LC + tl.arange(0, L1)
        b_s1 = _scores(b_q1, b_q2, p_k, o_l1, end, stride_kl, False, L, D, D1, D2, ALIGN, PRECISION)
        b_p1 = tl.exp2(b_s1 * scale - b_m[:, None]) * b_g
        b_o1, b_o2 = _add_values(b_o1, b_o2, b_p1, p_v, o_l1, end, stride_vl, D, D1, D2, ALIGN, PRECISION)
        if L2 > 0:
            o_l2 = i_c * LC + L1 + tl.arange(0, L2)
            b_s2 = _scores(b_q1, b_q2, p_k, o_l2, end, stride_kl, False, L, D, D1, D2, ALIGN, PRECISION)
            b_p2 = tl.exp2(b_s2 * scale - b_m[:, None]) * b_g
            b_o1, b_o2 = _add_values(b_o1, b_o2, b_p2, p_v, o_l2, end, stride_vl, D, D1, D2, ALIGN, PRECISION)
    return b_o1, b_o2


# Sizes that follow the number of contexts and tokens are not specialised: one binary serves them all.
@triton.jit(
    do_not_specialize=[
        "n_tokens", "n_contexts", "n_all", "n_tiles", "tiles_at", "stride_wb", "stride_ws",
    ]
)  # fmt: skip
def context_attention_kernel(
    q, k, v, weights, out,  # [B, (S,) T, H, D], [S', L, H, D] twice, [B, S, T], [B, T, H, D]
    key_lengths,  # [S']
    lists,  # the order of tokens [B, T], and further on of the tiles' live contexts [B, tiles, 1 + 2 S]
    scale,  # positive, times log2(e)
    tiles_at,  # where these begin: how many, and of each its place in the row and in the keys
    n_tokens, n_contexts, n_all, n_tiles,  # T, S, S', tiles of a row
    stride_qb, stride_qs, stride_qt, stride_qh,
    stride_kc, stride_kl, stride_kh,
    stride_vc, stride_vl, stride_vh,
    stride_wb, stride_ws,
    stride_ob, stride_ot, stride_oh,
    L: tl.constexpr,
    LC: tl.constexpr, L1: tl.constexpr, L2: tl.constexpr,  # keys at a time, as blocks of L1 and L2 (0: one block)
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,  # the head dimension, as blocks of D1 and D2
    BT: tl.constexpr,  # tokens of a tile
    Q_EACH: tl.constexpr,  # a query for each context
    RELOAD: tl.constexpr,  # queries are read again for every context, ahead as keys and values are; always where Q_EACH
    RAGGED: tl.constexpr,  # there are key_lengths
    WIDE: tl.constexpr,  # a row of q or out is past 2**31 elements: offsets of tokens are int64
    ALIGN: tl.constexpr,  # every stride and address of q, k, v and out is a multiple of so many elements
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (H, tiles, B): it does not depend on what is alive, so a CUDA graph holds for all masks."""
    # `w p / l` is rounded to the type of V. A weight of 1e-4 over 77 keys is below float16's normal numbers, where it
    # has an error of 8 times eager's; times 256 it is not. The accumulators are divided by as much.
    GAIN: tl.constexpr = 256.0 if v.dtype.element_ty == tl.float16 else 1.0
    i_h, i_tile, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    p_tile = lists + tiles_at + (i_b * n_tiles + i_tile).to(tl.int64) * (1 + 2 * n_contexts)
    n_live = tl.load(p_tile)
    tl.assume(n_live > 0)  # so the first context is read without waiting for their number
    o_sorted = i_tile * BT + tl.arange(0, BT)
    t_ok = o_sorted < n_tokens
    o_t = tl.load(lists + i_b * n_tokens + o_sorted, mask=t_ok, other=0)  # [BT]
    o_row = o_t
    if WIDE:
        o_row = o_t.to(tl.int64)

    p_q = _base(_base(q, i_b, stride_qb, ALIGN), i_h, stride_qh, ALIGN)
    if not RELOAD:
        b_q1 = _load(p_q, o_row, stride_qt, t_ok, 0, D1, D, ALIGN)  # [BT, D1]
        b_q2 = b_q1
        if D2 > 0:
            b_q2 = _load(p_q, o_row, stride_qt, t_ok, D1, D2, D, ALIGN)  # [BT, D2]
    b_o1 = tl.full([BT, D1], 0.0, tl.float32)
    b_o2 = tl.full([BT, D2 if D2 > 0 else D1], 0.0, tl.float32)

    # Where queries are read again nothing is moved out of the loop, neither they nor what else it could hold. With a
    # query for each context D = 80 would take 255 registers and spill (sm_120), else 184.
    for j in tl.range(0, n_live, disable_licm=RELOAD):
        i_s = tl.load(p_tile + 1 + 2 * j)
        i_c = tl.load(p_tile + 2 + 2 * j)
        p_w = weights + i_b.to(tl.int64) * stride_wb + i_s.to(tl.int64) * stride_ws
        b_w = tl.load(p_w + o_t, mask=t_ok, other=0.0).to(tl.float32) * GAIN  # [BT]
        there = (i_c >= 0) & (i_c < n_all)  # else its tokens are NaN: other memory is never read, nothing waits
        tl.device_assert(there, "context_index out of range")
        i_c, b_w = tl.where(there, i_c, 0), tl.where(there, b_w, float("nan"))
        n_keys = L
        if RAGGED:
            n_keys = tl.load(key_lengths + i_c)
            there = (n_keys >= 0) & (n_keys <= L)
            tl.device_assert(there, "key_lengths out of range")
            n_keys, b_w = tl.where(there, n_keys, 0).to(tl.int32), tl.where(there, b_w, float("nan"))
        if RELOAD:
            p_qs = _base(p_q, i_s, stride_qs, ALIGN)
            b_q1 = _load(p_qs, o_row, stride_qt, t_ok, 0, D1, D, ALIGN)
            b_q2 = b_q1
            if D2 > 0:
                b_q2 = _load(p_qs, o_row, stride_qt, t_ok, D1, D2, D, ALIGN)
        p_k = _base(_base(k, i_c, stride_kc, ALIGN), i_h, stride_kh, ALIGN)
        p_v = _base(_base(v, i_c, stride_vc, ALIGN), i_h, stride_vh, ALIGN)
        if L <= LC:
            b_o1, b_o2 = _attend_once(
                b_o1, b_o2, b_q1, b_q2, b_w, p_k, p_v, n_keys, stride_kl, stride_vl, scale,
                L, L1, L2, RAGGED, D, D1, D2, ALIGN, PRECISION,
            )  # fmt: skip
        else:
            b_o1, b_o2 = _attend_twice(
                b_o1, b_o2, b_q1, b_q2, b_w, p_k, p_v, n_keys, stride_kl, stride_vl, scale,
                L, LC, L1, L2, BT, D, D1, D2, ALIGN, PRECISION,
            )  # fmt: skip

    # The order is read again: cheaper than holding it in registers over the loop. Reads that are cached in another way
    # are not joined to one.
    o_row = tl.load(lists + i_b * n_tokens + o_sorted, mask=t_ok, other=0, cache_modifier=".ca")
    if WIDE:
        o_row = o_row.to(tl.int64)
    p_o = _base(_base(out, i_b, stride_ob, ALIGN), i_h, stride_oh, ALIGN) + _rows(o_row, stride_ot, ALIGN)
    b_o1, b_o2 = b_o1 * (1 / GAIN), b_o2 * (1 / GAIN)
    o_d1 = tl.arange(0, D1)
    tl.store(p_o + o_d1[None, :], b_o1.to(out.dtype.element_ty), mask=t_ok[:, None] & (o_d1 < D)[None, :])
    if D2 > 0:
        o_d2 = D1 + tl.arange(0, D2)
        tl.store(p_o + o_d2[None, :], b_o2.to(out.dtype.element_ty), mask=t_ok[:, None] & (o_d2 < D)[None, :])
