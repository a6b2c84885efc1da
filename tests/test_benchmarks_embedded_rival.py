"""The full method beside its closest rival: which pictures count, and what a table of them says."""

from __future__ import annotations

import json

import pytest

from benchmarks.embedded_rival import FIGURES, FULL, FURTHER_SEEDS, MARKS, PAGE, RIVAL, figures, further_cases, markdown
from benchmarks.records import RESULTS
from benchmarks.tables import README
from weaver.evaluation.arms import arm_of
from weaver.evaluation.drawing import STEPS
from weaver.evaluation.results import Results
from weaver.evaluation.suite import SEEDS, cases


def test_the_prompts_are_the_tables_and_no_picture_is():
    assert {case.prompt for case in further_cases()} == {case.prompt for case in cases()}
    assert not {case.name for case in further_cases()} & {case.name for case in cases()}
    assert not set(SEEDS) & set(FURTHER_SEEDS)


def test_figures_are_of_both_arms_on_the_same_pictures():
    of = further_cases()

    def concept(right: bool, leaked: bool) -> dict:
        return {"kind": "animal", "right": right, "leaked": leaked}

    def record(case, number: int) -> dict:
        wrong = number % 10 == 0  # every tenth picture, in the rival's the first animal
        good = [concept(True, False) for _ in case.prompt.concepts]
        return {"arms": {FULL: {"concepts": good}, RIVAL: {"concepts": [concept(not wrong, wrong), *good[1:]]}}}

    drawn = [record(case, number) for number, case in enumerate(of)]
    arms = {name: arm_of(name).chosen for name in (FULL, RIVAL)}
    rows = figures(Results(tuple(of), tuple(drawn), arms, STEPS))

    animals = sum(len(case.prompt.concepts) for case in of)
    share = sum(number % 10 == 0 for number in range(len(of))) / animals
    assert [row["figure"] for row in rows if row["concepts"] == "all"] == list(FIGURES)
    identity, leakage = (row for row in rows if row["concepts"] == "all")
    assert identity[FULL]["value"] == 1 and leakage[FULL]["value"] == 0
    assert identity["difference"]["value"] == pytest.approx(share, abs=1e-4)
    assert leakage["difference"]["value"] == pytest.approx(-share, abs=1e-4)
    assert identity["difference"]["low"] < share < identity["difference"]["high"]
    assert {row["concepts"] for row in rows} == {"all", "1", "2", "3", "4"}

    line = markdown({"prompts": 60, "pictures": len(of), "rows": rows}).splitlines()[4]
    low, high = (100 * identity["difference"][end] for end in ("low", "high"))
    assert (
        line == f"| right identity | all | 100.0% | {1 - share:.1%} | {100 * share:+.1f} ({low:+.1f} to {high:+.1f}) |"
    )


def test_the_page_has_what_was_recorded():
    record = json.loads((RESULTS / "embedded_rival.json").read_text(encoding="utf-8"))
    assert record["seeds"] == list(FURTHER_SEEDS) and record["pictures"] == len(further_cases())
    assert record["settings"] == {name: arm_of(name).chosen.as_mapping() for name in (FULL, RIVAL)}
    there = PAGE.read_text(encoding="utf-8").partition(MARKS[0])[2].partition(MARKS[1])[0]
    assert there.strip() == markdown(record)
    identity, leakage = (row for row in record["rows"] if row["concepts"] == "all")
    wrong, leaks = ({arm: identity["animals"] - identity["of"][arm] for arm in (FULL, RIVAL)}, leakage["of"])
    assert leaks == {FULL: 0, RIVAL: 1}
    each = f"{wrong[FULL]} fail and none leaks in (h), {wrong[RIVAL]} fail and 1 leaks in (c)"
    assert f"{identity['animals']} animals {each}" in " ".join(PAGE.read_text(encoding="utf-8").split())
    readme = " ".join(README.read_text(encoding="utf-8").split())
    assert f"it is {wrong[FULL]} and {wrong[RIVAL]} of {identity['animals']}" in readme
