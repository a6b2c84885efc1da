"""The Triton kernel of `routed_lora`: a program computes a part of the outputs of one tile of tokens of one row.

It walks the list of the adapters alive on its tile. An adapter's product with the tokens has few columns, so it is held
in registers and never written: `h = x down^T` once, then `y += w (h up)` over the blocks of the program's outputs. A
Linear is a convolution of one place on a map of T x 1. Names: `i_` which program, `o_` offsets, `b_` a block in
registers, `p_` a pointer to where a block begins.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["routed_lora_kernel"]


@triton.jit
def _tokens_by_channels(p, o_t, t_ok, o_c, n_channels, stride_c, LAST: tl.constexpr):
    """Where numbers [BT, BC] of a map are, and which of them are there; as [BC, BT] unless channels are LAST.

    What lies side by side in memory must be along the last axis of a block, or each thread reads a line of its own.
    """
    c_ok = o_c < n_channels
    if LAST:
        return p + o_t[:, None] + o_c[None, :], t_ok[:, None] & c_ok[None, :]
    else:
        return p + o_t[None, :] + (o_c * stride_c)[:, None], t_ok[None, :] & c_ok[:, None]


@triton.jit
def _inner(
    p_x, p_down, rank, o_t, t_ok,
    n_inputs, height, width, width_out,
    stride_xh, stride_xw, stride_xc, stride_dr, stride_dh, stride_dw, stride_dc,
    MAP: tl.constexpr, TAPS: tl.constexpr, TAPS_WIDE: tl.constexpr,
    STEP: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
    X_LAST: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x down^T of the tokens `o_t`, float32 [BT, BR]: rows from `rank` on are zero, as is what lies beside the map."""
    o_r = tl.arange(0, BR)
    r_ok = (o_r < rank)[:, None]
    o_down = o_r.to(tl.int64)[:, None] * stride_dr
    y_out, x_out = o_t, o_t * 0
    if MAP:
        y_out, x_out = o_t // width_out, o_t % width_out
    b_h = tl.full([BT, BR], 0.0, tl.float32)
    n_blocks = tl.cdiv(n_inputs, BC)
    for i in range(TAPS * n_blocks):
        i_tap, i_c = 0, i
        if TAPS > 1:
            i_tap, i_c = i // n_blocks, i % n_blocks
        i_tap_y, i_tap_x = i_tap // TAPS_WIDE, i_tap % TAPS_WIDE
        y_in = y_out * STEP - PADDING + i_tap_y * DILATION
        x_in = x_out * STEP - PADDING + i_tap_x * DILATION
        ok = t_ok
        if MAP:
            ok = ok & (y_in >= 0) & (y_in < height) & (x_in >= 0) & (x_in < width)
        if WIDE:
            y_in, x_in = y_in.to(tl.int64), x_in.to(tl.int64)
        o_c = i_c * BC + tl.arange(0, BC)
        o_x = o_c
        if WIDE:
            o_x = o_c.to(tl.int64)
        p, there = _tokens_by_channels(p_x, y_in * stride_xh + x_in * stride_xw, ok, o_x, n_inputs, stride_xc, X_LAST)
        b_x = tl.load(p, mask=there, other=0.0)
        if not X_LAST:
            b_x = tl.trans(b_x)  # [BT, BC]
        p_taps = p_down + i_tap_y * stride_dh + i_tap_x * stride_dw
        b_down = tl.load(p_taps + o_down + (o_c * stride_dc)[None, :], mask=r_ok & (o_c < n_inputs)[None, :], other=0.0)
        b_h = tl.dot(b_x, tl.trans(b_down), b_h, input_precision=PRECISION)
    return b_h


