"""Cases drawn, kept and reported: two steps of a prompt by all arms, of another by two."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from weaver.embedded import model_hash
from weaver.errors import WeaverError
from weaver.evaluation import runner
from weaver.evaluation.arms import ARMS, FULL, PARTS, default_settings
from weaver.evaluation.drawing import Drawer
from weaver.evaluation.prompts import Case
from weaver.evaluation.report import worst_first, write_report
from weaver.evaluation.results import METRICS, Results, aims, summarise, write_results
from weaver.evaluation.runner import expected_minutes, identity, picture_path, run_cases, template_path
from weaver.evaluation.suite import quick_cases, suite
from weaver.folder import writing_alone

STEPS = 2


def case_of(group: str, **wanted) -> Case:
    matches = (p for p in suite() if p.group == group and all(getattr(p, k) == v for k, v in wanted.items()))
    return Case(next(matches), 0)


CASES = [case_of("overlapping")]
SIMILAR = case_of("similar", animals=("tuxedo-cat", "cat"))
ALL = {arm.name: arm.settings(default_settings()) for arm in (*ARMS, PARTS[0])}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    return folder, run_cases(folder, CASES, ALL, steps=STEPS)


@pytest.fixture(scope="module")
def results(finished):
    return Results(tuple(CASES), tuple(finished[1]), ALL, STEPS)


def test_every_arm_of_every_case_has_a_picture_and_measures(finished):
    folder, records = finished
    for case, record in zip(CASES, records, strict=True):
        assert record["case"] == case.name and list(record["arms"]) == list(ALL)
        for arm, found in record["arms"].items():
            assert Image.open(picture_path(folder, case.name, arm)).size == (64, 64)
            assert [c["name"] for c in found["concepts"]] == list(case.prompt.concepts)
            assert (found["edge_iou"] is not None) == ALL[arm].has_template
        assert Image.open(template_path(folder, case.name)).size == (64, 64)


def test_arms_differ_where_their_settings_do(finished):
    folder, _ = finished
    pictures = {arm: picture_path(folder, CASES[0].name, arm).read_bytes() for arm in ALL}
    for one in ALL:
        for other in ALL:
            assert (pictures[one] == pictures[other]) == (ALL[one] == ALL[other]), (one, other)


def test_what_is_finished_is_not_drawn_again(finished, monkeypatch):
    folder, records = finished
    monkeypatch.setattr(runner, "drawer_for", lambda *args, **options: pytest.fail("drawn again"))
    assert run_cases(folder, CASES, ALL, steps=STEPS) == records
    with pytest.raises(pytest.fail.Exception, match="drawn again"):
        run_cases(folder, CASES, ALL, steps=STEPS + 1)


def test_arms_that_are_not_asked_for_stay(tmp_path, monkeypatch):
    both = {FULL: ALL[FULL], "prompt-only": ALL["prompt-only"]}
    first = run_cases(tmp_path, [SIMILAR], {"prompt-only": both["prompt-only"]}, steps=STEPS)
    run_cases(tmp_path, [SIMILAR], {FULL: both[FULL]}, steps=STEPS)
    monkeypatch.setattr(runner, "drawer_for", lambda *args, **options: pytest.fail("drawn again"))
    again = run_cases(tmp_path, [SIMILAR], both, steps=STEPS)
    assert list(again[0]["arms"]) == list(both) and again[0]["arms"]["prompt-only"] == first[0]["arms"]["prompt-only"]


def test_two_processes_draw_what_one_draws(tmp_path, served):
    arms, of = {"prompt-only": ALL["prompt-only"]}, [SIMILAR, CASES[0]]
    alone, both = (run_cases(tmp_path / str(n), of, arms, processes=n, steps=STEPS) for n in (1, 2))
    assert alone == both and [record["case"] for record in both] == [case.name for case in of]
    for case in of:
        paths = [picture_path(tmp_path / str(n), case.name, "prompt-only") for n in (1, 2)]
        assert paths[0].read_bytes() == paths[1].read_bytes()


def test_an_interrupted_case_keeps_the_arms_it_had(tmp_path, monkeypatch):
    arms = {name: ALL[name] for name in ("prompt-only", FULL, "averaged")}
    drawn, draw = [], Drawer.draw

    def until_the_last(self, settings):
        drawn.append(settings)
        if settings == arms["averaged"]:
            raise KeyboardInterrupt
        return draw(self, settings)

    with monkeypatch.context() as patch:
        patch.setattr(Drawer, "draw", until_the_last)
        with pytest.raises(KeyboardInterrupt):
            run_cases(tmp_path, [SIMILAR], arms, steps=STEPS)
    before = {name: picture_path(tmp_path, SIMILAR.name, name).stat().st_mtime_ns for name in ("prompt-only", FULL)}
    again = run_cases(tmp_path, [SIMILAR], arms, steps=STEPS)
    assert set(again[0]["arms"]) == set(arms) and len(drawn) == 3
    assert all(picture_path(tmp_path, SIMILAR.name, name).stat().st_mtime_ns == at for name, at in before.items())


def test_code_is_what_it_does_and_not_what_it_says(monkeypatch, tmp_path):
    (tmp_path / "weaver").mkdir()
    (tmp_path / "weaver_kernels").mkdir()
    file = tmp_path / "weaver" / "module.py"
    monkeypatch.setattr(runner, "_SOURCES", tmp_path / "weaver")
    found = []
    for text in ('"""One."""\nx = 1\n"""Of x."""\n', '"""Two."""\n\nx = 1  # one\n', "x = 2\n"):
        file.write_text(text)
        found.append(runner._code_hash())
    assert found[0] == found[1] != found[2]


def test_what_is_missing_or_damaged_is_drawn_again_alike(tmp_path):
    arms = {FULL: ALL[FULL], "prompt-only": ALL["prompt-only"]}
    first = run_cases(tmp_path, [SIMILAR], arms, steps=STEPS)
    concepts = first[0]["arms"][FULL]["concepts"]
    assert [concept["name"] for concept in concepts] == ["tuxedo-cat"]  # the other cat is the base model's own
    path = picture_path(tmp_path, SIMILAR.name, FULL)
    before = path.read_bytes()
    path.unlink()
    assert run_cases(tmp_path, [SIMILAR], arms, steps=STEPS) == first and path.read_bytes() == before
    (tmp_path / "cases" / SIMILAR.name / "case.json").write_text('{"identity": ')
    assert run_cases(tmp_path, [SIMILAR], {FULL: ALL[FULL]}, steps=STEPS)[0]["arms"][FULL] == first[0]["arms"][FULL]


def test_a_record_follows_from_settings_seed_steps_and_code(monkeypatch):
    case = CASES[0]
    full = {FULL: ALL[FULL]}
    known = {identity(case, full, 2), identity(case, full, 3), identity(Case(case.prompt, 1), full, 2)}
    known.add(identity(case, {FULL: ALL["dense-masks"]}, 2))
    monkeypatch.setattr(runner, "made_with", lambda: {"code": "other"})
    known.add(identity(case, full, 2))
    assert len(known) == 5


def test_one_evaluation_works_in_a_folder(finished):
    folder, _ = finished
    with writing_alone(folder, wait=0), pytest.raises(WeaverError, match="wait for the other evaluation there"):
        run_cases(folder, CASES, ALL, steps=STEPS)


def test_threads_are_as_they_were():
    torch.set_num_threads(2)
    try:
        with pytest.raises(ZeroDivisionError), runner.one_thread():
            assert torch.get_num_threads() == 1
            raise ZeroDivisionError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_equal_settings_cost_once_but_in_a_sweep():
    settings = [ALL[FULL], ALL[FULL]]
    alone = expected_minutes(60, settings[:1], 1)
    assert expected_minutes(60, settings, 1) == alone == 2 * expected_minutes(60, settings, 2)
    assert expected_minutes(60, settings, 1, steps=12) == alone / 2
    assert expected_minutes(60, settings, 1, times=20) == 2 * expected_minutes(60, settings[:1], 1, times=20)


def test_tables_hold_every_arm_and_metric(finished, results):
    folder, records = finished
    told = summarise(results)
    write_results(folder, results, told)
    record = json.loads((folder / "results.json").read_text())
    assert record["model"] == model_hash() and record["prompts"] == 1
    assert record["templates_drawn"] == 1
    assert set(record["table"]) == set(ALL) and set(record["table"][FULL]) == {metric.name for metric in METRICS}
    right = [c["right"] for r in records for c in r["arms"][FULL]["concepts"]]
    assert record["table"][FULL]["identity"]["value"] == pytest.approx(sum(right) / len(right), abs=1e-4)
    assert record["table"]["averaged"]["psnr"] == {"value": None, "low": None, "high": None, "prompts": 0}
    assert set(record["by_concepts"]) == {"2"} and set(record["by_group"]) == {"overlapping"}
    rows = list(csv.DictReader(io.StringIO((folder / "results.csv").read_text())))
    assert len(rows) == 2 * len(ALL) and {row["arm"] for row in rows} == set(ALL)
    before = (folder / "results.json").read_bytes()
    write_results(folder, results, summarise(results))
    assert (folder / "results.json").read_bytes() == before


def measured(right: bool, leaked: bool, own: float = 0.9) -> dict:
    concept = {"name": "pug", "kind": "animal", "present": True, "right": right, "leaked": leaked}
    concept |= {"own": own, "base": 0.1, "others": 0.1}
    return {"concepts": [concept] * 2, "background_psnr": 21.0, "edge_iou": 0.5, "mask_iou": 0.9}


def test_aims_are_met_or_missed_by_what_was_measured():
    two = [Case(prompt, 0) for prompt in suite() if prompt.group == "two"]
    good, bad = measured(True, False), measured(False, True)
    arms = {name: ALL[name] for name in (FULL, "score-mix")}

    def met(full: dict, rival: dict) -> dict[str, bool | None]:
        records = [{"case": case.name, "template": "made", "arms": {FULL: full, "score-mix": rival}} for case in two]
        results = Results(tuple(two), tuple(records), arms, STEPS)
        return {aim.what: aim.met for aim in aims(results, summarise(results))}

    won, lost, level = met(good, bad), met(bad, good), met(good, good)
    assert won.pop("right identity, three concepts") is None and won.pop("right identity, four concepts") is None
    assert all(won.values()) and len(won) == 5
    assert not lost["right identity, two concepts"] and not lost["leakage"]
    above = [what for what in level if "(c)" in what]
    assert len(above) == 2 and not any(level[what] for what in above)  # as good as is not better


def test_the_worst_cases_come_first():
    two = [Case(prompt, 0) for prompt in suite() if prompt.group == "two"][:4]
    found = [measured(True, False, 0.9), measured(False, True), measured(True, False, 0.2), measured(False, False)]
    records = [{"case": c.name, "template": "made", "arms": {FULL: m}} for c, m in zip(two, found, strict=True)]
    order = worst_first(Results(tuple(two), tuple(records), {FULL: ALL[FULL]}, STEPS), FULL)
    assert [case.name for _, case, _ in order] == [two[i].name for i in (1, 3, 2, 0)]
    assert [faults for faults, _, _ in order] == [4, 2, 0, 0]


class Reader(HTMLParser):
    """Collects what a page loads, and which tags were closed."""

    def __init__(self):
        super().__init__()
        self.images, self.links, self.cases, self.rows = [], [], [], 0

    def handle_starttag(self, tag, attributes):
        known = dict(attributes)
        self.images += [known["src"]] if tag == "img" else []
        self.links += [known[key] for key in ("href", "src") if tag in ("link", "script", "a") and known.get(key)]
        self.cases += [known] if known.get("class") == "case" else []
        self.rows += tag == "tr"


def test_the_report_needs_no_other_file(finished, results):
    folder, _ = finished
    page = write_report(folder, results, summarise(results)).read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(page)
    assert not reader.links and not re.search(r"url\(|@import|https?://(?!www\.w3\.org)", page)
    assert [case["data-group"] for case in reader.cases] == ["overlapping"]
    pictures = len(CASES) * (len(ALL) + 1)
    assert len(reader.images) > pictures
    for source in reader.images:
        kind, data = source.split(",", 1)
        assert kind == "data:image/webp;base64" and Image.open(io.BytesIO(base64.b64decode(data))).size[0] >= 64
    assert "One part of the full method changed" in page and "(h1) full-no-injection" in page
    assert "<svg" in page and CASES[0].prompt.text_with_tokens.replace("<", "&lt;").replace(">", "&gt;") in page
    write_report(folder, results, summarise(results))
    assert (folder / "report.html").read_text(encoding="utf-8") == page


def test_what_takes_longest_is_drawn_first_and_records_keep_their_order(tmp_path, monkeypatch):
    one, four = case_of("one"), case_of("four")
    drawn, draw = [], Drawer.draw
    monkeypatch.setattr(Drawer, "draw", lambda self, settings: drawn.append(self.case) or draw(self, settings))
    records = run_cases(tmp_path, [one, four], {"prompt-only": ALL["prompt-only"]}, steps=STEPS)
    assert drawn == [four, one] and [record["case"] for record in records] == [one.name, four.name]


def test_the_quick_look_has_a_picture_of_each_of_its_groups():
    assert [case.prompt.group for case in quick_cases()] == ["four", "similar", "overlapping", "background"]
