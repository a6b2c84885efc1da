"""The table of ways to learn: what is in a row, and that the page on concepts has what was recorded."""

from __future__ import annotations

import json

from benchmarks.embedded_methods import ANIMALS, GROUND, MARKS, PAGE, figures, markdown
from benchmarks.records import RESULTS


def row(own: float, *, ground: float = 0.9) -> dict:
    scores = {name: {"own": own, "base": 0.2, "others": 0.1} for name in ANIMALS}
    return scores | {GROUND: {"own": ground, "base": 0.5, "others": 0.1}}


def test_means_are_of_the_animals_and_every_concept_must_show(tmp_path):
    files = {name: tmp_path / name for name in ANIMALS}
    for number, file in enumerate(files.values()):
        file.write_bytes(bytes(1000 * (1 + number)))
    found = figures("a way", [row(0.9), row(0.7), row(0.1), row(0.9, ground=0.3)], files, 12.4)
    assert found == {"method": "a way", "seconds": 12, "bytes": 1500, "own": 0.65, "base": 0.2, "others": 0.1,
                     "shows": "2 of 4"}  # fmt: skip
    assert markdown([found]).splitlines()[2] == "| a way | 0.65 | 0.20 | 0.10 | 2 of 4 | 1.5 | 12 |"
    assert markdown([found | {"seconds": None}]).endswith("| 1.5 |  |")


def test_the_page_has_the_recorded_table():
    record = json.loads((RESULTS / "embedded_methods.json").read_text(encoding="utf-8"))
    there = PAGE.read_text(encoding="utf-8").partition(MARKS[0])[2].partition(MARKS[1])[0]
    assert there.strip() == markdown(record["rows"])
