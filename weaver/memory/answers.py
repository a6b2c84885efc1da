"""What a device without numbers answers where a number is asked for, by operation.

Whatever leaves it is zero, and whatever is asked of it is true: the package's checks (`isfinite`, `equal`) pass, and
loops over indices go on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from weaver.memory.scratch import channels_last
from weaver_kernels import live_context_attention

__all__ = ["ANSWERS"]

_LARGE = 2**20  # elements; more than that leaves the device as one number, expanded


def _number(ledger, func, args, kwargs):
    tensor = args[0]
    if tensor.device.type != "meta":
        return ledger.run(func, args, kwargs)
    return True if tensor.dtype == torch.bool else tensor.dtype.is_floating_point * 0.0


def _copied(ledger, func, args, kwargs):
    source, device = args[0], kwargs.get("device")
    if source.device.type != "meta" or device is None or device.type == "meta":
        return ledger.run(func, args, kwargs)
    return _zeros(source.shape, kwargs.get("dtype") or source.dtype)


def _written(ledger, func, args, kwargs):
    target, source = args[:2]
    if source.device.type == "meta" and target.device.type != "meta":
        return target.zero_()
    return ledger.run(func, args, kwargs)


def _equal(ledger, func, args, kwargs):
    return args[0].shape == args[1].shape if args[0].device.type == "meta" else ledger.run(func, args, kwargs)


def _nonzero(ledger, func, args, kwargs):
    tensor = args[0]
    if tensor.device.type != "meta":
        return ledger.run(func, args, kwargs)
    return tensor.new_empty(1, tensor.ndim, dtype=torch.long)


def _unique(ledger, func, args, kwargs):
    tensor, dim = args[:2]
    if tensor.device.type != "meta":
        return ledger.run(func, args, kwargs)
    inverse = tensor.new_empty(tensor.shape[dim], dtype=torch.long)
    return tensor.narrow(dim, 0, 1).clone(), inverse, tensor.new_empty(1, dtype=torch.long)  # zeros are all equal


def _convolved(ledger, func, args, kwargs):
    """Channels stay the last axis in memory where they are it, which PyTorch's meta tensors forget."""
    result = ledger.run(func, args, kwargs)
    return _like(result) if result.is_meta and channels_last(*args[:2]) else result


def _normalised(ledger, func, args, kwargs):
    """As above; a GPU's kernel does not keep them there."""
    out, *rest = ledger.run(func, args, kwargs)
    keeps = out.is_meta and ledger.device == "cpu" and channels_last(args[0])
    return _like(out) if keeps else out, *rest


def _like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, memory_format=torch.channels_last)


def _attended(ledger, func, args, kwargs):
    """On the CPU the operation in plain PyTorch, every context alive on all tokens; on a GPU one kernel."""
    q, k, v, weights, context_index, key_lengths, lists, scale = args
    if q.device.type != "meta":
        return ledger.run(func, args, kwargs)
    if ledger.device != "cpu":
        return q.new_empty(weights.shape[0], weights.shape[2], *q.shape[-2:])
    rows, contexts, tokens = weights.shape
    with ledger:
        index = torch.zeros(rows, contexts, dtype=torch.long)
        alive = torch.full((rows, contexts), tokens)
        return live_context_attention(q, k, v, weights, index, None, scale, None, alive)


def _zeros(shape, dtype) -> torch.Tensor:
    count = torch.Size(shape).numel()
    return torch.zeros(shape, dtype=dtype) if count <= _LARGE else torch.zeros(1, dtype=dtype).expand(shape)


_aten = torch.ops.aten
ANSWERS: Mapping[object, Callable] = {
    _aten._local_scalar_dense.default: _number,
    _aten._to_copy.default: _copied,
    _aten.copy_.default: _written,
    _aten.convolution.default: _convolved,
    _aten.native_group_norm.default: _normalised,
    _aten.equal.default: _equal,
    _aten.nonzero.default: _nonzero,
    _aten.unique_dim.default: _unique,
    torch.ops.weaver_kernels.context_attention.default: _attended,
}
