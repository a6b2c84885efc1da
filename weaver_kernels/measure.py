"""Time configurations of a kernel against each other on a GPU, each checked before.

Every configuration is a captured graph over several sets of buffers, more than the second-level cache holds, and
configurations take turns, so that a change of clocks falls on all. An error of the device is not caught: nothing runs
after it (`weaver_kernels.child`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from statistics import median
from typing import Protocol, TypeVar

import torch

from weaver_kernels.child import Running

__all__ = [
    "Inputs",
    "eager_error",
    "interleaved_medians",
    "relative_error",
    "time_each",
    "true_result",
    "why_wrong",
]

Key = TypeVar("Key", bound=Hashable)
Config = TypeVar("Config", bound=tuple)
T = TypeVar("T")
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
