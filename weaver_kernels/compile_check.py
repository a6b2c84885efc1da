"""Compile the kernel for every device of the table without a GPU, and say what it takes: `make compile-check`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from weaver_kernels.compiling import (
    NO_SPILLS_TO,
    OP,
    SHARED_KIB,
    Case,
    Compiled,
    compile_each,
    failures,
    missing_tools,
)
from weaver_kernels.tuning import config_table

__all__ = ["ARCHS", "cases", "main", "table_line"]

ARCHS = tuple(SHARED_KIB)
HEAD_DIMS = (40, 64, 80, 160)  # of Stable Diffusion 1.5, 2.1 and XL
LARGEST_DIM = 256
LONG_TEXT = 154
WHOLE_TEXT = 128  # the most that is held at once, where it fits
QUICK = (
    Case(40, 86, 16),
    Case(64, 90, 16),
    Case(40, 90, 16, variant="odd-heads"),
    Case(64, 100, 16),
    Case(80, 80, 16, variant="q-each"),
    Case(160, 120, 16),
    Case(64, 89, 32),
)
HEADER = "| sm | bits | D | L | variant | tile | warps | stages | reload | registers | stack | shared KiB (of) "
HEADER += "| instruction |"


def cases(archs=ARCHS) -> list[Case]:
    """Every row of the table at 77 and 128 keys, Stable Diffusion's head dimensions at 154 too, each variant, and what
    other devices get, as if these were others."""
    rows = config_table(OP)["rows"]
    found = []
    for arch in archs:
        for bits in (16, 32):
            dims = {row["head_dim"] for row in rows if arch in row["arch"] and row["bits"] == bits}
            found += [Case(dim, arch, bits) for dim in sorted(dims | set(HEAD_DIMS))]
            found += [Case(dim, arch, bits, WHOLE_TEXT) for dim in sorted(dims)]
            found += [Case(dim, arch, bits, variant="default") for dim in (NO_SPILLS_TO, LARGEST_DIM)]
        found += [Case(dim, arch, 16, LONG_TEXT) for dim in HEAD_DIMS]
        variants = ("q-each", "ragged", "odd-heads")
        found += [Case(dim, arch, 16, variant=variant) for variant in variants for dim in HEAD_DIMS]
    return found


def table_line(compiled: Compiled) -> str:
    """One line of the table; what must not be shipped says so behind it."""
    case = compiled.case
    shared = f"{compiled.shared / 1024:.1f} ({SHARED_KIB[case.arch]})"
    *config, reload = case.config
    cells = (case.arch, case.bits, case.head_dim, case.n_keys, case.variant, *config, "yes" if reload else "")
    cells += (compiled.registers, compiled.stack, shared, compiled.instruction)
    return "| " + " | ".join(map(str, cells)) + " |" + "".join(f" FAILS: {reason}" for reason in failures(compiled))


def _page(found: list[Compiled]) -> str:
    """The table as a page, what spills first."""
    import triton

    spilling = [one for one in found if one.stack]
    lines = [
        "# What the kernel of `context_attention` compiles to",
        "",
        f"Written by `make compile-check ARGS='--write FILE'` with Triton {triton.__version__} and the ptxas in it; no",
        "GPU was used. Stack is bytes a thread spills; tile, warps and stages are those the operation looks up in",
        "`weaver_kernels/configs/context_attention.json`. A variant is `q-each` (a query for each context), `ragged`",
        "(texts of several lengths), `odd-heads` (three, with strides that are no multiples of 16) or `default` (the",
        "configuration of a device that is not in the table).",
        "",
        "A spill of a row for 16 bits fails the check up to D = 80 at 77 keys. Those of longer and ragged texts, of",
        "float32 and of the default are only listed. Float32 has no matrix instruction, because it would be rounded",
        "to TF32.",
        "",
        f"{len(found)} binaries, {len(spilling)} spill"
        + (f", the most {max(one.stack for one in spilling)} bytes:" if spilling else "."),
        "",
        *(_rows(spilling) if spilling else []),
        "",
        "## All",
        "",
        *_rows(found),
    ]
    return "\n".join(lines) + "\n"


def _rows(found: list[Compiled]) -> list[str]:
    return [HEADER, "|" + "---|" * 13, *map(table_line, found)]


def main(argv: list[str] | None = None) -> int:
    """Print the table; 0 when everything may be shipped, 1 when something may not, 2 when it can't be compiled."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"{len(QUICK)} cases of all")
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHS, choices=ARCHS, help="only these")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes, default %(default)s")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table there as well, as Markdown")
    arguments = parser.parse_args(argv)
    if missing := missing_tools():
        print(f"compile-check: {', '.join(missing)} not found; Triton's Linux wheels bring all of it", file=sys.stderr)
        return 2
    chosen = list(QUICK) if arguments.quick else cases(arguments.arch)
    print(*_rows([]), sep="\n")
    found = []
    for compiled in compile_each(chosen, arguments.jobs):
        print(table_line(compiled), flush=True)
        found.append(compiled)
    bad = sum(bool(failures(compiled)) for compiled in found)
    print(f"{len(found)} compiled, {bad} must not be shipped")
    if arguments.write:
        arguments.write.write_text(_page(found), encoding="utf-8")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
