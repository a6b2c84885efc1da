"""Whole pictures drawn in turn, and what every step of them took.

On a CPU it is the process's CPU time, so that other work on the machine falls on nobody; on a GPU its own clock, read
between steps, so that what the host does meanwhile counts where the device waits for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import torch

from benchmarks.samplers import Progress, Sampler

__all__ = ["CLOCKS", "Marks", "Refused", "agree", "in_turn", "kinds_of", "of_ours", "rounding", "seconds_of"]

CLOCKS = {"cpu": "CPU time", "cuda": "the device's events"}
ROUNDINGS = 8
Draw = Callable[[Progress | None], torch.Tensor]


class Refused(Exception):
    """Results that should be the same and are not: nothing is timed."""


class Marks:
    """Moments, and the seconds between them."""

    def __init__(self, device: torch.device):
        self.device, self.found = device, []

    def mark(self, *_) -> None:
        """Remember this moment."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.found.append(event)
        else:
            self.found.append(time.process_time())

    def seconds(self) -> list[float]:
        """From each mark to the next."""
        if self.device.type != "cuda":
            return [b - a for a, b in zip(self.found, self.found[1:], strict=False)]
        torch.cuda.synchronize(self.device)
        return [a.elapsed_time(b) / 1000 for a, b in zip(self.found, self.found[1:], strict=False)]


def rounding(sampler: Sampler, dtype: torch.dtype) -> float:
    """How far two ways to draw the same may be apart in a number of the latents.

    Eight roundings of the U-Net's output, whose numbers are about one, in every step by itself: times omega, times what
    DDIM adds it with, times what it multiplies the latents by from there on.
    """
    keep, add = sampler.table.double().cpu()
    later = keep.flip(0).cumprod(0).flip(0) / keep
    return ROUNDINGS * torch.finfo(dtype).eps * max(sampler.plan.guidance, 1) * float((add * later).norm())


def agree(latents: torch.Tensor, expected: torch.Tensor, allowed: float) -> float:
    """The distance of two results as a part of one's length; `Refused` where it is more than `allowed` a number."""
    distance, length = (float(x.double().norm()) for x in (latents - expected, expected))
    if not distance <= allowed * expected.numel() ** 0.5:  # NaN is no less than anything
        raise Refused(f"results that should be the same differ by {distance / length:.1e}: nothing is timed")
    return distance / length


def in_turn(draws: Mapping[str, Draw], device: torch.device, rounds: int) -> dict[str, list[list[float]]]:
    """By name, for every round the seconds of each step; the first step's hold what is set up before it."""
    found = {name: [] for name in draws}
    for turn in range(rounds):
        for name in sorted(draws, reverse=turn % 2 == 1):  # none always follows the same one
            marks = Marks(device)
            marks.mark()
            draws[name](marks.mark)
            found[name].append(marks.seconds())
    return found


def kinds_of(sites, steps: int) -> dict[str, list[int]]:
    """Kinds of steps and which they are: with all features injected, with none, and all of them.

    The first is of neither kind, because it holds what is set up before it.
    """
    resnet, attention = sites.resnet_steps(steps), sites.attention_steps(steps)
    kinds = {"injected step": range(1, min(resnet, attention)), "free step": range(max(resnet, attention), steps)}
    return {name: list(which) for name, which in {**kinds, "fusion stage": range(steps)}.items() if len(which)}


def seconds_of(times: Sequence[Sequence[float]], kind: str, which: Sequence[int]) -> list[float]:
    """Of every round, those of a step of this kind, or of the stage."""
    whole = [sum(of_round[step] for step in which) for of_round in times]
    return whole if kind == "fusion stage" else [seconds / len(which) for seconds in whole]


def of_ours(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """How many times ours it took: the median of the rounds' ratios."""
    return median(a / b for a, b in zip(theirs, ours, strict=True))
