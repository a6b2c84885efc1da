"""`weaver evaluate` as it is called: a table of a case by two arms, and what it refuses."""

from __future__ import annotations

import json

import pytest

from weaver.cli import main
from weaver.evaluation.prompts import Case
from weaver.evaluation.suite import quick_cases, suite

STEPS = 2
CASES = [Case(next(prompt for prompt in suite() if prompt.group == "overlapping"), 0)]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--arms", "full,best"], "there is no arm 'best'"),
        (["--processes", "0"], "--processes: is 0, expected 1 or more"),
        (["--sweep", "--arms", "best"], "there is no arm 'best'"),
        (
            ["--sweep", "--arms", "full,full-no-suppression"],
            "--arms: full-no-suppression has the full method's settings",
        ),
    ],
    ids=["unknown arm", "no process", "unknown arm of a sweep", "nothing to sweep"],
)
def test_wrong_arguments_are_told_in_one_line(tmp_path, capsys, arguments, told):
    assert main(["evaluate", "--out", str(tmp_path), *arguments]) == 2
    assert told in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", [["--quick"], []], ids=["quick", "whole"])
def test_the_command_draws_and_reports(tmp_path, capsys, monkeypatch, how):
    monkeypatch.setattr("weaver.evaluation.suite.quick_cases" if how else "weaver.evaluation.suite.cases", CASES.copy)
    monkeypatch.setattr("weaver.evaluation.suite.QUICK_STEPS" if how else "weaver.evaluation.drawing.STEPS", STEPS)
    assert main(["evaluate", *how, "--out", str(tmp_path), "--arms", "prompt-only,full", "--processes", "7"]) == 0
    printed = capsys.readouterr().out
    assert "1 cases by 2 arms: about " in printed and "with one quiet core" in printed  # more have nothing to do
    assert ("aims that the full method misses: " in printed) != bool(how) and "report.html shows it all" in printed
    assert ("Aims, set beforehand" in (tmp_path / "report.html").read_text()) != bool(how)
    assert {path.name for path in tmp_path.iterdir()} >= {"results.json", "results.csv", "report.html", "cases"}
    before = (tmp_path / "results.json").read_bytes()
    assert json.loads(before)["quick"] == bool(how) and json.loads(before)["steps"] == STEPS
    assert main(["evaluate", *how, "--out", str(tmp_path), "--arms", "full"]) == 2
    assert f"--out: {tmp_path} has results of 1 pictures by 2 arms" in capsys.readouterr().err
    assert (tmp_path / "results.json").read_bytes() == before


def test_a_quick_look_does_not_draw_over_cases_of_other_steps(tmp_path, capsys):
    case = quick_cases()[0].name
    record = tmp_path / "cases" / case / "case.json"
    record.parent.mkdir(parents=True)
    record.write_text('{"steps": 24}')
    assert main(["evaluate", "--quick", "--out", str(tmp_path), "--processes", "1"]) == 2
    told = capsys.readouterr().err
    assert f"--out: {record.parent} is of 24 steps and would be drawn again in 18: name another folder" in told
    assert record.read_text() == '{"steps": 24}' and len(list(tmp_path.rglob("*"))) == 3
