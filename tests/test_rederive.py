"""What follows from the embedded model's weights is made anew in order, and a stopped run goes on."""

from __future__ import annotations

import importlib.util
import json
import shlex
from types import SimpleNamespace

import pytest

from benchmarks import rederive


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """The names of the steps that were run; those in `fails` end with 3."""
    names, by_command = [], {tuple(shlex.split(step.command)): step.name for step in rederive.STEPS}
    found = SimpleNamespace(names=names, fails=set())

    def run(command, **options):
        names.append(by_command[tuple(command[1:])])
        return SimpleNamespace(returncode=3 * (names[-1] in found.fails))

    monkeypatch.setattr(rederive, "DONE", tmp_path / "deep" / "done.json")
    monkeypatch.setattr(rederive.subprocess, "run", run)
    return found


def test_every_step_is_a_command_that_is_there():
    for step in rederive.STEPS:
        assert importlib.util.find_spec(shlex.split(step.command)[1]), step.name
        tests = [part for part in shlex.split(step.command) if part.startswith("tests/")]
        assert all((rederive.ROOT / path).exists() for path in tests), step.name


def test_a_step_makes_every_recorded_figure_of_the_embedded_model():
    made = " ".join(step.makes for step in rederive.STEPS)
    results = rederive.ROOT / "benchmarks" / "results"
    for path in results.glob("*.json"):
        assert path.name in made and "model" in json.loads(path.read_text(encoding="utf-8")), path.name
    for name in ("demo.png", "failures.png", "methods.png", "seeds.png", "sweep.svg", "whole_loras.png"):
        assert f"docs/{name}" in made


def test_a_stopped_run_goes_on_with_the_step_that_failed(ran, capsys):
    every = [step.name for step in rederive.STEPS]
    ran.fails.add("evaluate")
    assert rederive.main([]) == 3 and ran.names == every[: every.index("evaluate") + 1]
    assert "evaluate ended with 3" in capsys.readouterr().err
    ran.names.clear()
    ran.fails.clear()
    assert rederive.main([]) == 0 and ran.names == every[every.index("evaluate") :]
    ran.names.clear()
    assert rederive.main([]) == 0 and ran.names == []
    assert rederive.main(["--list"]) == 0 and ran.names == []
    assert rederive.main(["--again", "--after", "methods"]) == 0 and ran.names == every[every.index("methods") + 1 :]


def test_what_was_done_by_itself_is_not_done_again(ran):
    every = [step.name for step in rederive.STEPS]
    ran.fails.add("defaults")
    assert rederive.main(["--after", "derive"]) == 3 and ran.names == every[1 : every.index("defaults") + 1]
    ran.names.clear()
    ran.fails.clear()
    assert rederive.main([]) == 0 and ran.names == every[every.index("defaults") :]


def test_a_step_is_done_again_where_what_it_follows_from_changed(ran, monkeypatch, tmp_path):
    rederive.main([])
    ran.names.clear()
    chosen = tmp_path / "chosen.json"
    chosen.write_text("{}")
    monkeypatch.setattr(rederive, "CHOSEN_FILE", chosen)
    rederive.main([])
    assert ran.names == [step.name for step in rederive.STEPS if step.after == "defaults"]
    ran.names.clear()
    monkeypatch.setattr(rederive, "model_hash", lambda: "other weights")
    rederive.main([])
    assert ran.names == [step.name for step in rederive.STEPS]
