"""The search: its budget, what it finds, and that it goes on where it was."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import partial

import pytest

from weaver.cli import main
from weaver.evaluation import sweep as module
from weaver.evaluation.arms import ARMS, arm_of, default_settings
from weaver.evaluation.charts import _FULL as COLOUR
from weaver.evaluation.suite import sweep_cases
from weaver.evaluation.sweep import (
    BUDGET,
    GRID,
    ORIGIN,
    Tried,
    finals,
    objective,
    page_of,
    panels_of,
    search,
    sweep,
)

GRID_OF_TWO = {"x": (0.0, 1.0, 2.0, 4.0), "n": (0, 1, 2, 3)}


def hill(values: dict) -> tuple[float, float]:
    """Highest at x = 2.75, n = 2."""
    return -((values["x"] - 2.75) ** 2) - (values["n"] - 2) ** 2, 0.0


def test_a_search_climbs_and_refines():
    tried = search({"x": 1.0, "n": 0}, GRID_OF_TWO, 40, hill)
    best = max(tried, key=lambda one: one.score)
    assert best.values["n"] == 2 and abs(best.values["x"] - 2.75) < 0.01
    assert all(isinstance(one.values["n"], int) for one in tried)
    assert tried[0].along is None and tried[0].values == {"x": 1.0, "n": 0}
    looked = [tuple(one.values.values()) for one in tried]
    assert len(set(looked)) == len(looked)
    curve = [one.values["x"] for one in tried if one.along == "x"][:3]
    assert curve == [0.0, 2.0, 4.0]  # the first round has all values of the grid


@pytest.mark.parametrize("budget", [1, 4, 9])
def test_no_arm_may_try_more_than_its_budget(budget):
    assert len(search({"x": 1.0, "n": 0}, GRID_OF_TWO, budget, hill)) == budget


def test_a_search_ends_where_nothing_is_left():
    tried = search({"n": 3}, {"n": (0, 1, 2)}, 40, lambda values: (float(values["n"]), 0.0))
    assert [one.values["n"] for one in tried] == [3, 0, 1, 2]


def test_equal_scores_keep_what_was_tried_first():
    tried = search({"x": 1.0, "n": 0}, GRID_OF_TWO, 12, lambda values: (0.5, 0.5))
    assert max(tried, key=lambda one: one.score) is tried[0]


def test_the_best_few_are_looked_at_once_more_in_the_order_of_trial():
    tried = [Tried({"x": x}, None, (score, 0.0)) for x, score in enumerate((0.2, 0.9, 0.1, 0.9, 0.5))]
    again = {1: 0.6, 3: 0.8, 4: 0.8}
    last = finals(tried, lambda values: (again[values["x"]], 0.0), 3)
    assert [(one.values["x"], one.score[0]) for one in last] == [(1, 0.6), (3, 0.8), (4, 0.8)]
    assert len(finals(tried[:1], lambda values: (0.0, 0.0), 3)) == 1


def picture(
    right: bool, leaked: bool, psnr: float | None, ground: bool | None = None, outlines: float | None = None
) -> dict:
    """One animal's measures, and before a background that is a concept, right or wrong, where `ground` says so."""
    concepts = [{"kind": "animal", "right": right, "leaked": leaked, "own": 0.8, "base": 0.2, "others": 0.3}]
    if ground is not None:
        concepts += [{"kind": "background", "right": ground, "leaked": None, "own": 0.6, "base": 0.5, "others": 0.1}]
    return {"concepts": concepts, "background_psnr": psnr, "mask_iou": outlines}


def test_the_objective_is_as_written():
    assert objective([picture(True, False, 25.0)]) == (1.0, 0.5)
    assert objective([picture(True, True, None)]) == (0.0, 0.5)
    assert objective([picture(True, False, 15.0), picture(False, False, 15.0)]) == (0.5 - 0.25, 0.5)
    assert objective([picture(True, False, None, ground=False)]) == (0.5, 0.3)
    assert objective([picture(True, True, None, ground=True)]) == (0.0, 0.3)
    kept = [picture(True, False, None, outlines=share) for share in (0.7, 0.8)]
    assert objective([*kept, picture(False, False, None)]) == (round(2 / 3 + 0.75, 6), 0.5)
    absent = picture(False, False, None)
    absent["concepts"][0] |= dict.fromkeys(("own", "base", "others"))
    assert objective([absent]) == (0.0, -2.0)


def test_every_arm_can_be_swept_from_its_defaults():
    for arm in ARMS:
        begun = arm.settings(default_settings())
        assert arm.swept and all(getattr(begun, name) is not None and name in GRID for name in arm.swept)


