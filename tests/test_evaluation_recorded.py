"""The README's table: made of what was measured, in its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.embedded_evaluation import END, RESULTS, START, table, with_table
from weaver.embedded import concept_hashes, model_hash
from weaver.errors import WeaverError
from weaver.evaluation.arms import ARMS

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def record_of(value: float | None) -> dict:
    figure = {"value": value, "low": value, "high": value, "prompts": 0 if value is None else 60}
    metrics = dict.fromkeys(("identity", "leakage", "similarity", "psnr", "edges"), figure)
    return {"prompts": 60, "pictures": 180, "table": {arm.name: metrics for arm in ARMS}}


def test_a_row_for_every_arm_and_nothing_for_what_was_not_measured():
    rows = table(record_of(0.5)).splitlines()
    assert len(rows) == 2 + len(ARMS) and {row.count("|") for row in rows} == {7}
    assert all(f"({arm.letter}) {arm.what}" in row for arm, row in zip(ARMS, rows[2:], strict=True))
    assert "50.0% (50.0% to 50.0%)" in rows[2] and "0.50 (0.50 to 0.50)" in rows[2]
    assert table(record_of(None)).splitlines()[2].count("–") == 5


def test_the_table_takes_the_place_of_the_one_before():
    once = with_table(README, record_of(0.25))
    assert once.count("25.0%") and once.split(START)[0] == README.split(START)[0]
    assert once.split(END)[1] == README.split(END)[1]
    again = with_table(once, record_of(0.75))
    assert "25.0%" not in again.split(START)[1].split(END)[0] and "75.0%" in again
    with pytest.raises(WeaverError, match="no place for the table"):
        with_table("nothing", record_of(0.5))


@pytest.mark.parametrize("name", ["embedded_evaluation.json", "embedded_sweep.json"])
def test_recorded_figures_are_of_this_model_and_these_concepts(name):
    if not (RESULTS / name).exists():
        pytest.skip("not yet recorded")
    record = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    assert record["model"] == model_hash(), "made with another model: record it again"
    assert record["concepts"] == concept_hashes(record["concepts"]), "made with other concepts: record it again"
    if "table" in record:
        assert table(record) in README and not record["quick"]
