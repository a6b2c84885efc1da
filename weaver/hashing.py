"""Hashes of files, and of weights: those are not computed again where nothing has changed.

SHA-256 of a model on a GPU takes seconds, most of all to bring it to the host; a sum of all its bits, computed there,
takes a few hundredths. Weights of the same sum, names and shapes are taken for the same. Of weights on the host (parts
that rest, offload) the sum would take four times as long as SHA-256 does, so these are told apart by that.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path

import torch

__all__ = ["bit_sums", "file_hash", "remembered"]

_MOST = 32  # hashes that are kept
_CHUNK = 2**22  # words at a time: they are widened to 64 bits
_STEP, _MIX = -7046029254386353131, -4658895280553007687  # odd, and half of their bits are set
_KNOWN: OrderedDict[Hashable, str] = OrderedDict()
Named = tuple[str, torch.Tensor]


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remembered(kind: Hashable, weights: Iterable[Named], compute: Callable[[list[Named]], str]) -> str:
    """`compute(weights)`, or what it gave for the same weights on a GPU before; on the CPU it is always computed."""
    weights = [(name, value.detach()) for name, value in weights]
    there = [value for _, value in weights if value.is_cuda]
    if not there:
        return compute(weights)
    shapes = tuple((name, tuple(value.shape), value.dtype, value.is_cuda) for name, value in weights)
    key = (kind, shapes, bit_sums(there), _digest(value for _, value in weights if not value.is_cuda))
    if key not in _KNOWN:
        _KNOWN[key] = compute(weights)
        while len(_KNOWN) > _MOST:
            _KNOWN.popitem(last=False)
    _KNOWN.move_to_end(key)
    return _KNOWN[key]


def _digest(tensors: Iterable[torch.Tensor]) -> bytes:
    """SHA-256 of all bits of tensors on the host."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.digest()


def bit_sums(tensors: Iterable[torch.Tensor]) -> tuple[int, ...]:
    """For each tensor the sum of its words, each times an odd number of its place, modulo 2**64.

    One word that changes always changes it; others, or words that change places, but for one chance in 2**64.
    """
    by_device: dict[torch.device, list[tuple[int, torch.Tensor]]] = {}
    for i, tensor in enumerate(tensors):
        by_device.setdefault(tensor.device, []).append((i, _words(tensor)))
    sums: dict[int, int] = {}
    for device, found in by_device.items():
        longest = min(_CHUNK, max(len(words) for _, words in found))
        factors = _factors(longest, device)
        totals = torch.stack([_weighted(words, factors) for _, words in found])
        sums |= dict(zip((i for i, _ in found), totals.tolist(), strict=True))  # one wait for all of a device
    return tuple(sums[i] for i in range(len(sums)))


def _factors(count: int, device: torch.device) -> torch.Tensor:
    """An odd number for each place, [count] int64, mixed as splitmix64 does: no sum of some is that of others."""
    mixed = torch.arange(count, device=device) * _STEP
    mixed = (mixed ^ (mixed >> 29)) * _MIX
    return (mixed ^ (mixed >> 32)) | 1


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """All bits of a tensor, in words as wide as it takes."""
    flat = tensor.contiguous().view(-1)
    word = next(w for w in (torch.int32, torch.int16, torch.uint8) if tensor.nbytes % w.itemsize == 0)
    return flat.view(torch.uint8).view(word)


def _weighted(words: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for part in words.split(len(factors)) if len(words) else ():
        total = total * _STEP + (part.long() * factors[: len(part)]).sum()
    return total
