"""Compile the kernels for every device of the tables without a GPU, and say what they take: `make compile-check`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from weaver_kernels.compiling import SHARED_KIB, Compiled, compile_each, failures, missing_tools
from weaver_kernels.compiling_attention import NO_SPILLS_TO, OP, Case
from weaver_kernels.compiling_lora import LAYOUTS, LORA, LoraCase
from weaver_kernels.tuning import config_table

__all__ = ["ARCHS", "HEADERS", "cases", "lora_cases", "main", "table_line"]

ARCHS = tuple(SHARED_KIB)
HEAD_DIMS = (40, 64, 80, 160)  # of Stable Diffusion 1.5, 2.1 and XL
LARGEST_DIM = 256
LONG_TEXT = 154
WHOLE_TEXT = 128  # the most that is held at once, where it fits
RANKS = (16, 64, 128)
QUICK = (
    Case(40, 86, 16),
    Case(64, 90, 16),
    Case(40, 90, 16, variant="odd-heads"),
    Case(64, 100, 16),
    Case(80, 80, 16, variant="q-each"),
    Case(160, 120, 16),
    Case(64, 89, 32),
    LoraCase(16, 86, 16),
    LoraCase(64, 90, 16),
    LoraCase(16, 120, 16, "3x3"),
    LoraCase(128, 100, 16, "3x3 last"),
)
TAKES = "registers | stack | shared KiB (of) | instruction |"
HEADERS = {
    OP: f"| sm | bits | D | L | variant | tile | warps | stages | reload | {TAKES}",
    LORA: f"| sm | bits | rank | layer | variant | tile | inputs | outputs | warps | stages | {TAKES}",
}
ABOUT = {
    OP: """\
A variant is `q-each` (a query for each context), `ragged` (texts of several lengths), `odd-heads` (three, with strides
that are no multiples of 16) or `default` (the configuration of a device that is not in the table). A spill fails the
check up to D = 80 at 77 keys; those of larger heads and of longer and ragged texts are only listed. Float32 has no
matrix instruction, because it would be rounded to TF32.""",
    LORA: """\
A layer is a Linear or a convolution, whose channels lie side by side (`last`) or not. No GPU has tuned these
configurations. A spill of a row for 16 bits fails the check; those of float32 and of the default are only listed.""",
}


def cases(archs=ARCHS) -> list[Case]:
    """Of `context_attention`: every row of the table at 77 and 128 keys, Stable Diffusion's head dimensions at 154 too,
    each variant, and what other devices get, as if these were others."""
    rows = config_table(OP)["rows"]
    found = []
    for arch in archs:
        for bits in (16, 32):
            dims = {row["head_dim"] for row in rows if arch in row["arch"] and row["bits"] == bits}
            found += [Case(dim, arch, bits) for dim in sorted(dims | set(HEAD_DIMS))]
            found += [Case(dim, arch, bits, WHOLE_TEXT) for dim in sorted(dims)]
            found += [Case(dim, arch, bits, variant="default") for dim in (40, 64, NO_SPILLS_TO, LARGEST_DIM)]
        found += [Case(dim, arch, 16, LONG_TEXT) for dim in HEAD_DIMS]
        variants = ("q-each", "ragged", "odd-heads")
        found += [Case(dim, arch, 16, variant=variant) for variant in variants for dim in HEAD_DIMS]
        found += [Case(dim, arch, 32, variant="q-each") for dim in HEAD_DIMS]
    return found


def lora_cases(archs=ARCHS) -> list[LoraCase]:
    """Of `routed_lora`: every layer at the least rank and the largest ones of the table's rows, and what other devices
    get."""
    found = []
    for arch in archs:
        for bits in (16, 32):
            found += [LoraCase(rank, arch, bits, layout) for layout in LAYOUTS for rank in RANKS]
            found += [LoraCase(RANKS[-1], arch, bits, layout, default=True) for layout in (LAYOUTS[0], LAYOUTS[2])]
    return found


def table_line(compiled: Compiled) -> str:
    """One line of the table; what must not be shipped says so behind it."""
    case = compiled.case
    if isinstance(case, LoraCase):
        cells = (case.arch, case.bits, case.rank, case.layout, "default" if case.default else "", *case.config[:-1])
    else:
        *config, reload = case.config
        cells = (case.arch, case.bits, case.head_dim, case.n_keys, case.variant, *config, "yes" if reload else "")
    shared = f"{compiled.shared / 1024:.1f} ({SHARED_KIB[case.arch]})"
    cells += (compiled.registers, compiled.stack, shared, compiled.instruction)
    return "| " + " | ".join(map(str, cells)) + " |" + "".join(f" FAILS: {reason}" for reason in failures(compiled))


def _page(found: Sequence[Compiled]) -> str:
    """The tables as a page, what spills first."""
    import triton

    lines = [
        "# What the kernels compile to",
        "",
        f"Written by `make compile-check ARGS='--write FILE'` with Triton {triton.__version__} and the ptxas in it; no",
        "GPU was used. Stack is bytes a thread spills; tile, warps, stages and what is read ahead are those that the",
        "operation looks up in `weaver_kernels/configs/<operation>.json`.",
    ]
    for op in HEADERS:
        of_op = [one for one in found if _op(one) == op]
        spilling = [one for one in of_op if one.stack]
        most = f", the most {max(one.stack for one in spilling)} bytes:" if spilling else "."
        lines += ["", f"## `{op}`", "", ABOUT[op], "", f"{len(of_op)} binaries, {len(spilling)} spill{most}", ""]
        lines += [*_rows(op, spilling), ""] if spilling else []
        lines += [f"### All of `{op}`", "", *_rows(op, of_op)]
    return "\n".join(lines) + "\n"


def _op(compiled: Compiled) -> str:
    return LORA if isinstance(compiled.case, LoraCase) else OP


def _rows(op: str, found: Sequence[Compiled]) -> list[str]:
    return [HEADERS[op], "|" + "---|" * (HEADERS[op].count("|") - 1), *map(table_line, found)]


def main(argv: list[str] | None = None) -> int:
    """Print the tables; 0 when everything may be shipped, 1 when something may not, 2 when it can't be compiled."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"{len(QUICK)} cases of all")
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHS, choices=ARCHS, help="only these")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes, default %(default)s")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the tables there as well, as Markdown")
    arguments = parser.parse_args(argv)
    if missing := missing_tools():
        print(f"compile-check: {', '.join(missing)} not found; Triton's Linux wheels bring all of it", file=sys.stderr)
        return 2
    chosen = list(QUICK) if arguments.quick else [*cases(arguments.arch), *lora_cases(arguments.arch)]
    found: list[Compiled] = []
    for compiled in compile_each(chosen, arguments.jobs):
        if not found or _op(found[-1]) != _op(compiled):
            print(*_rows(_op(compiled), []), sep="\n")
        print(table_line(compiled), flush=True)
        found.append(compiled)
    bad = sum(bool(failures(compiled)) for compiled in found)
    print(f"{len(found)} compiled, {bad} must not be shipped")
    if arguments.write:
        arguments.write.write_text(_page(found), encoding="utf-8")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
