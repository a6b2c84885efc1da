"""Calls captured in CUDA graphs: launched at once, without the host between their kernels."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from weaver.compiled import compile_whole, hook_paths, is_compiled
from weaver.errors import WeaverError
from weaver.memory.resting import hooked

__all__ = ["CapturedForward", "CUDAGraphs", "captured", "graph_reasons", "graphs_for", "lasting", "uncaptured"]

# What of a module its forward depends on besides its weights: PEFT's adapters and diffusers' FreeU.
_SWITCHES = ("scaling", "active_adapters", "disable_adapters", "merged", "s1", "s2", "b1", "b2")
_PLAIN = (bool, int, float, str, list, tuple, dict)


def graph_reasons(unet, graphs) -> list[str]:
    """Why a U-Net's forwards can't be captured, where that is asked for: `graphs` is neither None nor False."""
    if graphs is None or graphs is False or not isinstance(unet, nn.Module):
        return []
    if not isinstance(graphs, CUDAGraphs | bool):
        return [f"graphs is a {type(graphs).__name__}, expected True or a weaver.graphs.CUDAGraphs"]
    if unet.device.type != (graphs.device_type if isinstance(graphs, CUDAGraphs) else CUDAGraphs.device_type):
        return [f"graphs need a CUDA device, the U-Net is on {unet.device}"]
    if getattr(graphs, "compiled", False) and any(map(is_compiled, unet.modules())):
        return ["graphs that compile the U-Net as a whole can't be had where parts of it are compiled already"]
    if hooked(unet):
        return ["graphs can't be had of a U-Net whose modules are hooked into (offload, caching): remove the hooks"]
    if paths := hook_paths(unet):
        return [
            f"graphs don't call forward hooks when they are replayed, {paths[0] or 'the U-Net'} has some: remove them"
        ]
    return []


class CUDAGraphs:
    """One graph for each kind of call; all of them share their memory.

    What a call reads besides the tensors it is given, weights above all, must stay where it is. What is on the host is
    settled when a call is captured. Under autocast, which makes tensors that go with it, nothing is replayed.

    compiled : compile a U-Net's forward as a whole before it is captured, with what is hooked into it: minutes for each
        kind of call, and a third off each step after that, for what is drawn again and again
    """

    device_type = "cuda"

    def __init__(self, compiled: bool = False):
        self.compiled = compiled
        self._follows: tuple = (lambda: None, None)
        self._device: torch.device | None = None
        self.clear()

    def clear(self) -> None:
        """Forget all graphs, and give their memory back."""
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._calls: dict[Hashable, tuple[list[torch.Tensor], list]] = {}
        self._pool = None
        self.sampler = None  # a FusionSampler with graphs of its own, which `weave` keeps from one call to the next

    def __len__(self) -> int:
        return len(self._graphs)

    def __bool__(self) -> bool:
        return True  # also without a graph yet

    def follow(self, unet: nn.Module) -> None:
        """Say that the calls from now on are this U-Net's: all graphs are forgotten where it is another than before, or
        its weights were moved, or adapters, processors or hooks have changed."""
        mark = _mark(unet)
        if self._follows[0]() is not unet or self._follows[1] != mark:
            self.clear()
            self._follows = (weakref.ref(unet), mark)

    def another(self) -> CUDAGraphs:
        """Others of this kind, without any graph yet."""
        return type(self)(compiled=self.compiled)

    def best(self, forward: Callable) -> Callable:
        """What is to be captured of a forward: itself, or it compiled."""
        return compile_whole(forward) if self.compiled else forward

    def run(self, kind: Hashable, call: Callable[[], None], written: Sequence[torch.Tensor]) -> None:
        """Replay the graph of this kind of call, captured at its first one; `written` are the tensors it writes to.

        The call reads and writes tensors that stay where they are (`lasting`).
        """
        if torch.is_autocast_enabled("cuda"):
            call()
            return
        with torch.cuda.device(written[0].device if written else self._device):
            if kind not in self._graphs:
                self._graphs[kind] = self._capture(call, written)
            self._graphs[kind].replay()

    def call(self, kind: Hashable, function: Callable, *args, **kwargs) -> Any:
        """What the function returns, by the graph of this kind, of such shapes and of these numbers.

        Arguments and results are tensors in any nesting, at least one on a GPU, copied in and out: results stay as they
        are at the next call. Arguments that are no tensors are the same where they are equal and of one type; with one
        that can't be compared so, the function is just called.
        """
        leaves, spec = tree_flatten((args, kwargs))
        others = tuple((type(leaf), leaf) for leaf in leaves if not isinstance(leaf, torch.Tensor))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        kind = (kind, str(spec), others, *((x.shape, x.dtype) for x in tensors))
        try:
            known = kind in self._calls
        except TypeError:  # of a leaf without a hash
            return function(*args, **kwargs)
        if not known:
            self._device = next(x.device for x in tensors if x.device.type == self.device_type)
            self._calls[kind] = [lasting(x, self._device) for x in tensors], []
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
        with torch.cuda.graph(graph, pool=self._pool, stream=side):
            call()
        self._pool = self._pool or graph.pool()
        return graph


def graphs_for(graphs: CUDAGraphs | bool | None) -> CUDAGraphs | None:
    """Empty graphs: those given, new ones for True, none for False or None."""
    if not graphs:
        return None
    found = graphs if isinstance(graphs, CUDAGraphs) else CUDAGraphs()
    found.clear()
    return found


class CapturedForward:
    """In the place of a U-Net's `forward`; `kind` says what else than its arguments a call depends on."""

    def __init__(self, forward: Callable, graphs: CUDAGraphs, kind: Callable[[], Hashable]):
        self._forward, self._graphs, self._kind = forward, graphs, kind
        self._captured = graphs.best(forward)
        self.eager = False

    def __call__(self, sample: torch.Tensor, timestep, *args, **kwargs):
        elsewhere = sample.device.type != self._graphs.device_type
        if self.eager or elsewhere or torch.is_grad_enabled() or torch.is_autocast_enabled("cuda"):
            return self._forward(sample, timestep, *args, **kwargs)
        timestep = torch.as_tensor(timestep, device=sample.device)  # a number would be one graph for each
        return self._graphs.call(self._kind(), self._captured, sample, timestep, *args, **kwargs)


