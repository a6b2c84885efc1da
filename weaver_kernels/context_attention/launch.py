"""From tensors to a launch of the kernel: its grid, its arguments in their order and Triton's options."""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from weaver_kernels.context_attention.blocks import key_blocks, split
from weaver_kernels.context_attention.kernel import context_attention_kernel
from weaver_kernels.context_attention.lists import tile_layout
from weaver_kernels.tuning import KernelConfig

__all__ = ["kernel_arguments", "launch"]

LOG2_E = 1 / math.log(2)


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    weights: torch.Tensor,
    key_lengths: torch.Tensor | None,
    scale: float,
    lists: torch.Tensor,
    tile_sizes: tuple[int, ...],
    config: KernelConfig,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """One launch for all rows; arguments of `context_attention`, the lists of its plan and a configuration.

    lists, tile_sizes : those of a `ContextPlan`, `config.tile` among the sizes; out : [B, T, H, D], written if given
    """
    if out is None:
        rows, _, n_tokens = weights.shape
        _, _, heads, dim = k.shape
        out = q.new_empty(rows, n_tokens, heads, dim)
    found = kernel_arguments(q, k, v, weights, key_lengths, lists, tile_sizes, config, out)
    if found is None:
        q, k, v, weights = (x.contiguous() for x in (q, k, v, weights))
        found = kernel_arguments(q, k, v, weights, key_lengths, lists, tile_sizes, config, out)
    grid, tensors, others, options = found
    context_attention_kernel[grid](*tensors, scale * LOG2_E, *others, **options)
    return out


def kernel_arguments(q, k, v, weights, key_lengths, lists, tile_sizes, config, out):
    """The grid, the kernel's tensors, what follows the scale, both in their order, and Triton's options.

    None where numbers of a head or of a context's weights do not lie next to each other. Tensors without storage will
    do, so the kernel can be compiled anywhere.
    """
    addresses = q.data_ptr() | k.data_ptr() | v.data_ptr() | out.data_ptr()
    layout = _layout(
        q.shape, q.stride(), k.shape, k.stride(), v.stride(), weights.shape, weights.stride(), out.stride(),
        q.dtype, addresses & 255, key_lengths is not None, tile_sizes, config,
    )  # fmt: skip
    if layout is None:
        return None
    grid, others, options = layout
    # A tensor that is not there is not read; any pointer stands for it.
    lengths = lists if key_lengths is None else key_lengths
    return grid, (q, k, v, weights, out, lengths, lists), others, options


@lru_cache(maxsize=1024)
def _layout(
    q_shape, q_stride, k_shape, k_stride, v_stride, w_shape, w_stride, out_stride,
    dtype, low_address, ragged, tile_sizes, config,
) -> tuple[tuple[int, int, int], tuple, dict] | None:  # fmt: skip
    """All that follows from sizes, strides and the configuration.

    Kept for the next call of a layer: making it anew is most of what a launch costs on the host. By position, because
    forty names cost 1.3 us more.
    """
    if any(stride[-1] != 1 for stride in (q_stride, k_stride, v_stride, w_stride)):
        return None
    rows, n_contexts, n_tokens = w_shape
    n_all, n_keys, heads, dim = k_shape
    tiles = tile_layout(rows, n_contexts, n_tokens, tile_sizes)[config.tile]
    q_each, size = len(q_shape) == 5, dtype.itemsize
    q_strides = (q_stride[0], q_stride[1] if q_each else 0, *q_stride[-3:-1])
    strides = (*q_strides, *k_stride[:3], *v_stride[:3])
    keys_at_a_time, l1, l2 = key_blocks(n_keys, dim * size)
    align = math.gcd(16, math.gcd(256, low_address) // size, *strides, *out_stride[:3])
    others = (
        tiles.at,
        n_tokens, n_contexts, n_all, tiles.n_tiles,
        *strides, *w_stride[:2], *out_stride[:3],
        n_keys, keys_at_a_time, l1, l2,
        dim, *split(dim),
        config.tile,
        q_each, q_each or config.reload, ragged,
        n_tokens * max(q_stride[-3], out_stride[1]) >= 2**31,  # WIDE
        align,
        "ieee" if dtype == torch.float32 else "tf32",
    )  # fmt: skip
    # Multiplications fuse with additions in every version of Triton.
    options = {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True}
    return (heads, tiles.n_tiles, rows), others, options
