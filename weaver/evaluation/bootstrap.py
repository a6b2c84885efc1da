"""Confidence intervals by the bootstrap over prompts, the same resamples for every arm.

Pictures of one prompt are alike, so prompts are what is drawn again, with all their seeds and concepts (Efron, 1979).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from weaver.errors import WeaverError

__all__ = ["RESAMPLES", "Interval", "difference", "mean", "resample"]

RESAMPLES = 4000
_INSIDE = (2.5, 97.5)  # percentiles: 95 %


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval, of so many prompts; NaN where there is nothing to take it of."""

    value: float
    low: float
    high: float
    prompts: int

    def as_mapping(self) -> dict:
        """Plain values, None for NaN, which JSON does not have."""
        return {name: None if value != value else value for name, value in asdict(self).items()}


def resample(prompts: int, count: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """How often each prompt is drawn in each resample: [count, prompts] whole numbers, rows sum to `prompts`."""
    if prompts < 1:
        raise WeaverError(f"{prompts} prompts: there is nothing to draw again")
    return np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), size=count)


def mean(sums: np.ndarray, counts: np.ndarray, drawn: np.ndarray) -> Interval:
    """The mean of what was measured, and its interval.

    Parameters
    ----------
    sums, counts : of each prompt [P], the sum of its values and how many there are, 0 where the prompt has none
    drawn : [R, P] as `resample` gives it
    """
    there = int((counts > 0).sum())
    if not there:
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    low, high = np.nanpercentile(_ratios(sums, counts, drawn), _INSIDE)
    return Interval(float(sums.sum() / counts.sum()), float(low), float(high), there)


def difference(first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray], drawn) -> Interval:
    """How much larger the mean of `first` is than that of `second`, both (sums, counts) of the same prompts, paired.

    Only prompts that both have a value for count.
    """
    both = (first[1] > 0) & (second[1] > 0)
    if not both.any():
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    pairs = [(np.where(both, sums, 0), np.where(both, counts, 0)) for sums, counts in (first, second)]
    value = np.subtract(*(sums.sum() / counts.sum() for sums, counts in pairs))
    low, high = np.nanpercentile(np.subtract(*(_ratios(*pair, drawn) for pair in pairs)), _INSIDE)
    return Interval(float(value), float(low), float(high), int(both.sum()))


def _ratios(sums: np.ndarray, counts: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """The mean of every resample [R]; NaN for one that has drawn no prompt with a value."""
    total = drawn @ counts
    return np.divide(drawn @ sums, total, out=np.full(len(drawn), np.nan), where=total > 0)