@contextmanager
def captured(unet, graphs: CUDAGraphs | None, kind: Callable[[], Hashable] = lambda: None) -> Iterator[None]:
    """Within the block the U-Net's forwards, whoever calls it, are replayed from graphs; None changes nothing.

    Only under `torch.no_grad()` and on a GPU. Adapters, processors and hooks must stay as they are within the block.
    Raises `WeaverError` in a block of the same U-Net.
    """
    if graphs is None:
        yield
        return
    own = vars(unet).get("forward")
    if isinstance(own, CapturedForward):
        raise WeaverError("The U-Net's forwards are captured already: leave that block first, or ask for graphs once")
    graphs.follow(unet)
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
    before, forward.eager = forward.eager, True
    try:
        yield
    finally:
        forward.eager = before


def lasting(tensor: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
    """Memory like a tensor's, on its device or another, that can be written over in inference mode and out of it."""
    with torch.inference_mode(False):
        return torch.empty_like(tensor, device=device, requires_grad=False)


def _mark(unet: nn.Module) -> tuple:
    """What a captured forward of the U-Net holds: where its weights are, and what the host decides by."""
    found = [tuple(tensor.data_ptr() for tensor in (*unet.parameters(), *unet.buffers()))]
    for module in unet.modules():
        switches = (getattr(module, name, None) for name in _SWITCHES)
        hooks = len(module._forward_hooks), len(module._forward_pre_hooks)
        told = (repr(value) if isinstance(value, _PLAIN) else "" for value in switches)
        found.append((type(module), type(getattr(module, "processor", None)), *hooks, *told))
    return tuple(found)
