"""What was found good on which device, read from `configs/*.json`: block sizes of kernels and thresholds are data."""

from __future__ import annotations

import json
import warnings
from functools import cache
from importlib.resources import files
from typing import NamedTuple

__all__ = ["KernelConfig", "config_table", "kernel_config", "tile_sizes"]


class KernelConfig(NamedTuple):
    """How a kernel is built: tokens of a tile, warps of a program, stages of its software pipeline."""

    tile: int
    warps: int
    stages: int


@cache
def config_table(op: str) -> dict:
    """The contents of `configs/<op>.json`."""
    return json.loads((files("weaver_kernels") / "configs" / f"{op}.json").read_text(encoding="utf-8"))


@cache
def kernel_config(op: str, head_dim: int, bits: int, arch: int) -> KernelConfig:
    """The configuration for heads of `head_dim` of a type of `bits` bits on compute capability `arch` (90 is 9.0).

    That of the next larger head dimension in the table serves the ones between. A device that is not in the table
    gets the table's default, which fits every device, and one warning.
    """
    table = config_table(op)
    rows = [row for row in table["rows"] if arch in row["arch"] and row["bits"] == bits and row["head_dim"] >= head_dim]
    if not rows:
        warnings.warn(
            f"{op} has no configuration for {bits}-bit heads of {head_dim} on compute capability {arch / 10}: a slow, "
            f"safe one is used. `make tune` on that device adds it to configs/{op}.json",
            stacklevel=2,
        )
        return KernelConfig(**table["default"])
    row = min(rows, key=lambda row: row["head_dim"])
    return KernelConfig(row["tile"], row["warps"], row["stages"])


@cache
def tile_sizes(op: str) -> tuple[int, ...]:
    """Every tile size that `kernel_config` may answer with, ascending."""
    table = config_table(op)
    return tuple(sorted({row["tile"] for row in [*table["rows"], table["default"]]}))
