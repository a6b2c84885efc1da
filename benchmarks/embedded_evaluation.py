"""The tables of the README and ``docs/evaluation.md``: ``python -m benchmarks.embedded_evaluation --record``

Runs ``weaver evaluate`` on the whole suite (seventy minutes of two quiet cores; what is finished is not drawn again),
prints its tables, and with ``--record`` keeps ``results.json`` in ``benchmarks/results``, the worst pictures of the
full method beside the other arms' in ``docs/failures.png``, and writes the tables into these pages, between the
comments that mark their places. ``--sweep`` runs the settings' sweep, eighty minutes; recorded, what it chose for each
arm is what the table is drawn with, and its curves for the full method are ``docs/sweep.svg``.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from benchmarks.records import RESULTS, write_record
from benchmarks.tables import DOCS, README, into_page
from weaver.cli import main as weaver
from weaver.evaluation.arms import ARMS, CHOSEN_FILE, FULL, PARTS, Arm
from weaver.evaluation.charts import curves
from weaver.evaluation.drawing import STEPS
from weaver.evaluation.prompts import Case
from weaver.evaluation.report import worst_first
from weaver.evaluation.results import Results
from weaver.evaluation.runner import case_path, picture_path, template_path
from weaver.evaluation.suite import cases
from weaver.evaluation.sweep import panels_of
from weaver.hashing import file_hash
from weaver.pictures import grid, open_rgb

FAILURES, CURVES, PAGE = DOCS / "failures.png", DOCS / "sweep.svg", DOCS / "evaluation.md"
WORST, WORST_BACKGROUNDS = 6, 2
MARKS = "<!-- evaluation: written by make evaluate -->", "<!-- evaluation ends -->"
PARTS_MARKS = "<!-- parts: written by make evaluate -->", "<!-- parts end -->"
COLUMNS = {
    "identity": ("right identity", "{:z.1%}"),
    "leakage": ("leakage", "{:z.1%}"),
    "similarity": ("similarity", "{:z.2f}"),
    "psnr": ("background, dB", "{:z.1f}"),
    "edges": ("edge IoU", "{:z.1%}"),
    "masks": ("mask IoU", "{:z.1%}"),
}


def table(record: Mapping, arms: Sequence[Arm] = ARMS) -> str:
    """Arms of a `results.json` as a table in Markdown, each figure with its interval.

    The last column is what the full method has more of right identity on the same pictures, in points of per cent.
    """
    heads = ["arm", *(label for label, _ in COLUMNS.values()), "identity, (h) minus it"]
    lines = [_line(heads), "|---" * len(heads) + "|"]
    for arm in arms:
        found, pair = record["table"][arm.name], record["full_minus"].get(arm.name)
        cells = [
            f"({arm.letter}) {arm.what}",
            *(with_interval(found[metric], form) for metric, (_, form) in COLUMNS.items()),
        ]
        lines.append(_line([*cells, with_interval(pair and pair["identity"], "{:+z.1f}", 100)]))
    return "\n".join(lines)


def tables(record: Mapping) -> dict[Path, tuple[tuple[str, str], str]]:
    """What each page gets, and between which marks: every arm at its best settings; the full method, a part changed."""
    of = f"{record['prompts']} prompts, {record['pictures']} pictures an arm, 95 % intervals over prompts:"
    changed = [arm for arm in PARTS if arm.name in record["table"]]
    parts = f"{of}\n\n{table(record, changed)}" if changed else "Not yet measured."
    return {README: (MARKS, f"{of}\n\n{table(record)}"), PAGE: (PARTS_MARKS, parts)}


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def with_interval(found: Mapping | None, form: str, times: float = 1) -> str:
    """A recorded figure and its interval, `times` as large, in a format of numbers; a dash where there is none."""
    if found is None or found["value"] is None:
        return "–"
    value, low, high = (form.format(times * found[key]) for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def failures(folder: Path) -> Image.Image:
    """The full method's worst cases in a finished evaluation, one a row: template, then each arm by its letter.

    First those of identity, then those whose background is furthest from the template's.
    """
    arms = {arm.name: arm.chosen for arm in ARMS}
    of = cases()
    records = [json.loads(case_path(folder, case.name).read_text(encoding="utf-8")) for case in of]
    results = Results(tuple(of), tuple(records), arms, STEPS)
    found = zip(of, records, strict=True)
    psnrs = [(record["arms"][FULL]["background_psnr"], case) for case, record in found]
    changed = sorted((told for told in psnrs if told[0] is not None), key=lambda told: told[0])
    worst = _of_each_prompt([case for _, case, _ in worst_first(results, FULL)])[:WORST]
    worst += _of_each_prompt([case for _, case in changed], worst)[:WORST_BACKGROUNDS]
    names, rows = [case.name for case in worst], []
    for name in names:
        pictures = [template_path(folder, name), *(picture_path(folder, name, arm) for arm in arms)]
        rows.append([open_rgb(path) for path in pictures])
    return _headed(grid(rows, 96), ["template", *(f"({arm.letter})" for arm in ARMS)], names)


def _of_each_prompt(cases: Sequence[Case], without: Sequence[Case] = ()) -> list[Case]:
    """The first case of each prompt, in their order, but of those prompts that `without` has."""
    taken = {case.prompt.name for case in without}
    firsts = {case.prompt.name: case for case in reversed(cases) if case.prompt.name not in taken}
    return sorted(firsts.values(), key=cases.index)


def _headed(sheet: Image.Image, headings: Sequence[str], names: Sequence[str]) -> Image.Image:
    """A sheet with a text over each of its columns and before each row, in 256 colours: a page's picture is small."""
    left, top, font = 140, 22, ImageFont.load_default(size=14)
    headed = Image.new("RGB", (left + sheet.width, top + sheet.height), "white")
    headed.paste(sheet, (left, top))
    draw, width, height = ImageDraw.Draw(headed), sheet.width // len(headings), sheet.height // len(names)
    for number, text in enumerate(headings):
        draw.text((left + number * width + width // 2, top // 2), text, fill="black", font=font, anchor="mm")
    for number, text in enumerate(names):
        draw.text((4, top + number * height + height // 2), text, fill="black", font=font, anchor="lm")
    return headed.quantize(256)


def record_sweep(written: Path) -> None:
    """Keep a `sweep.json`: as it is, what it chose for each arm, and its curves for the full method."""
    found = json.loads(written.read_text(encoding="utf-8"))["arms"]
    shutil.copyfile(written, RESULTS / "embedded_sweep.json")
    chosen = {name: of["chosen"] for name, of in found.items()}
    CHOSEN_FILE.write_text(json.dumps(chosen, indent=2) + "\n", encoding="utf-8")
    CURVES.write_text(curves(panels_of(found[FULL])) + "\n", encoding="utf-8")


def keep(record: Mapping, worst: Image.Image) -> None:
    """Keep a `results.json` and its worst cases, with the hash of their picture, and write the pages' tables."""
    worst.save(FAILURES, optimize=True)
    told = {**record, f"docs/{FAILURES.name}": file_hash(FAILURES)}
    write_record(RESULTS, "embedded_evaluation", told)
    for page, (marks, found) in tables(record).items():
        into_page(page, marks, found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/evaluate"))
    parser.add_argument("--sweep", action="store_true", help="the sweep of every arm's settings")
    parser.add_argument("--record", action="store_true", help="keep the figures in benchmarks/results and the pages")
    args = parser.parse_args()
    if code := weaver(["evaluate", "--out", str(args.out), *["--sweep"] * args.sweep]):
        return code
    if args.sweep:
        if args.record:
            record_sweep(args.out / "sweep.json")
        return 0
    record = json.loads((args.out / "results.json").read_text(encoding="utf-8"))
    pages = tables(record)
    print(*(text for _, text in pages.values()), sep="\n\n")
    if args.record:
        keep(record, failures(args.out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
