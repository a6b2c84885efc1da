"""From providers to rows: every provider is checked against float64, then all are timed in turn.

A provider that is wrong is neither timed nor recorded. One that can't run here is left out, and the reason is told.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import torch

from benchmarks.floors import Floor, Rates
from benchmarks.machine import watched
from benchmarks.timing import Clock, interleave, quantiles, timed

__all__ = ["Candidate", "Measured", "measure", "tell", "token_error", "tolerance"]


@dataclass(frozen=True)
class Candidate:
    """A provider on a case: what its row says of it, its calls, and what the first of them must return."""

    about: Mapping[str, object]  # the key's columns, and others that are known beforehand
    make_calls: Callable[[], Sequence[Callable[[], torch.Tensor]]]  # the same work, each on arguments of its own
    true: torch.Tensor  # float64
    dtype: torch.dtype
    floor: Floor


@dataclass
class Measured:
    """Rows to be recorded, and of what there is none: what was wrong, and what could not run."""

    rows: list[dict[str, object]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def tolerance(dtype: torch.dtype) -> float:
    """Of `token_error`: eight roundings to the type, and as many of the logits to float32, which go on as they are."""
    return 8 * (torch.finfo(dtype).eps + torch.finfo(torch.float32).eps)


def token_error(out: torch.Tensor, true: torch.Tensor) -> float:
    """The largest error of a token [..., T, H, D], as a part of that token's length; NaN where there is one."""
    true = true.to(out.device)
    error = (out.double() - true).flatten(-2).norm(dim=-1) / true.flatten(-2).norm(dim=-1)
    return float(error.max())


def measure(
    candidates: Sequence[Candidate],
    device: torch.device,
    rates: Rates,
    rounds: int,
    clock: Clock = time.perf_counter,
) -> Measured:
    """Check and time candidates that belong together, in turn, on a CPU by this clock."""
    found, ready = Measured(), {}
    for i, candidate in enumerate(candidates):
        name = f"{candidate.about['provider']}, N = {candidate.about['N']}"
        try:
            call = timed(candidate.make_calls(), device, clock)
        except Exception as error:  # other people's code, on a device it may not know
            reason = next(iter(str(error).strip().splitlines()), "")
            found.left_out.append(f"{name}: {type(error).__name__} {reason}")
            continue
        error = token_error(call.result, candidate.true)
        if not error <= tolerance(candidate.dtype):  # NaN is no less than anything
            found.wrong.append(f"{name} is wrong by {error:.1e}, more than {tolerance(candidate.dtype):.1e}")
            continue
        ready[i] = call
    with watched(device) as readings:
        samples = interleave(ready, rounds)
    for i, of_one in samples.items():
        times = _times(of_one, candidates[i].floor)
        rest = {"peak_mb": _short(ready[i].peak / 1e6), "samples": len(of_one), **_rates(rates), **readings.notes}
        found.rows.append({**candidates[i].about, **times, **rest, "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M}"})
    return found


def tell(found: Measured) -> None:
    """What has no row, and why."""
    for line in found.left_out:
        print(f"    not measured: {line}", flush=True)
    for line in found.wrong:
        print(f"    NOT RECORDED: {line}", file=sys.stderr, flush=True)


def _times(samples: Sequence[float], floor: Floor) -> dict[str, object]:
    p20, p50, p80 = quantiles(samples)
    found = {"p20_us": p20 * 1e6, "p50_us": p50 * 1e6, "p80_us": p80 * 1e6, "floor_us": floor.seconds * 1e6}
    return {name: _short(value) for name, value in found.items()} | {
        "floor_by": floor.by,
        "share": _short(floor.seconds / p50),
    }


def _rates(rates: Rates) -> dict[str, object]:
    return {"copy_gbs": _short(rates.copy / 1e9), "matrix_tflops": _short(rates.matrix / 1e12)}


def _short(value: float) -> str:
    """Four digits, more than any of this repeats to."""
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
