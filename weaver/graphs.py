"""Calls captured in CUDA graphs: launched at once, without the host between their kernels."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

__all__ = ["CapturedForward", "Graphs", "captured", "uncaptured"]


class Graphs:
    """One graph for each kind of call; all of them share their memory.

    What a call reads besides the tensors it is given, weights above all, must stay where it is: a model whose weights
    are moved, or whose adapters, processors or hooks change, needs other graphs. What is on the host is settled when
    a call is captured.
    """

    def __init__(self):
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._calls: dict[Hashable, tuple[list[torch.Tensor], list]] = {}
        self._pool = None

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, kind: Hashable, call: Callable[[], None], written: Sequence[torch.Tensor]) -> None:
        """Replay the graph of this kind of call, captured at its first one; `written` are the tensors it writes to.

        The call reads and writes tensors that stay where they are.
        """
        if kind not in self._graphs:
            self._graphs[kind] = self._capture(call, written)
        self._graphs[kind].replay()

    def call(self, kind: Hashable, function: Callable, *args, **kwargs) -> Any:
        """What the function returns, by the graph of this kind, of such shapes and of these numbers.

        Arguments and results are tensors in any nesting, copied in and out: results stay as they are at the next call.
        """
        leaves, spec = tree_flatten((args, kwargs))
        numbers = tuple(None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        kind = (kind, str(spec), numbers, *((x.shape, x.dtype) for x in tensors))
        if kind not in self._calls:
            device = next(x.device for x in tensors if x.is_cuda)
            with torch.inference_mode(False):  # whose tensors could not be written over outside of it
                self._calls[kind] = [torch.empty_like(x, device=device) for x in tensors], []
        inputs, results = self._calls[kind]
        for place, tensor in zip(inputs, tensors, strict=True):
            place.copy_(tensor, non_blocking=True)

        def call() -> None:
            places = iter(inputs)
            filled = [next(places) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
            args, kwargs = tree_unflatten(filled, spec)
            results[:] = [function(*args, **kwargs)]

        self.run(kind, call, written=())
        return tree_map_only(torch.Tensor, torch.clone, results[0])

    def _capture(self, call: Callable[[], None], written: Sequence[torch.Tensor]) -> torch.cuda.CUDAGraph:
        before = [tensor.clone() for tensor in written]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()  # kernels are loaded and libraries choose theirs before the capture, which neither may do
        torch.cuda.current_stream().wait_stream(side)
        for tensor, value in zip(written, before, strict=True):
            tensor.copy_(value)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            call()
        self._pool = self._pool or graph.pool()
        return graph


class CapturedForward:
    """In the place of a U-Net's `forward`; `kind` says what else than its arguments a call depends on."""

    def __init__(self, forward: Callable, graphs: Graphs, kind: Callable[[], Hashable]):
        self._forward, self._graphs, self._kind = forward, graphs, kind
        self.aside = False

    def __call__(self, sample: torch.Tensor, timestep, *args, **kwargs):
        if self.aside or torch.is_grad_enabled() or not sample.is_cuda:
            return self._forward(sample, timestep, *args, **kwargs)
        timestep = torch.as_tensor(timestep, device=sample.device)  # a number would be one graph for each
        return self._graphs.call(self._kind(), self._forward, sample, timestep, *args, **kwargs)


@contextmanager
def captured(unet, graphs: Graphs | None, kind: Callable[[], Hashable] = lambda: None) -> Iterator[None]:
    """Within the block the U-Net's forwards, whoever calls it, are replayed from graphs; None changes nothing.

    Only under `torch.no_grad()`, on a GPU, and where nothing hooks into its modules.
    """
    if graphs is None:
        yield
        return
    own = vars(unet).get("forward")
    unet.forward = CapturedForward(unet.forward, graphs, kind)
    try:
        yield
    finally:
        del unet.forward
        if own is not None:
            unet.forward = own


@contextmanager
def uncaptured(unet) -> Iterator[None]:
    """Within the block the U-Net's forwards are run as they are written, with hooks added meanwhile."""
    forward = vars(unet).get("forward")
    if not isinstance(forward, CapturedForward):
        yield
        return
    before, forward.aside = forward.aside, True
    try:
        yield
    finally:
        forward.aside = before