def test_a_sweep_writes_what_it_tried_and_goes_on(tmp_path, monkeypatch):
    case = next(case for case in sweep_cases() if case.prompt.layout == "touching")
    arms = [arm_of("no-injection")]
    options = {"budget": 2, "arms": arms, "cases": [case], "steps": 2}
    record = sweep(tmp_path, **options)
    assert json.loads((tmp_path / "sweep.json").read_text()) == record
    found = record["arms"]["no-injection"]
    assert len(found["tried"]) == 2 and found["tried"][0]["values"] == {name: ORIGIN[name] for name in arms[0].swept}
    assert record["cases"] == [case.name] and record["finals"] == [
        f"{case.prompt.name}-s{case.seed + more}" for more in (1, 2)
    ]
    assert [one["values"] for one in found["finals"]] == [one["values"] for one in found["tried"]]  # two are the best
    best = max(found["finals"], key=lambda one: one["score"])
    assert best == {"values": found["chosen"], "score": found["score"]}
    monkeypatch.setattr(module, "measured", lambda *args: pytest.fail("drawn again"))
    assert sweep(tmp_path, **options) == record
    with pytest.raises(pytest.fail.Exception, match="drawn again"):
        sweep(tmp_path, **options | {"budget": 3})


def test_equal_settings_of_two_arms_are_drawn_once(tmp_path, monkeypatch):
    case = next(case for case in sweep_cases() if case.prompt.layout == "touching")
    options, pair = {"budget": 1, "cases": [case], "steps": 2}, [arm_of("full"), arm_of("no-suppression")]
    first = sweep(tmp_path, arms=pair[:1], **options)["arms"]["full"]
    full, other = (replace(a.settings(default_settings()), **{n: ORIGIN[n] for n in a.swept}) for a in pair)
    assert full == other  # where both set out
    monkeypatch.setattr(module, "measured", lambda *args: pytest.fail("drawn again"))
    again = sweep(tmp_path, arms=pair[1:], **options)["arms"]["no-suppression"]
    assert again["score"] == first["score"]
    with pytest.raises(pytest.fail.Exception, match="drawn again"):
        sweep(tmp_path, arms=[arm_of("dense-masks")], **options)


def test_curves_show_what_was_tried_along_each_setting():
    tried = search({"x": 1.0, "n": 0}, GRID_OF_TWO, 9, hill)
    best = max(tried, key=lambda one: one.score)
    entries = [{"values": dict(t.values), "along": t.along, "score": list(t.score)} for t in tried]
    arm = {"chosen": dict(best.values), "score": list(best.score), "tried": entries}
    record = {"cases": ["a", "b"], "budget": 9, "objective": "a > b", "arms": {"full": arm}}
    page = page_of(record)
    assert "(h) full" in page and "a &gt; b" in page and page.count("<polyline") == 2
    points = {(name, t.values[name]) for name in ("x", "n") for t in tried if t.along in (name, None)}
    told = set(re.findall(r"<title>(\w) ([\d.]+): ", page))
    assert {(name, float(value)) for name, value in told} == points
    assert page.count(f'fill="{COLOUR}"') == 4  # dot and label of the value that was chosen, in both


def test_a_curve_sets_out_from_the_best_so_far():
    def entry(x: float, y: float, along: str | None, score: float) -> dict:
        return {"values": {"x": x, "y": y}, "along": along, "score": [score, 0.0]}

    tried = [entry(1, 1, None, 0.3), entry(2, 1, "x", 0.6), entry(2, 3, "y", 0.5), entry(2.5, 1, "x", 0.7)]
    panels = panels_of({"chosen": {"x": 2.5, "y": 1}, "tried": tried})
    assert panels[0] == ("x", ((1, 0.3), (2, 0.6), (2.5, 0.7)), 2.5)
    assert panels[1] == ("y", ((1, 0.6), (3, 0.5)), 1)  # where x had been found to be better at 2


def test_the_command_sweeps(tmp_path, capsys, monkeypatch):
    case = next(case for case in sweep_cases() if case.prompt.layout == "touching")
    monkeypatch.setattr("weaver.evaluation.sweep.sweep", partial(sweep, budget=1, cases=[case], steps=2))
    assert main(["evaluate", "--sweep", "--out", str(tmp_path), "--arms", "dense-masks", "--processes", "1"]) == 0
    printed = capsys.readouterr().out
    told = f"1 arms by {BUDGET} settings by {len(sweep_cases())} cases: about "
    assert told in printed and "right - leaked" in printed
    assert "(g) dense-masks" in printed and (tmp_path / "sweep.json").is_file()
