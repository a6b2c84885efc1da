"""Time configurations of a kernel against each other on a GPU, each checked before.

Of `context_attention` the layers are the cross-attentions of Stable Diffusion's U-Nets with three concepts, whose
tokens have two live contexts each. Every configuration is a captured graph over several sets of buffers, more than the
second-level cache holds, and configurations take turns, so that a change of clocks falls on all. An error of the device
is not caught: nothing runs after it (`weaver_kernels.child`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F

from weaver_kernels.child import Running
from weaver_kernels.context_attention import ContextPlan, context_attention_reference
from weaver_kernels.tuning import KernelConfig
from weaver_kernels.unets import TEXT, Geometry, layers_of

__all__ = [
    "LayerInputs",
    "eager_error",
    "interleaved_medians",
    "make_inputs",
    "relative_error",
    "time_configs",
    "time_each",
    "true_result",
    "why_wrong",
]

Key = TypeVar("Key", bound=Hashable)
Config = TypeVar("Config", bound=tuple)
T = TypeVar("T")
CONCEPTS, SUPPRESSION = 3, 0.5
ROUNDS, MOST_COPIES = 25, 48


class Inputs(Protocol):
    """One set of buffers of an operation: what its kernel makes of them, what is true, and what PyTorch makes."""

    out: torch.Tensor

    def reset(self) -> None: ...
    def launch(self, config: tuple) -> torch.Tensor: ...
    def truth(self) -> torch.Tensor: ...
    def eager(self) -> torch.Tensor: ...
    def again(self) -> Inputs: ...

    @property
    def bytes(self) -> int: ...


@dataclass(frozen=True)
class LayerInputs:
    """One set of buffers; `out` is written by `launch`."""

    q: torch.Tensor  # [B, T, H, D] or [B, S, T, H, D]
    k: torch.Tensor  # [S', L, H, D]
    v: torch.Tensor
    plan: ContextPlan
    out: torch.Tensor  # [B, T, H, D]

    def launch(self, config: KernelConfig) -> torch.Tensor:
        """The kernel as the operation launches it, with this configuration."""
        from weaver_kernels.context_attention.launch import launch

        plan = self.plan
        scale = self.q.shape[-1] ** -0.5
        contexts = (self.k, self.v, plan.weights, None)
        return launch(self.q, *contexts, scale, plan.lists, plan.tile_sizes, config, self.out)

    def reset(self) -> None:
        """To NaN, so that what is not written shows."""
        self.out.fill_(float("nan"))

    def truth(self) -> torch.Tensor:
        """The reference in float64, [B, T, H, D]."""
        tensors = (x.double() for x in (self.q, self.k, self.v, self.plan.weights))
        return context_attention_reference(*tensors, self.plan.context_index)

    def eager(self) -> torch.Tensor:
        """A loop over the contexts with PyTorch's attention, in the type of the inputs."""
        weights = self.plan.weights.to(self.q.dtype)
        out = torch.zeros_like(self.out)
        for s in range(weights.shape[1]):
            q = self.q if self.q.ndim == 4 else self.q[:, s]
            k, v = (x[s].expand(len(q), -1, -1, -1) for x in (self.k, self.v))
            attended = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
            out += weights[:, s, :, None, None] * attended
        return out

    def again(self) -> LayerInputs:
        """Other buffers with other numbers, and the same plan."""
        q, k, v = (torch.randn_like(x) for x in (self.q, self.k, self.v))
        return LayerInputs(q, k, v, self.plan, torch.empty_like(self.out))

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.q, self.k, self.v, self.out))


def make_inputs(
    layer: Geometry, dtype: torch.dtype, *, q_each: bool, tile_sizes: Sequence[int], device: str = "cuda"
) -> LayerInputs:
    """A fused row, whose concepts and background stand side by side over the base, and a negative row."""
    label = torch.arange(layer.tokens, device=device) % layer.side * (CONCEPTS + 1) // layer.side
    weights = torch.zeros(2, CONCEPTS + 3, layer.tokens, device=device)
    for s in range(CONCEPTS + 1):
        weights[0, s] = (label == s) * (1 + SUPPRESSION)
    weights[0, CONCEPTS + 1] = -SUPPRESSION
    weights[1, CONCEPTS + 2] = 1
    contexts = (weights.shape[1],) if q_each else ()
    q = torch.randn(2, *contexts, layer.tokens, layer.heads, layer.dim, device=device).to(dtype)
    k, v = torch.randn(2, weights.shape[1], TEXT, layer.heads, layer.dim, device=device).to(dtype)
    plan = ContextPlan(weights, merge=False, tile_sizes=tile_sizes)
    out = torch.empty(2, layer.tokens, layer.heads, layer.dim, dtype=dtype, device=device)
    return LayerInputs(q, k, v, plan, out)


