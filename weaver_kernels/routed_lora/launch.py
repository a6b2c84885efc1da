"""From tensors to a launch of the kernel: its grid, its arguments in their order and Triton's options."""

from __future__ import annotations

from functools import lru_cache

import torch

from weaver_kernels.context_attention.lists import tile_layout
from weaver_kernels.routed_lora.kernel import routed_lora_kernel
from weaver_kernels.tuning import LoraConfig, rank_block

__all__ = ["kernel_arguments", "launch"]


def launch(
    y: torch.Tensor,
    x: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    offsets: torch.Tensor,
    weights: torch.Tensor,
    lists: torch.Tensor,
    tile_sizes: tuple[int, ...],
    most: int,
    config: LoraConfig,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
) -> None:
    """One launch for all rows; arguments of `routed_lora`, the lists of its plan and a configuration.

    lists, tile_sizes : those of a `ContextPlan`, `config.tile` among the sizes; most : the largest rank
    """
    out = y
    if y.ndim == 4 and _token_stride(y) is None:
        out = y.contiguous()
    if weights.stride(-1) != 1:
        weights = weights.contiguous()
    grid, tensors, others, options = kernel_arguments(
        out, x, down, up, offsets, weights, lists, tile_sizes, most, config, stride, padding, dilation
    )
    routed_lora_kernel[grid](*tensors, *others, **options)
    if out is not y:
        y.copy_(out)


def kernel_arguments(
    y, x, down, up, offsets, weights, lists, tile_sizes, most, config, stride=1, padding=0, dilation=1
):
    """The grid, the kernel's tensors, all else in its order, and Triton's options.

    Tensors without storage will do, so the kernel can be compiled anywhere.
    """
    grid, others, options = _layout(
        y.shape, y.stride(), x.shape, x.stride(), down.shape, down.stride(), up.stride(),
        offsets.shape[0] - 1, weights.shape, weights.stride(), y.dtype,
        tile_sizes, most, config, stride, padding, dilation,
    )  # fmt: skip
    return grid, (y, x, down, up, offsets, weights, lists), others, options


def _token_stride(y: torch.Tensor) -> int | None:
    """Numbers from a place of a map [B, O, h, w] to the next one, row by row; None where they are not evenly spread."""
    return _even(y.shape, y.stride())


def _even(shape, strides) -> int | None:
    (height, width), (down, right) = shape[2:], strides[2:]
    if width == 1:
        return down
    return right if height == 1 or down == width * right else None


@lru_cache(maxsize=1024)
def _layout(
    y_shape, y_stride, x_shape, x_stride, down_shape, down_stride, up_stride,
    n_all, w_shape, w_stride, dtype, tile_sizes, most, config, stride, padding, dilation,
) -> tuple[tuple[int, int, int], tuple, dict]:  # fmt: skip
    """All that follows from sizes, strides and the configuration.

    Kept for the next call of a layer: making it anew is most of what a launch costs on the host.
    """
    rows, n_contexts, n_tokens = w_shape
    tiles = tile_layout(rows, n_contexts, n_tokens, tile_sizes)[config.tile]
    if on_map := len(x_shape) == 4:
        n_inputs, height, width = x_shape[1:]
        n_outputs, width_out = y_shape[1], y_shape[3]
        x_strides = x_stride[0], x_stride[2], x_stride[3], x_stride[1]
        y_strides = y_stride[0], _even(y_shape, y_stride), y_stride[1]
        down_strides = down_stride[0], down_stride[2], down_stride[3], down_stride[1]
        taps, taps_wide = down_shape[2] * down_shape[3], down_shape[3]
    else:
        (n_inputs, n_outputs), (height, width, width_out) = (x_shape[2], y_shape[2]), (n_tokens, 1, 1)
        x_strides, y_strides = (x_stride[0], x_stride[1], 0, x_stride[2]), y_stride
        down_strides = down_stride[0], 0, 0, down_stride[1]
        taps = taps_wide = 1
    blocks = -(-n_outputs // config.outputs)
    parts = min(blocks, -(-config.programs // tiles.n_tiles))
    each = -(-blocks // parts)
    spread = [
        sum((size - 1) * step for size, step in zip(shape[1:], strides[1:], strict=True))
        for shape, strides in ((x_shape, x_stride), (y_shape, y_stride))
    ]
    others = (
        tiles.at,
        n_tokens, n_contexts, n_all, tiles.n_tiles,
        n_inputs, n_outputs, each,
        height, width, width_out,
        *x_strides, *y_strides, *down_strides, *up_stride, *w_stride[:2],
        on_map, taps, taps_wide, stride, padding, dilation,
        config.tile, config.inputs, config.outputs, rank_block(most),
        x_strides[-1] == 1, y_strides[-1] == 1,
        max(spread) >= 2**31,  # WIDE
        "ieee" if dtype == torch.float32 else "tf32",
    )  # fmt: skip
    # Multiplications fuse with additions in every version of Triton.
    options = {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True}
    return (-(-blocks // each), tiles.n_tiles, rows), others, options
