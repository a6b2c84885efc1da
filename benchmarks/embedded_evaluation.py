"""The table in the README: ``python -m benchmarks.embedded_evaluation --record``

Runs ``weaver evaluate`` on the whole suite (forty minutes of two quiet cores; what is finished is not drawn again),
prints its table, and with ``--record`` keeps ``results.json`` in ``benchmarks/results`` and writes the table into the
README, between the two comments that mark its place. ``--sweep`` does the same for the settings' sweep, which has no
table.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from weaver.cli import main as weaver
from weaver.errors import WeaverError
from weaver.folder import whole_file

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
START, END = "<!-- evaluation: written by make evaluate -->", "<!-- evaluation ends -->"
COLUMNS = {
    "identity": ("right identity", "{:.1%}"),
    "leakage": ("leakage", "{:.1%}"),
    "similarity": ("similarity", "{:.2f}"),
    "psnr": ("background, dB", "{:.1f}"),
    "edges": ("edge IoU", "{:.1%}"),
}


def table(record: Mapping) -> str:
    """The arms of a `results.json` as a table in Markdown, each figure with its interval."""
    from weaver.evaluation.arms import arm_of

    lines = ["| arm | " + " | ".join(label for label, _ in COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, found in record["table"].items():
        arm = arm_of(name)
        cells = [f"({arm.letter}) {arm.what}"]
        for metric, (_, form) in COLUMNS.items():
            value, low, high = (found[metric][key] for key in ("value", "low", "high"))
            told = "–" if value is None else f"{form.format(value)} ({form.format(low)} to {form.format(high)})"
            cells.append(told)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def with_table(text: str, record: Mapping) -> str:
    """The README's text with the table of a record in its place; raises `WeaverError` where its marks are missing."""
    before, mark, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not (mark and end):
        raise WeaverError(f"README.md has no place for the table: put {START} and {END} around it")
    told = f"{record['prompts']} prompts, {record['pictures']} pictures an arm, 95 % intervals over prompts:"
    return f"{before}{mark}\n{told}\n\n{table(record)}\n{end}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/evaluate"))
    parser.add_argument("--sweep", action="store_true", help="the sweep of every arm's settings")
    parser.add_argument("--record", action="store_true", help="keep the figures in benchmarks/results and the README")
    args = parser.parse_args()
    if code := weaver(["evaluate", "--out", str(args.out), *["--sweep"] * args.sweep]):
        return code
    written = args.out / ("sweep.json" if args.sweep else "results.json")
    if args.record:
        shutil.copyfile(written, RESULTS / ("embedded_sweep.json" if args.sweep else "embedded_evaluation.json"))
    if args.sweep:
        return 0
    record = json.loads(written.read_text(encoding="utf-8"))
    print(table(record))
    if args.record:
        readme = ROOT / "README.md"
        text = with_table(readme.read_text(encoding="utf-8"), record)
        with whole_file(readme) as partial:
            partial.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
