"""The figures that `context_attention` is to reach, and what was measured of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from benchmarks.providers import PROVIDERS
from benchmarks.sums import Setting, best, unet_ms

__all__ = ["CPU", "GPU", "targets"]

MODEL, LARGE = "sd21", 2304  # tokens
COUNTS = (1, 3, 8)

Sums = Mapping[tuple[str, int], float]
Rows = Sequence[Mapping[str, str]]


def _gain(rivals: Sequence[str], n: int) -> Callable[[Sums, Rows], str | None]:
    """How many times longer than ours the best rival takes."""

    def found(sums: Sums, rows: Rows) -> str | None:
        least = best(sums, n, rivals)
        return None if least is None or ("ours", n) not in sums else f"{least / sums['ours', n]:.2f}"

    return found


def _growth(sums: Sums, rows: Rows) -> str | None:
    """Of every model, by its name."""
    found = []
    for model in dict.fromkeys(row["model"] for row in rows):
        ours = unet_ms([row for row in rows if row["model"] == model], model)
        if {("ours", 1), ("ours", 8)} <= ours.keys():
            found.append(f"{ours['ours', 8] / ours['ours', 1]:.2f} ({model})")
    return ", ".join(found) or None


def _varlen(sums: Sums, rows: Rows) -> str | None:
    there = [n for n in COUNTS if {("ours", n), ("sorted varlen", n)} <= sums.keys()]
    return ", ".join(f"{sums['ours', n] / sums['sorted varlen', n]:.2f} (N={n})" for n in there) or None


def _large_layers(sums: Sums, rows: Rows) -> str | None:
    """The least share of the floor of our large layers, and which of how many measured ones it is."""
    shares = {
        (row["model"], row["layer"], int(row["N"])): float(row["share"])
        for row in rows
        if row["provider"] == "ours" and int(row["N"]) in COUNTS and int(row["layer"].split("x")[0]) ** 2 >= LARGE
    }
    if not shares:
        return None
    (model, layer, n), share = min(shares.items(), key=lambda item: item[1])
    return f"{share:.0%} ({model} {layer}, N={n}, of {len(shares)} measured)"


OTHERS = tuple(name for name in PROVIDERS if name != "ours")
CPU = {
    "N=3: at least 1.3 times as fast as the better of eager and SDPA + einsum": _gain(("eager", "sdpa + einsum"), 3),
    "N=8: at least 2.3 times as fast as the better of eager and SDPA + einsum": _gain(("eager", "sdpa + einsum"), 8),
    "at most 1.0 times the time of sorted varlen": _varlen,
    "N=8: at most 1.3 times the time of N=1": _growth,
}
GPU = {
    "at least 75 % of the floor where T >= 2304, at N = 1, 3, 8, all models: the least of them": _large_layers,
    "N=3: at least 1.7 times as fast as the best other": _gain(OTHERS, 3),
    "N=3: at least 5 times as fast as the eager loop, captured too": _gain(("eager",), 3),
    "N=8: at most 1.2 times the time of N=1": _growth,
}


def targets(by_setting: Mapping[Setting, Rows], wanted: Mapping[str, Callable], dtype: str) -> dict[str, str | None]:
    """What was measured of each target in a type, with hard masks; None where nothing was.

    Sums are of SD 2.1 at 768; shares of the floor, and what more concepts cost, are of every model.
    """
    chosen = {key.model: rows for key, rows in by_setting.items() if (key.dtype, key.masks) == (dtype, "hard")}
    sums = unet_ms(chosen.get(MODEL, []), MODEL)
    rows = [row for found in chosen.values() for row in found]
    return {name: measure(sums, rows) for name, measure in wanted.items()}
