"""The least time that a layer can take on a device, from what was measured on that device in the same run.

It is the largest of: bytes over the bandwidth of a copy, arithmetic over the rate of a matrix product, and on a GPU an
empty kernel on the same grid. Bytes are counted once, as if nothing were read twice; arithmetic is that of the live
contexts alone, without exponentials.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.timing import GraphCall

__all__ = ["Floor", "Rates", "Work", "attention_work", "empty_kernel_seconds", "floor", "measure_rates"]


@dataclass(frozen=True)
class Work:
    """What has to be done, whoever does it."""

    n_bytes: int
    flops: int


@dataclass(frozen=True)
class Rates:
    """What a device does at best: bytes a second, read and written, and floating-point operations a second."""

    copy: float
    matrix: float


@dataclass(frozen=True)
class Floor:
    """Seconds, and what they are due to: bytes, arithmetic or launch."""

    seconds: float
    by: str


def attention_work(q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor) -> Work:
    """Of `context_attention`: q [B, T, H, D] is read and as much written, k [S', L, H, D] and v are read.

    A live pair of token and context costs two products of H x L x D, and the four bytes of its weight [B, S, T].
    """
    live = int((weights != 0).sum())
    _, length, heads, dim = k.shape
    n_bytes = 2 * (q.numel() + k.numel()) * q.element_size() + 4 * live
    return Work(n_bytes, live * heads * length * dim * 4)


def floor(work: Work, rates: Rates, launch: float = 0.0) -> Floor:
    """The largest of the three; `launch` is the empty kernel's seconds, 0 where no kernel is launched."""
    parts = {"bytes": work.n_bytes / rates.copy, "arithmetic": work.flops / rates.matrix, "launch": launch}
    by = max(parts, key=parts.get)
    return Floor(parts[by], by)


def measure_rates(device: torch.device, dtype: torch.dtype, quick: bool = False) -> Rates:
    """The best of several: other work on the machine only ever makes them look lower."""
    on_gpu, times = device.type == "cuda", 3 if quick else 7
    n = (2**30 if on_gpu else 2**28 if quick else 2**29) // dtype.itemsize
    source = torch.rand(n, device=device).to(dtype)
    target = torch.empty_like(source)
    copied = _best(lambda: target.copy_(source), device, times)
    n_bytes = 2 * n * dtype.itemsize
    side = 8192 if on_gpu and dtype.itemsize == 2 else 4096 if on_gpu else 2048
    a, b, c = (torch.rand(side, side, device=device).sub_(0.5).to(dtype) for _ in range(3))
    multiplied = _best(lambda: torch.mm(a, b, out=c), device, times)
    return Rates(n_bytes / copied, 2 * side**3 / multiplied)


def _best(call: Callable[[], torch.Tensor], device: torch.device, times: int) -> float:
    call()
    found = []
    for _ in range(times):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) / 1000)
        else:
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
    return min(found)


def empty_kernel_seconds(grid: tuple[int, int, int], device: torch.device, warps: int) -> float:
    """What launching alone costs inside a graph: a kernel that does nothing, on a grid of so many programs."""
    if device.type != "cuda":
        return 0.0
    from benchmarks.empty_kernel import empty_kernel

    nothing = torch.zeros(1, device=device)

    def call() -> torch.Tensor:
        empty_kernel[grid](nothing, num_warps=warps)
        return nothing

    graph = GraphCall([call] * 20)
    return min(graph.sample() for _ in range(20))
