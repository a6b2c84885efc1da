"""Seconds of a call, and the most memory it holds: on a GPU inside a CUDA graph, elsewhere as it is called.

Everything that is compared is sampled in turn, in another order each round, so that other work on the machine and the
device's clocks fall on all alike.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Hashable, Mapping, Sequence

import torch
from torch.profiler import ProfilerActivity, profile

from weaver.garbage import left_alone

__all__ = ["Clock", "GraphCall", "HostCall", "buffer_sets", "interleave", "quantiles", "timed"]

Call = Callable[[], torch.Tensor]
Clock = Callable[[], float]
SAMPLE = 0.01  # seconds that a sample takes at least: calls are repeated to fill them
MOST_REPEATS, MOST_SETS = 100, 64


class HostCall:
    """Calls on the CPU, taken in turn, by the wall clock or another one."""

    def __init__(self, calls: Sequence[Call], clock: Clock = time.perf_counter):
        self.calls, self.clock = calls, clock
        self.result = calls[0]()  # compiles what is compiled when first called
        self.peak = host_peak(calls[0])
        start = clock()
        calls[0]()
        self.repeats = _repeats(clock() - start)

    def sample(self) -> float:
        """Mean seconds of a call."""
        start = self.clock()
        for i in range(self.repeats):
            self.calls[i % len(self.calls)]()
        return (self.clock() - start) / self.repeats


class GraphCall:
    """Calls captured one after another in one CUDA graph: no launch waits for the host, no buffer for the cache."""

    def __init__(self, calls: Sequence[Call]):
        self.calls = calls
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:  # compiles, loads kernels and makes handles: none of it can be done in a capture
                call()
        torch.cuda.synchronize()
        self.peak = device_peak(calls[0])
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            results = [call() for call in calls]  # all kept, so that each is written to memory of its own
        for result in results:
            result.fill_(torch.nan)  # what the graph leaves unwritten shows
        self.graph.replay()
        torch.cuda.synchronize()
        self.results, self.result = results, results[0]
        self.repeats = 1
        self.repeats = _repeats(self.sample() * len(calls))

    def sample(self) -> float:
        """Mean seconds of a call, by the device's clock."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(self.repeats):
            self.graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / (self.repeats * len(self.calls))


def timed(calls: Sequence[Call], device: torch.device, clock: Clock = time.perf_counter) -> HostCall | GraphCall:
    """Run the calls once and make them ready to be sampled, on a CPU by this clock."""
    return GraphCall(calls) if device.type == "cuda" else HostCall(calls, clock)


def interleave(ready: Mapping[Hashable, HostCall | GraphCall], rounds: int) -> dict[Hashable, list[float]]:
    """Samples of each, one a round."""
    samples, order, rng = {name: [] for name in ready}, list(ready), random.Random(0)
    for _ in range(rounds):
        rng.shuffle(order)
        for name in order:
            samples[name].append(ready[name].sample())
    return samples


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile."""
    found = torch.tensor(samples, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    return tuple(found.tolist())


def buffer_sets(n_bytes: int, device: torch.device) -> int:
    """How many sets of arguments of `n_bytes` it takes so that none is in a GPU's L2 when its turn comes again."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(max(-(-2 * cache // n_bytes), 2), MOST_SETS)


def device_peak(call: Call) -> int:
    """Bytes that a call takes of the GPU's memory at its highest, its result included."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak


def host_peak(call: Call) -> int:
    """The same of PyTorch's allocations on the CPU."""
    with left_alone(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    del result
    held = peak = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _repeats(seconds: float) -> int:
    return min(max(round(SAMPLE / max(seconds, 1e-9)), 1), MOST_REPEATS)
