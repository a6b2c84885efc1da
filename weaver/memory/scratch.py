"""Memory that PyTorch's own kernels take on the CPU while they run, and give back before they return.

Read off the allocator's record of PyTorch 2.13 (oneDNN with AVX-512), shape by shape; `tests/test_memory_scratch.py`
compares. Kernels not named here take none, or none that PyTorch's allocator sees, as MKL's.
"""

from __future__ import annotations

from functools import lru_cache

import torch

__all__ = ["channels_last", "scratch_bytes"]

_aten = torch.ops.aten
_ATTENTION = (
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
)
# Queries in a block of the attention kernel, by how many there are at least; and the most keys in one.
_QUERY_BLOCKS = ((768, 256), (192, 64), (0, 32))
_KEY_BLOCK = 512
_LAST = 8216  # bytes of oneDNN's own where channels are last


def scratch_bytes(func, args, result) -> int:
    """Bytes that an operation took at its highest beyond its results."""
    if func is _aten.convolution.default:
        x, weight, _, *how = args
        return _convolution(*_shapes(x, weight, result), _frozen(how), x.dtype, channels_last(x, weight))
    if func is _aten.convolution_backward.default:
        grad, x, weight, _, *how, _ = args
        return _convolution(*_shapes(x, weight, grad), _frozen(how), x.dtype, channels_last(x, weight), backward=True)
    if func in _ATTENTION:
        q, k = args[1:3] if func is _ATTENTION[1] else args[:2]
        return _attention(q.shape, k.shape[2], q.dtype)
    return 0


def channels_last(*tensors: torch.Tensor) -> bool:
    """Whether one of them has channels as the last axis in memory, as pictures that come from files do."""
    form = torch.channels_last
    return any(t.ndim == 4 and t.is_contiguous(memory_format=form) and not t.is_contiguous() for t in tensors)


def _shapes(*tensors: torch.Tensor) -> list[torch.Size]:
    return [tensor.shape for tensor in tensors]


def _frozen(how) -> tuple:
    """Stride, padding, dilation, whether transposed, padding of the output, groups."""
    return tuple(tuple(value) if isinstance(value, list) else value for value in how)


def _attention(shape, n_keys: int, dtype: torch.dtype) -> int:
    """Scores, their maxima and sums, and the output of a block of queries, for every thread."""
    n_queries, dim = shape[2:]
    block = next(size for least, size in _QUERY_BLOCKS if n_queries >= least)
    block, keys = min(block, n_queries), min(_KEY_BLOCK, n_keys)
    width = 8 if dtype == torch.float64 else 4
    return torch.get_num_threads() * width * block * (keys + 2 + dim)


def _convolution(x, weight, out, how, dtype: torch.dtype, last: bool, *, backward: bool = False) -> int:
    """`x`, `weight` and `out` are shapes, `last` says where channels are."""
    kind = _kind(x, weight, how, dtype, torch.get_num_threads())
    size, kernel = dtype.itemsize, weight[2:].numel()
    if kind == "Slow2d":  # the picture unfolded, a column for every place of the kernel
        unfolded = kernel > 1 or any(side != 1 for side in how[0])
        return unfolded * size * (x[:2].numel() * kernel * out[2:].numel() + last * weight.numel())
    if kind != "Mkldnn":
        return 0
    # oneDNN takes everything in blocks of channels; a picture of few channels it reads as it is.
    block = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8
    few = x[1] < block
    weights = _padded(weight[0], block) * (weight[1] if few else _padded(weight[1], block)) * kernel * size
    if last:
        return weight.numel() * size + weights + _LAST
    read, written = 0 if few else _blocked(x, block) * size, _blocked(out, block) * size
    if backward:
        return read + weights + written
    return max(read + weights + written - out.numel() * size, written)


@lru_cache(maxsize=4096)
def _kind(x, weight, how, dtype: torch.dtype, threads: int) -> str:
    """The library that PyTorch gives a convolution to; how many threads there are decides too."""
    stride, padding, dilation, transposed, output_padding, groups = how
    x, weight = (torch.empty(1, dtype=dtype).expand(shape) for shape in (x, weight))
    how = list(stride), list(padding), list(dilation), transposed, list(output_padding), groups, [weight.shape[0]]
    return torch._C._select_conv_backend(x, weight, None, *how).name


def _padded(channels: int, block: int) -> int:
    return -(-channels // block) * block


def _blocked(shape, block: int) -> int:
    return torch.Size((shape[0], _padded(shape[1], block), *shape[2:])).numel()
