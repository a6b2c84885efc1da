"""What was found good on which device, read from `configs/*.json`: block sizes of kernels and thresholds are data."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

__all__ = [
    "ROW_KEY",
    "KernelConfig",
    "LoraConfig",
    "config_table",
    "default_config",
    "default_lora_config",
    "kernel_config",
    "lora_config",
    "rank_block",
    "source_hash",
    "tile_sizes",
    "with_row",
    "write_table",
]

ROW_KEY = ("bits", "q_each", "spread", "head_dim", "rank")  # what a row of a table is for, the device apart


class KernelConfig(NamedTuple):
    """How the kernel of `context_attention` is built: tokens of a tile, warps of a program, stages of its software
    pipeline, and whether shared queries go through that pipeline too, again for every context, instead of being held.
    """

    tile: int
    warps: int
    stages: int
    reload: bool = False


class LoraConfig(NamedTuple):
    """How the kernel of `routed_lora` is built: tokens of a tile, inputs and outputs at a time, warps of a program,
    stages of its software pipeline, and into how many programs a row is cut at least, where it has as many blocks."""

    tile: int
    inputs: int
    outputs: int
    warps: int
    stages: int
    programs: int


@cache
def config_table(op: str) -> dict:
    """The contents of `configs/<op>.json`."""
    return json.loads((files("weaver_kernels") / "configs" / f"{op}.json").read_text(encoding="utf-8"))


@cache
def kernel_config(op: str, head_dim: int, bits: int, arch: int, *, q_each: bool = False) -> KernelConfig:
    """The configuration for heads of `head_dim` of a type of `bits` bits on compute capability `arch` (90 is 9.0).

    `q_each`: with a query for each context. Rows of the table that say nothing about it serve both; one that does goes
    before. That of the next larger head dimension serves the ones between. A device that is not in the table gets the
    table's default for the width and the head dimension, which fits every device of 99 KiB of shared memory a block,
    and one warning.
    """
    rows = [row for row in config_table(op)["rows"] if arch in row["arch"]]
    rows = [row for row in _that_hold(rows, head_dim, bits) if row.get("q_each", q_each) == q_each]
    if not rows:
        warnings.warn(
            f"{op} has no configuration for {bits}-bit heads of {head_dim} on compute capability {arch / 10}: a slow, "
            f"safe one is used. `make tune` on that device adds it to configs/{op}.json",
            stacklevel=2,
        )
        config = default_config(op, head_dim, bits)
    else:
        row = min(rows, key=lambda row: (row["head_dim"], "q_each" not in row))
        config = _kernel_config(row)
    return config._replace(reload=config.reload and not q_each)


def rank_block(rank: int) -> int:
    """The power of two that a rank is held as; a matrix instruction takes no less than 16.

    >>> rank_block(1), rank_block(16), rank_block(33)
    (16, 16, 64)
    """
    return max(16, 1 << (rank - 1).bit_length())


@cache
def lora_config(rank: int, bits: int, arch: int, *, spread: bool = False) -> LoraConfig:
    """The configuration of `routed_lora` for a type of `bits` bits and adapters of ranks up to `rank`.

    `spread`: channels do not lie side by side. Rows of the table that say nothing about it serve both; one that does
    goes before. A device that is not in the table gets the table's default for the width, and one warning.
    """
    block = rank_block(rank)
    rows = [row for row in config_table("routed_lora")["rows"] if arch in row["arch"] and row["bits"] == bits]
    rows = [row for row in rows if row["rank"] >= block]
    rows = [row for row in rows if row.get("spread", spread) == spread]
    if not rows:
        warnings.warn(
            f"routed_lora has no configuration for {bits} bits and rank {block} on compute capability {arch / 10}: a "
            "slow, safe one is used. `make tune` on that device adds it to configs/routed_lora.json",
            stacklevel=2,
        )
        return default_lora_config(bits)
    return _lora_config(min(rows, key=lambda row: (row["rank"], "spread" not in row)))


def default_lora_config(bits: int) -> LoraConfig:
    """What a device that is not in the table gets for adapters of a type of `bits` bits."""
    return _lora_config(next(row for row in config_table("routed_lora")["default"] if row["bits"] == bits))


def _lora_config(row: dict) -> LoraConfig:
    return LoraConfig(*(row[name] for name in LoraConfig._fields))


def default_config(op: str, head_dim: int, bits: int) -> KernelConfig:
    """What a device that is not in the table gets for heads of `head_dim` of a type of `bits` bits."""
    rows = _that_hold(config_table(op)["default"], head_dim, bits)
    return _kernel_config(min(rows, key=lambda row: row["head_dim"]))


def _that_hold(rows: Sequence[dict], head_dim: int, bits: int) -> list[dict]:
    return [row for row in rows if row["bits"] == bits and row["head_dim"] >= head_dim]


def _kernel_config(row: dict) -> KernelConfig:
    return KernelConfig(row["tile"], row["warps"], row["stages"], row.get("reload", False))


@cache
def tile_sizes(op: str) -> tuple[int, ...]:
    """Every tile size that `kernel_config` may answer with, ascending."""
    table = config_table(op)
    return tuple(sorted({row["tile"] for row in [*table["rows"], *table["default"]]}))


def source_hash(*modules: str) -> str:
    """Of the sources of modules of this package, such as `context_attention.kernel`: what was measured with them."""
    paths = [Path(str(files("weaver_kernels"))) / f"{module.replace('.', '/')}.py" for module in modules]
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:12]


def with_row(table: dict, row: dict) -> dict:
    """The table with a row that takes the place of those that are for the same, on its devices."""

    def key(one: dict) -> tuple:
        return tuple(one.get(name, -1) for name in ROW_KEY)

    kept = []
    for old in table["rows"]:
        arch = old["arch"] if key(old) != key(row) else [one for one in old["arch"] if one not in row["arch"]]
        kept += [{**old, "arch": arch}] if arch else []
    return {**table, "rows": sorted([*kept, row], key=lambda one: (*key(one), one["arch"]))}


def write_table(path: Path, table: dict) -> None:
    """Write a table, a row a line; a reader finds the old one or the new one, whenever it looks."""
    text = "{\n" + ",\n".join(f"  {json.dumps(name)}: {_row_lines(value)}" for name, value in table.items()) + "\n}\n"
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def _row_lines(value: object) -> str:
    if not isinstance(value, list):
        return json.dumps(value)
    return "[\n" + ",\n".join(f"    {json.dumps(row)}" for row in value) + "\n  ]"