def true_result(inputs: Inputs) -> torch.Tensor:
    """The reference in float64."""
    return inputs.truth()


def relative_error(out: torch.Tensor, true: torch.Tensor) -> float:
    """Length of the difference over that of the truth; NaN where `out` has one."""
    return float((out.double() - true).norm() / true.norm())


def eager_error(inputs: Inputs, true: torch.Tensor) -> float:
    """Relative error of PyTorch, in the type of the inputs."""
    return relative_error(inputs.eager(), true)


def why_wrong(inputs: Inputs, config: tuple, true: torch.Tensor, limit: float) -> str:
    """Launch once; empty when the result is within `limit` of the truth, else the reason."""
    from triton.runtime.errors import OutOfResources

    inputs.reset()
    try:
        error = relative_error(inputs.launch(config), true)
    except OutOfResources as failure:  # which only loading shows
        return str(failure)
    return "" if error <= limit else f"wrong by {error:.1e}, {limit:.1e} is allowed"


def interleaved_medians(runs: Mapping[Key, Callable[[], float]], rounds: int) -> dict[Key, float]:
    """The median of what each of `runs` returns, a time: every round has each of them once."""
    times: dict[Key, list[float]] = {key: [] for key in runs}
    for _ in range(rounds):
        for key, run in runs.items():
            times[key].append(run())
    return {key: median(found) for key, found in times.items()}


def time_configs(
    head_dim: int,
    dtype: torch.dtype,
    q_each: bool,
    configs: Sequence[KernelConfig],
    tell: Callable[[str], None],
    running: Running = nullcontext,
    device: str = "cuda",
) -> dict[KernelConfig, float]:
    """`time_each` of the cross-attentions of a head dimension."""
    make = partial(make_inputs, dtype=dtype, q_each=q_each, device=device)
    layers = [(layer.count, partial(make, layer)) for layer in layers_of(head_dim)]
    return time_each(layers, configs, tell, running)


def time_each(
    layers: Sequence[tuple[int, Callable[..., Inputs]]],
    configs: Sequence[Config],
    tell: Callable[[str], None],
    running: Running = nullcontext,
) -> dict[Config, float]:
    """Microseconds of each configuration for all layers; those that are wrong are only told.

    layers : how often each counts, and what makes its inputs for `tile_sizes`; running : entered while the kernel runs
    with a configuration, and left when the device has done all of it
    """

    def within(config: Config, work: Callable[[], T]) -> T:
        with running(config):
            return work()

    totals = dict.fromkeys(configs, 0.0)
    for count, make in layers:
        inputs = make(tile_sizes=sorted({config.tile for config in totals}))
        true = true_result(inputs)
        limit = 2 * eager_error(inputs, true)
        for config in list(totals):
            if reason := within(config, partial(why_wrong, inputs, config, true, limit)):
                tell(f"  {tuple(config)} {reason}")
                del totals[config]
        if not totals:
            break
        copies = min(MOST_COPIES, 1 + 2 * _cache_bytes() // inputs.bytes)
        sets = [inputs, *(inputs.again() for _ in range(copies - 1))]
        replays = {config: within(config, partial(_captured, sets, config)) for config in totals}
        runs = {config: partial(within, config, replay) for config, replay in replays.items()}
        times = interleaved_medians(runs, ROUNDS)
        for config, microseconds in times.items():
            totals[config] += count * microseconds
    return totals


def _cache_bytes() -> int:
    return torch.cuda.get_device_properties(0).L2_cache_size


def _captured(sets: Sequence[Inputs], config: tuple) -> Callable[[], float]:
    """A graph with one launch for each set of buffers; calling it replays it and returns microseconds a launch."""
    for inputs in sets:
        inputs.launch(config)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for inputs in sets:
            inputs.launch(config)
    return partial(_replay, graph, len(sets))


def _replay(graph: torch.cuda.CUDAGraph, launches: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return 1000 * start.elapsed_time(end) / launches
