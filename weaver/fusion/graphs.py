"""Calls captured in CUDA graphs: launched at once, without the host between their kernels."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch

__all__ = ["Graphs"]

_WARM_UPS = 2  # kernels are loaded and libraries choose theirs before the capture, which neither may do


class Graphs:
    """One graph for each kind of call; all of them share their memory.

    A call reads and writes tensors that stay where they are; what is on the host is settled when it is captured.
    """

    def __init__(self):
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool = None

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, kind: Hashable, call: Callable[[], None], written: Sequence[torch.Tensor]) -> None:
        """Replay the graph of this kind of call, captured at its first one; `written` are the tensors it writes to."""
        if kind not in self._graphs:
            self._graphs[kind] = self._capture(call, written)
        self._graphs[kind].replay()

    def _capture(self, call: Callable[[], None], written: Sequence[torch.Tensor]) -> torch.cuda.CUDAGraph:
        before = [tensor.clone() for tensor in written]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                call()
        torch.cuda.current_stream().wait_stream(side)
        for tensor, value in zip(written, before, strict=True):
            tensor.copy_(value)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            call()
        self._pool = self._pool or graph.pool()
        return graph
