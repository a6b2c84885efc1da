"""Find the fastest configurations of a kernel on this GPU: `make tune`, or `make tune ARGS='--op routed_lora'`.

For each head dimension, width of the type and kind of query (of `routed_lora` for each rank, width and layout): every
candidate that passes the compile check and agrees with float64 is timed in a CUDA graph, and the fastest over the
U-Nets' layers goes into `configs/<operation>.json`, with the device and the time. A row is written as soon as it is
found, and what this device, this Triton and this kernel have measured is not measured again: a run that stopped goes on
where it was. Another process measures; where a configuration ends it, the row is measured again without that one.
`--dry` compiles the candidates for any architecture, without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch

from weaver_kernels.child import MeasuringChild, Running
from weaver_kernels.compiling import SHARED_KIB, compile_each, failures, missing_tools
from weaver_kernels.devices import triton_version
from weaver_kernels.tune_attention import HEAD_DIMS, OP, Row, kernel_hash, rows
from weaver_kernels.tune_lora import LORA, LoraRow, lora_hash, lora_rows
from weaver_kernels.tuning import ROW_KEY, with_row, write_table

__all__ = [
    "Tuned",
    "main",
    "measured_before",
    "stamp",
    "tune",
    "usable_configs",
]

CONFIGS = Path(str(files("weaver_kernels") / "configs"))
TABLE = CONFIGS / f"{OP}.json"
VARIANTS_KIB = 1  # of shared memory that longer and ragged texts may take beyond 77 keys; 0.13 is the most seen
UNFINISHED = 3  # exit status: time ran out


class Tuned(NamedTuple):
    """The table with what was found, and the rows that time did not suffice for or nothing usable was found for."""

    table: dict
    left: list[Row | LoraRow]
    failed: list[Row | LoraRow]


def stamp(device: str, op: str = OP) -> dict[str, str]:
    """With what a row is measured: another kernel or compiler asks for another measurement."""
    return {"device": device, "triton": triton_version(), "kernel": lora_hash() if op == LORA else kernel_hash()}


def measured_before(table: dict, row: Row | LoraRow, arch: int, mark: Mapping[str, str]) -> bool:
    """Whether the table has this row from the same device, compiler and kernel."""
    return any(
        arch in found["arch"]
        and row.key() == {name: found[name] for name in ROW_KEY if name in found}
        and mark.items() <= found.get("measured", {}).items()
        for found in table["rows"]
    )


def tune(
    todo: Sequence[Row | LoraRow],
    table: dict,
    arch: int,
    mark: Mapping[str, str],
    *,
    usable: Iterator[Sequence[tuple]],
    measure: Callable[[Row | LoraRow, Sequence[tuple]], Mapping[tuple, float]],
    write: Callable[[dict], None],
    seconds: float = float("inf"),
    clock: Callable[[], float] = time.monotonic,
) -> Tuned:
    """Choose for each row the configuration with the least time, and write the table after each.

    usable : for each row the configurations that may be shipped; measure : microseconds of those that are right; after
    `seconds` no row is begun.
    """
    left, failed, end = [], [], clock() + seconds
    for row in todo:
        if clock() > end:
            left.append(row)
            continue
        print(f"{row}", flush=True)
        times = measure(row, next(usable))
        for config, microseconds in sorted(times.items(), key=lambda item: item[1]):
            print(f"  {tuple(config)} {microseconds:.1f} us", flush=True)
        if not times:
            failed.append(row)
            continue
        best = min(times, key=times.__getitem__)
        key = {"arch": [arch], **row.key()}
        chosen = {name: value for name, value in best._asdict().items() if name != "reload" or value}
        table = with_row(table, {**key, **chosen, "measured": {**mark, "us": round(times[best], 1)}})
        write(table)
    return Tuned(table, left, failed)


def usable_configs(
    todo: Sequence[Row | LoraRow], arch: int, jobs: int, shared_kib: int | None = None
) -> Iterator[list[tuple]]:
    """For each row the candidates that may be shipped; the others are told. All compile ahead of the question."""
    limit = (SHARED_KIB[arch] if shared_kib is None else shared_kib) - VARIANTS_KIB
    wanted = [row.candidates(arch) for row in todo]
    compiled = compile_each([case for row in wanted for cases in row.values() for case in cases], jobs)
    for row in wanted:
        found = []
        for config, cases in row.items():
            reasons = [reason for one in islice(compiled, len(cases)) for reason in failures(one, limit)]
            if reasons:
                print(f"  {tuple(config)} {'; '.join(reasons)}", flush=True)
            else:
                found.append(config)
        yield found


_tell = partial(print, flush=True)  # two processes write


@torch.no_grad()
def _time_row(row: Row | LoraRow, configs: Sequence[tuple], running: Running) -> Mapping[tuple, float]:
    return row.time(configs, _tell, running)


def _dry(todo: Sequence[Row | LoraRow], arch: int, jobs: int) -> int:
    poor = 0
    for row, usable in zip(todo, usable_configs(todo, arch, jobs), strict=True):
        print(f"sm_{arch}, {row}: {len(usable)} of {len(row.candidates(arch))} candidates may be timed", flush=True)
        poor += not usable
    return int(poor > 0)


def main(argv: list[str] | None = None) -> int:
    """0 when every row is measured, 1 when nothing usable was found for one, 2 when it can't be done here, 3 when time
    ran out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", default=OP, choices=(OP, LORA), help="of which operation (%(default)s)")
    parser.add_argument("--head-dim", type=int, nargs="+", default=HEAD_DIMS, choices=HEAD_DIMS, help="only these")
    parser.add_argument("--first", type=int, metavar="N", help="only the first N rows of those")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no row after them")
    parser.add_argument("--table", type=Path, help="the file to complete (configs/<operation>.json)")
    parser.add_argument("--dry", type=int, metavar="ARCH", choices=SHARED_KIB, help="compile for it, measure nothing")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile (%(default)s)")
    arguments = parser.parse_args(argv)
    every = lora_rows() if arguments.op == LORA else rows(arguments.head_dim)
    todo, path = every[: arguments.first], arguments.table or CONFIGS / f"{arguments.op}.json"
    if missing := missing_tools():
        print(f"tune: {', '.join(missing)} not found; Triton's Linux wheels bring all of it", file=sys.stderr)
        return 2
    if arguments.dry:
        return _dry(todo, arguments.dry, arguments.jobs)
    if not torch.cuda.is_available():
        print(f"tune: needs an NVIDIA GPU, and torch {torch.__version__} sees none (--dry ARCH)", file=sys.stderr)
        return 2
    device = torch.cuda.get_device_properties(0)
    arch, mark = 10 * device.major + device.minor, stamp(device.name, arguments.op)
    table = json.loads(path.read_text(encoding="utf-8"))
    left = [row for row in todo if not measured_before(table, row, arch, mark)]
    print(f"{device.name}: {len(todo) - len(left)} of {len(todo)} rows measured before", flush=True)
    with MeasuringChild(_tell) as child:
        done = tune(
            left,
            table,
            arch,
            mark,
            usable=usable_configs(left, arch, arguments.jobs, device.shared_memory_per_block_optin // 1024),
            measure=lambda row, configs: child.measure(partial(_time_row, row), configs),
            write=lambda changed: write_table(path, changed),
            seconds=arguments.seconds,
        )
    for row in done.failed:
        print(f"nothing usable: {row}")
    for row in done.left:
        print(f"no time for: {row}; run again")
    return 1 if done.failed else UNFINISHED if done.left else 0


if __name__ == "__main__":
    sys.exit(main())
