"""What a U-Net forward takes by the rows of its layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from benchmarks.shapes import MODELS

__all__ = ["Setting", "best", "settings", "unet_ms"]

Row = Mapping[str, str]


class Setting(NamedTuple):
    """What rows must have in common to be added up or compared."""

    device: str
    dtype: str
    model: str
    masks: str


def settings(rows: Iterable[Row]) -> dict[Setting, list[Row]]:
    """Rows by setting; models in their order, hard masks before soft ones."""
    found = defaultdict(list)
    for row in rows:
        found[Setting(*(row[name] for name in Setting._fields))].append(row)
    order = list(MODELS)
    return {
        setting: found[setting]
        for setting in sorted(found, key=lambda s: (s.device, s.dtype, order.index(s.model), s.masks))
    }


def unet_ms(rows: Sequence[Row], model: str, column: str = "p50_us") -> dict[tuple[str, int], float]:
    """Milliseconds of all cross-attentions of a forward by (provider, N); none where a layer is not measured."""
    by_layer = {(row["provider"], int(row["N"]), row["layer"]): float(row[column]) for row in rows}
    layers = {str(geometry): geometry.count for geometry in MODELS[model].layers}
    found = {}
    for provider, n in dict.fromkeys((provider, n) for provider, n, _ in by_layer):
        parts = [by_layer.get((provider, n, layer)) for layer in layers]
        if None not in parts:
            found[provider, n] = sum(map(float.__mul__, parts, map(float, layers.values()))) / 1000
    return found


def best(sums: Mapping[tuple[str, int], float], n: int, providers: Iterable[str]) -> float | None:
    """The least of these providers at N; None where none of them is measured."""
    return min((sums[name, n] for name in providers if (name, n) in sums), default=None)