# Sizes that follow the number of contexts and tokens are not specialised: one binary serves them all.
@triton.jit(
    do_not_specialize=[
        "n_tokens", "n_contexts", "n_all", "n_tiles", "tiles_at", "n_blocks", "height", "width", "width_out",
        "stride_xc", "stride_yo", "stride_wb", "stride_ws",
    ]
)  # fmt: skip
def routed_lora_kernel(
    y, x, down, up,  # [B, T, O], [B, H, W, C], [R, kh, kw, C], [R, O], by their strides
    offsets,  # [S' + 1]
    weights,  # [B, S, T]
    lists,  # the order of tokens [B, T], and further on of the tiles' live contexts [B, tiles, 1 + 2 S]
    tiles_at,  # where these begin: how many, and of each its place in the row and its adapter
    n_tokens, n_contexts, n_all, n_tiles,  # T, S, S', tiles of a row
    n_inputs, n_outputs, n_blocks,  # C, O, and of how many blocks of outputs a program takes
    height, width, width_out,  # H, W, and the width of the output
    stride_xb, stride_xh, stride_xw, stride_xc,
    stride_yb, stride_yt, stride_yo,
    stride_dr, stride_dh, stride_dw, stride_dc,
    stride_ur, stride_uo,
    stride_wb, stride_ws,
    MAP: tl.constexpr,  # tokens are places of a map, else H = T and W = 1
    TAPS: tl.constexpr, TAPS_WIDE: tl.constexpr,  # kh * kw, kw
    STEP: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr,
    BT: tl.constexpr,  # tokens of a tile
    BC: tl.constexpr, BO: tl.constexpr,  # inputs and outputs at a time
    BR: tl.constexpr,  # the largest rank, as a power of two
    X_LAST: tl.constexpr, Y_LAST: tl.constexpr,  # channels lie side by side
    WIDE: tl.constexpr,  # a row of x or y is past 2**31 elements: offsets are int64
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (parts of the outputs, tiles, B): it does not depend on what is alive, so a CUDA graph holds for all."""
    i_part, i_tile, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    p_tile = lists + tiles_at + (i_b * n_tiles + i_tile).to(tl.int64) * (1 + 2 * n_contexts)
    n_live = tl.load(p_tile)
    o_sorted = i_tile * BT + tl.arange(0, BT)
    t_ok = o_sorted < n_tokens
    o_t = tl.load(lists + i_b * n_tokens + o_sorted, mask=t_ok, other=0)  # [BT]
    o_y = o_t
    if WIDE:
        o_y = o_t.to(tl.int64)
    o_y = o_y * stride_yt
    p_x, p_y = x + i_b.to(tl.int64) * stride_xb, y + i_b.to(tl.int64) * stride_yb

    for j in range(n_live):
        i_s, i_c = tl.load(p_tile + 1 + 2 * j), tl.load(p_tile + 2 + 2 * j)
        p_w = weights + i_b.to(tl.int64) * stride_wb + i_s.to(tl.int64) * stride_ws
        b_w = tl.load(p_w + o_t, mask=t_ok, other=0.0).to(tl.float32)  # [BT]
        alive = b_w != 0
        there = (i_c >= 0) & (i_c < n_all)  # else its tokens are NaN: other memory is never read, nothing waits
        tl.device_assert(there, "adapter_index out of range")
        i_c, b_w = tl.where(there, i_c, 0), tl.where(there, b_w, float("nan"))
        start, end = tl.load(offsets + i_c), tl.load(offsets + i_c + 1)
        rank = tl.where(there, end - start, 0)
        # A tile without any has one all the same, whose weights are zero: a row that no adapter is alive on ends here.
        if ((rank > 0) | (there == 0)) & (tl.max(alive.to(tl.int32), 0) > 0):
            p_down, p_up = down + start.to(tl.int64) * stride_dr, up + start.to(tl.int64) * stride_ur
            b_h = _inner(
                p_x, p_down, rank, o_t, alive, n_inputs, height, width, width_out,
                stride_xh, stride_xw, stride_xc, stride_dr, stride_dh, stride_dw, stride_dc,
                MAP, TAPS, TAPS_WIDE, STEP, PADDING, DILATION, BT, BC, BR, X_LAST, WIDE, PRECISION,
            )  # fmt: skip
            b_h = b_h.to(x.dtype.element_ty)
            o_r = tl.arange(0, BR)
            for i in range(n_blocks):
                o_o = (i_part * n_blocks + i) * BO + tl.arange(0, BO)
                o_up = o_r.to(tl.int64)[:, None] * stride_ur + (o_o * stride_uo)[None, :]
                b_up = tl.load(p_up + o_up, mask=(o_r < rank)[:, None] & (o_o < n_outputs)[None, :], other=0.0)
                # Weighed after the product, which has no small weights to round to its type.
                b_y = tl.dot(b_h, b_up, input_precision=PRECISION) * b_w[:, None]  # [BT, BO]
                if not Y_LAST:
                    b_y = tl.trans(b_y)
                if WIDE:
                    o_o = o_o.to(tl.int64)
                p, inside = _tokens_by_channels(p_y, o_y, alive, o_o, n_outputs, stride_yo, Y_LAST)
                b_y += tl.load(p, mask=inside, other=0.0).to(tl.float32)
                tl.store(p, b_y.to(y.dtype.element_ty), mask=inside)
            tl.debug_barrier()  # the next adapter adds to what other threads may have written
