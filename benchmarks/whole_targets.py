"""The figures that the whole is to reach, and what was measured of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

__all__ = ["WHOLE_CPU", "WHOLE_GPU", "Found", "index", "verdicts"]

Index = Mapping[tuple, Mapping[str, str]]
Found = tuple[str, bool] | None  # what was measured, and whether that is enough
STEPS = ("injected step", "free step")
EAGER, CAPTURED, PLAIN, COMPILED = (
    "one pass, eager",
    "one pass, captured",
    "guided",
    "guided, compiled and captured",
)


def index(rows: Sequence[Mapping[str, str]]) -> dict[tuple, Mapping[str, str]]:
    """A device's rows of one type by model, part, provider, state, N and variants."""
    return {
        (row["model"], row["part"], row["provider"], row["state"], int(row["N"]), int(row["variants"])): row
        for row in rows
    }


def _ratios(index: Index, model: str, parts: Sequence[str], rival: str, n: int) -> dict[str, float]:
    """How many times ours the rival takes, by part."""
    rows = {part: index.get((model, part, rival, "warm", n, 1)) for part in parts}
    return {part: float(row["of_ours"]) for part, row in rows.items() if row}


def _at_most_of(model: str, rival: str, n: int, limit: float) -> Callable[[Index], Found]:
    """A step takes at most so many times the rival's."""

    def found(index: Index) -> Found:
        ours = {part: 1 / ratio for part, ratio in _ratios(index, model, STEPS, rival, n).items()}
        text = ", ".join(f"{ratio:.2f} ({part})" for part, ratio in ours.items())
        return (text, max(ours.values()) <= limit) if ours else None

    return found


def _times_as_fast(model: str, parts: Sequence[str], rival: str, n: int, least: float) -> Callable[[Index], Found]:
    def found(index: Index) -> Found:
        ratios = _ratios(index, model, parts, rival, n)
        text = ", ".join(f"{ratio:.2f} ({part})" for part, ratio in ratios.items())
        return (text, min(ratios.values()) >= least) if ratios else None

    return found


def _seconds(model: str, state: str, parts: Sequence[str], n: int, limit: float) -> Callable[[Index], Found]:
    """The sum of stages; where a row says so, nothing may have been compiled or captured meanwhile."""

    def found(index: Index) -> Found:
        rows = [index.get((model, part, "ours", state, n, 1)) for part in parts]
        if None in rows:
            return None
        seconds, made = sum(float(row["p50_s"]) for row in rows), sum(int(row["made"] or 0) for row in rows)
        return f"{seconds:.2f} s" + (f", {made} compiled or captured" if made else ""), seconds <= limit and not made

    return found


def _each_variant(model: str, n: int, limit: float) -> Callable[[Index], Found]:
    def found(index: Index) -> Found:
        rows = {key[5]: row for key, row in index.items() if key[:5] == (model, "variants", "ours", "warm", n)}
        if not rows:
            return None
        most = max(rows)
        each = float(rows[most]["p50_s"]) / most
        return f"{each:.2f} s (of {most})", each <= limit

    return found


def _skipped(index: Index) -> Found:
    """The part of the inversion's stage that a warm run does without."""
    rows = {key[3]: float(row["p50_s"]) for key, row in index.items() if key[:3] == ("embedded", "inversion", "ours")}
    if not {"cold", "warm"} <= rows.keys():
        return None
    part = 1 - rows["warm"] / rows["cold"]
    return f"{part:.1%}", part >= 0.95


_STAGE = ("fusion stage",)
WHOLE_GPU: dict[str, Callable[[Index], Found]] = {
    "SD 2.1 at 768, N=8, stored features: a fused step at most 1.05 times a plain guided one, compiled and captured": (
        _at_most_of("sd21", COMPILED, 8, 1.05)
    ),
    "SD 2.1 at 768, 50 + 50 steps, N=3: inversion and fusion at most 1.3 s": (
        _seconds("sd21", "cold", ("inversion", "fusion"), 3, 1.3)
    ),
    "the same: each further variant at most 0.8 s": _each_variant("sd21", 3, 0.8),
    "the same: a changed mask at most 0.8 s, nothing compiled or captured": (
        _seconds("sd21", "warm", ("changed mask",), 3, 0.8)
    ),
    "the same: a changed concept at most 0.8 s, nothing compiled or captured": (
        _seconds("sd21", "warm", ("changed concept",), 3, 0.8)
    ),
    "the same: the fusion stage at least 3 times as fast as one pass, eager": (
        _times_as_fast("sd21", _STAGE, EAGER, 3, 3.0)
    ),
    "the same: at least 1.3 times as fast as one pass, captured": _times_as_fast("sd21", _STAGE, CAPTURED, 3, 1.3),
    "the same, with a 50-step SDXL template: the whole process at most 5 s": (
        _seconds("sd21", "cold", ("whole",), 3, 5.0)
    ),
}
WHOLE_CPU: dict[str, Callable[[Index], Found]] = {
    "embedded, N=8: a fused step at most 1.25 times a plain guided one": _at_most_of("embedded", PLAIN, 8, 1.25),
    "embedded, N=3: a fused step at least 1.4 times as fast as one pass, eager": (
        _times_as_fast("embedded", STEPS, EAGER, 3, 1.4)
    ),
    "embedded, N=8: a fused step at least 1.8 times as fast as one pass, eager": (
        _times_as_fast("embedded", STEPS, EAGER, 8, 1.8)
    ),
    "embedded: a warm run skips at least 95 % of the inversion's time": _skipped,
}


def verdicts(rows: Sequence[Mapping[str, str]], wanted: Mapping[str, Callable[[Index], Found]]) -> dict[str, Found]:
    """Of each target what a device's rows of one type say; None where there are none."""
    of_device = index(rows)
    return {name: measure(of_device) for name, measure in wanted.items()}
