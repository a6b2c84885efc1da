"""The tables of README and docs: made of what was measured, in their places."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from benchmarks import embedded_evaluation as module
from benchmarks.embedded_evaluation import MARKS, PAGE, PARTS_MARKS, RESULTS, record_sweep, table, tables
from benchmarks.tables import README, between
from weaver.embedded import concept_hashes, model_hash
from weaver.errors import WeaverError
from weaver.evaluation.arms import ARMS, CHOSEN_FILE, FULL, PARTS, arm_of, default_settings
from weaver.evaluation.charts import curves
from weaver.evaluation.sweep import FINALISTS, GRID, OBJECTIVE, ORIGIN, panels_of, sweep_cases
from weaver.hashing import file_hash


def record_of(value: float | None) -> dict:
    figure = {"value": value, "low": value, "high": value, "prompts": 0 if value is None else 60}
    metrics = dict.fromkeys(("identity", "leakage", "similarity", "psnr", "edges", "masks"), figure)
    every = {arm.name: metrics for arm in (*ARMS, *PARTS)}
    others = {name: found for name, found in every.items() if name != FULL}
    return {"prompts": 60, "pictures": 180, "table": every, "full_minus": others}


def test_a_row_for_every_arm_and_nothing_for_what_was_not_measured():
    rows = table(record_of(0.5)).splitlines()
    assert len(rows) == 2 + len(ARMS) and {row.count("|") for row in rows} == {9}
    assert all(f"({arm.letter}) {arm.what}" in row for arm, row in zip(ARMS, rows[2:], strict=True))
    assert "50.0% (50.0% to 50.0%)" in rows[2] and "0.50 (0.50 to 0.50)" in rows[2]
    assert "+50.0 (+50.0 to +50.0) |" in rows[2] and rows[2 + ARMS.index(arm_of(FULL))].endswith("| – |")
    assert table(record_of(None)).splitlines()[2].count("–") == 7
    assert "-0.0" not in table(record_of(-0.0001))
    pages = tables(record_of(0.5))
    assert all(f"({arm.letter}) {arm.what}" in pages[README][1] for arm in ARMS)
    assert all(f"({arm.letter}) {arm.what}" in pages[PAGE][1] for arm in PARTS)


def test_the_table_takes_the_place_of_the_one_before():
    assert [marks for marks, _ in tables(record_of(0.25)).values()] == [MARKS, PARTS_MARKS]
    for page, (marks, found) in tables(record_of(0.25)).items():
        (start, end), text = marks, page.read_text(encoding="utf-8")
        once = between(text, marks, found)
        assert once.count("25.0%") and once.split(start)[0] == text.split(start)[0]
        assert once.split(end)[1] == text.split(end)[1]
        again = between(once, marks, tables(record_of(0.75))[page][1])
        assert "25.0%" not in again.split(start)[1].split(end)[0] and "75.0%" in again
    with pytest.raises(WeaverError, match="no place for the table"):
        between("nothing", MARKS, "")


def test_a_recorded_sweep_is_kept_with_its_choice_and_curves(tmp_path, monkeypatch):
    values = {"guidance": 2.0, "dilation": 2}
    tried = [{"values": values, "along": None, "score": [0.5, 0.1]}]
    written = tmp_path / "sweep.json"
    written.write_text(json.dumps({"arms": {FULL: {"chosen": values, "score": [0.5, 0.1], "tried": tried}}}))
    for name, at in (("RESULTS", tmp_path / "kept"), ("CHOSEN_FILE", tmp_path / "a"), ("CURVES", tmp_path / "b")):
        monkeypatch.setattr(module, name, at)
    (tmp_path / "kept").mkdir()
    record_sweep(written)
    assert json.loads((tmp_path / "a").read_text()) == {FULL: values}
    assert (tmp_path / "b").read_text().startswith('<svg xmlns="http://www.w3.org/2000/svg"')
    assert (tmp_path / "kept" / "embedded_sweep.json").read_bytes() == written.read_bytes()


def test_the_curves_are_of_the_recorded_sweep():
    record = json.loads((RESULTS / "embedded_sweep.json").read_text(encoding="utf-8"))
    drawn = curves(panels_of(record["arms"][FULL])) + "\n"
    assert module.CURVES.read_text(encoding="utf-8") == drawn, "drawn of another sweep: record it again"


@pytest.mark.parametrize("name", ["embedded_evaluation.json", "embedded_sweep.json"])
def test_recorded_figures_are_of_this_model_and_these_concepts(name):
    record = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    assert record["model"] == model_hash(), "made with another model: record it again"
    assert record["concepts"] == concept_hashes(record["concepts"]), "made with other concepts: record it again"


def test_the_worst_cases_are_of_the_recorded_evaluation():
    record = json.loads((RESULTS / "embedded_evaluation.json").read_text(encoding="utf-8"))
    assert record["docs/failures.png"] == file_hash(module.FAILURES), "another picture: record it again"


def test_an_evaluation_is_kept_with_its_worst_cases_and_tables(tmp_path, monkeypatch):
    places = {"RESULTS": "results", "FAILURES": "failures.png", "README": "README.md", "PAGE": "evaluation.md"}
    for name, place in places.items():
        monkeypatch.setattr(module, name, tmp_path / place)
    module.RESULTS.mkdir()
    for page, marks in ((module.README, MARKS), (module.PAGE, PARTS_MARKS)):
        page.write_text("\n".join(marks) + "\n", encoding="utf-8")
    record = record_of(0.25)
    module.keep(record, Image.new("RGB", (4, 4)))
    kept = json.loads((module.RESULTS / "embedded_evaluation.json").read_text(encoding="utf-8"))
    assert kept.pop("docs/failures.png") == file_hash(module.FAILURES) and kept == record
    assert all(page.read_text(encoding="utf-8").count("25.0%") for page in (module.README, module.PAGE))


def test_the_pages_have_the_recorded_tables_of_the_whole_suite():
    record = json.loads((RESULTS / "embedded_evaluation.json").read_text(encoding="utf-8"))
    assert not record["quick"]
    for page, (marks, found) in tables(record).items():
        assert found == page.read_text(encoding="utf-8").partition(marks[0])[2].partition(marks[1])[0].strip()
    drawn = record["settings"]
    assert set(drawn) >= {arm.name for arm in ARMS}
    assert drawn == {name: arm_of(name).chosen.as_mapping() for name in drawn}, "drawn with other settings"


def test_the_defaults_and_every_arm_are_what_the_recorded_sweep_chose():
    record = json.loads((RESULTS / "embedded_sweep.json").read_text(encoding="utf-8"))
    chosen = {name: found["chosen"] for name, found in record["arms"].items()}
    assert json.loads(CHOSEN_FILE.read_text(encoding="utf-8")) == chosen
    assert list(chosen) == [arm.name for arm in ARMS]
    assert arm_of(FULL).chosen == default_settings(), "the embedded model's defaults are not what the sweep chose"
    assert record["objective"] == OBJECTIVE, "swept by another objective: record it again"
    assert record["cases"] == [case.name for case in sweep_cases()]
    assert record["prompts"] == [case.prompt.text_with_tokens for case in sweep_cases()]
    assert record["finals"] == [f"{case.prompt.name}-s{case.seed + more}" for more in (1, 2) for case in sweep_cases()]
    for name, found in record["arms"].items():
        ranked = sorted(found["tried"], key=lambda one: one["score"], reverse=True)
        looked = [one["values"] for one in found["tried"] if one in ranked[:FINALISTS]]
        assert [one["values"] for one in found["finals"]] == looked, name
        assert max(found["finals"], key=lambda one: one["score"])["values"] == found["chosen"], name
        begun = {key: ORIGIN[key] for key in found["chosen"]}
        assert found["tried"][0]["values"] == begun and len(found["tried"]) <= record["budget"], name
        assert all(min(GRID[key]) <= value <= max(GRID[key]) for key, value in found["chosen"].items())
