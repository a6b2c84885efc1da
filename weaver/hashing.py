"""Hashes of weights that are not computed again where nothing has changed.

SHA-256 of a model on a GPU takes seconds, most of all to bring it to the host; a sum of all its bits, computed there,
takes a few hundredths. Weights of the same sum, names and shapes are taken for the same.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable

import torch

__all__ = ["bit_sums", "remembered"]

_MOST = 32  # hashes that are kept
_CHUNK = 2**22  # words at a time: they are widened to 64 bits
_STEP = -7046029254386353131  # 2**64 / the golden ratio, odd: places of words get factors that have nothing in common
_KNOWN: OrderedDict[Hashable, str] = OrderedDict()
Named = tuple[str, torch.Tensor]


def remembered(kind: Hashable, weights: Iterable[Named], compute: Callable[[list[Named]], str]) -> str:
    """`compute(weights)`, or what it gave for the same weights on a GPU before; on the CPU it is always computed."""
    weights = [(name, value.detach()) for name, value in weights]
    if not any(value.is_cuda for _, value in weights):
        return compute(weights)
    shapes = tuple((name, tuple(value.shape), value.dtype) for name, value in weights)
    key = (kind, shapes, bit_sums([value for _, value in weights]))
    if key not in _KNOWN:
        _KNOWN[key] = compute(weights)
        while len(_KNOWN) > _MOST:
            _KNOWN.popitem(last=False)
    _KNOWN.move_to_end(key)
    return _KNOWN[key]


def bit_sums(tensors: Iterable[torch.Tensor]) -> tuple[int, ...]:
    """For each tensor the sum of its words, each times an odd number of its place, modulo 2**64.

    One word that changes always changes it; others, or words that change places, but for one chance in 2**64.
    """
    found: dict[torch.device, list] = {}
    tensors = list(tensors)
    for i, tensor in enumerate(tensors):
        found.setdefault(tensor.device, []).append((i, _bit_sum(tensor)))
    sums = [0] * len(tensors)
    for on_device in found.values():
        numbers, values = zip(*on_device, strict=True)
        for i, value in zip(numbers, torch.stack(values).tolist(), strict=True):  # one wait for all of a device
            sums[i] = value
    return tuple(sums)


def _bit_sum(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.contiguous().view(-1)
    for word in (torch.int32, torch.int16, torch.uint8):
        if flat.numel() * flat.element_size() % word.itemsize == 0:
            flat = flat.view(torch.uint8).view(word)
            break
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(flat), _CHUNK):
        words = flat[start : start + _CHUNK].long()
        places = torch.arange(start, start + len(words), device=tensor.device)
        total += (words * (2 * (places * _STEP) + 1)).sum()
    return total
