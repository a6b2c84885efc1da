"""Rows of results: a CSV per subject, one row for each provider, case and device.

A new measurement replaces the row of the same key. The device is part of the key: figures of different devices never
share a row. The columns given here are those of an operation; another subject passes its own.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

__all__ = ["FIELDS", "KEY", "key_of", "read", "upsert"]

KEY = ("device", "op", "model", "layer", "masks", "N", "dtype", "provider")
FIELDS = (
    *KEY,
    "count",  # layers of this size in one forward of the U-Net
    "live",  # contexts alive on a token of the fused row, on average
    "p20_us",
    "p50_us",
    "p80_us",
    "samples",
    "peak_mb",  # memory of one call at its highest, the result included and the arguments not
    "floor_us",
    "floor_by",  # bytes, arithmetic or launch
    "share",  # of the floor: floor_us / p50_us
    "copy_gbs",  # rates measured in the same run, which the floor is made of
    "matrix_tflops",
    "sm_mhz",
    "memory_mhz",
    "watts",
    "versions",
    "implementation",  # of ours: a hash of its sources, and the kernel's configuration
    "date",
)


def key_of(row: Mapping[str, object], key: Sequence[str] = KEY) -> tuple[str, ...]:
    """What a row is about."""
    return tuple(str(row[name]) for name in key)


def read(path: Path) -> list[dict[str, str]]:
    """All rows of a file, none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def upsert(
    path: Path, rows: Iterable[Mapping[str, object]], key: Sequence[str] = KEY, fields: Sequence[str] = FIELDS
) -> None:
    """Write rows into the file, each in the place of the one with its key. All of them are written, or none.

    Raises `ValueError` for a row without a full key, or with a column that is not one.
    """
    rows = list(rows)
    reasons = [f"row {i} has no {name}" for i, row in enumerate(rows) for name in key if row.get(name) in (None, "")]
    reasons += [f"row {i} has {name}, no column" for i, row in enumerate(rows) for name in row if name not in fields]
    if reasons:
        raise ValueError("results: " + "; ".join(reasons))
    table = {key_of(row, key): row for row in [*read(path), *rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(".partial")
    with written.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(table[place] for place in sorted(table, key=lambda place: _order(key, place)))
    os.replace(written, path)


def _order(names: Sequence[str], key: tuple[str, ...]) -> list[tuple[int, str]]:
    """Numbers by value: N = 8 before 12, and large maps first as in a U-Net."""
    found = []
    for name, value in zip(names, key, strict=True):
        side = value.split("x")[0] if name == "layer" else ""
        found.append((-int(side) if side.isdigit() else int(value) if value.isdigit() else 0, value))
    return found
