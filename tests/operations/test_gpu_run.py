"""`make gpu` without a GPU: how its parts are run, kept apart, skipped and told, with commands that take no time."""

from __future__ import annotations

import json
import sys
import time
from functools import partial

import pytest
import torch

from operations import gpu_launches
from operations.gpu_run import ENDING, Part, fingerprint, main, make_parts, run_all, run_commands

MACHINE = {"python": "3.12.3", "torch": "2.11.0", "triton": "3.6.0", "device": "NVIDIA H200 (sm_90)"}
PYTHON = (sys.executable, "-c")


def part(name, number, code, **options):
    """A part that runs a line of Python in the project's folder."""
    options = {"seconds": 20, "dry": (*PYTHON, "print('dry')"), "sources": ("*.py",), **options}
    return Part(name=name, number=number, commands=((*PYTHON, code),), **options)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "source.py").write_text("1")
    return tmp_path / "root"


def run(parts, root, **options):
    """The exit status and the report."""
    code = run_all(parts, root.parent / "out", options.pop("machine", MACHINE), root=root, **options)
    return code, json.loads((root.parent / "out" / "report.json").read_text())["parts"]


def test_a_broken_part_stops_no_other_and_the_status_says_which(root, capsys):
    parts = [part("one", 1, "print('fine')"), part("two", 2, "1 / 0"), part("three", 4, "raise SystemExit(5)")]
    code, report = run([*parts, part("four", 8, "print('fine')")], root)
    assert code == 6
    assert [report[name]["status"] for name in report] == ["passed", "exit status 1", "exit status 5", "passed"]
    told = capsys.readouterr().out
    assert "ZeroDivisionError" in told and "three: exit status 5" in told
    assert "fine" in (root.parent / "out" / "log.txt").read_text()


def test_what_passed_is_skipped_and_what_failed_is_tried_again(root):
    count = "import pathlib; p = pathlib.Path('{0}'); p.write_text(p.read_text() + '.' if p.exists() else '.')"
    parts = [part("good", 1, count.format("good")), part("bad", 2, count.format("bad") + "; 1 / 0")]
    assert [run(parts, root)[0] for _ in range(3)] == [2, 2, 2]
    assert (root / "good").read_text() == "." and (root / "bad").read_text() == "..."
    assert run(parts, root, machine={**MACHINE, "triton": "4.0"})[0] == 2
    (root / "source.py").write_text("2")
    run(parts, root, machine={**MACHINE, "triton": "4.0"})
    assert (root / "good").read_text() == "...", "another compiler, and another source"


def test_what_is_unfinished_goes_on_next_time(root, capsys):
    code = "import pathlib; p = pathlib.Path('begun'); code = 0 if p.exists() else 3; p.touch(); raise SystemExit(code)"
    parts = [part("long", 4, code)]
    assert run(parts, root)[0] == 4 and "long: unfinished" in capsys.readouterr().out
    assert run(parts, root)[0] == 0 and "long: passed" in capsys.readouterr().out
    assert run(parts, root)[0] == 0 and "long: passed before" in capsys.readouterr().out


def test_another_machine_goes_on_from_the_folder(root):
    """A row is added in each call; the project's folder is a fresh one in the second."""
    code = "import pathlib; p = pathlib.Path('deep/rows'); p.parent.mkdir(exist_ok=True); p.open('a').write('row ')"
    parts = [part("rows", 1, code + "; raise SystemExit(3)", results=("deep/rows",))]
    run(parts, root)
    (root / "deep" / "rows").unlink()
    run(parts, root, machine={**MACHINE, "device": None})
    run(parts, root, dry=True)
    assert not (root / "deep" / "rows").exists()
    run(parts, root)
    assert (root.parent / "out" / "rows").read_text() == "row row "


def test_a_part_that_takes_too_long_is_ended_with_all_it_started(root):
    code = (
        "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', "
        "'import time, pathlib; time.sleep(3); pathlib.Path(\"late\").touch()']); time.sleep(60)"
    )
    start = time.monotonic()
    parts = [part("slow", 1, code, seconds=1, results=("kept",)), part("next", 2, "print(1)")]
    (root / "kept").write_text("rows so far")
    status, report = run(parts, root)
    assert status == 1 and report["slow"]["status"] == "out of time after 1 s" and report["next"]["status"] == "passed"
    assert time.monotonic() - start < 30
    assert (root.parent / "out" / "kept").read_text() == "rows so far", "what was written until then is kept"
    time.sleep(3)
    assert not (root / "late").exists()


def test_without_a_gpu_every_part_says_so_in_a_line(root, capsys):
    parts = [part("one", 1, "1 / 0"), part("two", 2, "1 / 0")]
    assert run(parts, root, machine={**MACHINE, "device": None})[0] == 3
    assert capsys.readouterr().out.splitlines() == [
        f"{name}: needs an NVIDIA GPU, and torch 2.11.0 sees none" for name in ("one", "two")
    ]


def test_a_dry_run_walks_all_parts_and_counts_for_nothing(root):
    parts = [part("one", 1, "print('wet')"), part("two", 2, "print('wet')", dry=(*PYTHON, "1 / 0"))]
    assert run(parts, root, dry=True, machine={**MACHINE, "device": None})[0] == 2
    assert run(parts, root)[0] == 0
    assert (root.parent / "out" / "log.txt").read_text().count("\nwet") == 2


def test_a_tool_that_is_not_installed_is_no_failure(root):
    code, report = run([part("check", 1, "1 / 0", needs="no-such-program")], root)
    assert code == 0 and "no-such-program is not installed" in report["check"]["status"]


def test_all_commands_of_a_part_are_run(root, tmp_path):
    commands = [("no-such-program",), (*PYTHON, "raise SystemExit(9)"), (*PYTHON, "print('last')")]
    status = run_commands(commands, tmp_path / "log", 20, root)
    assert status == "no-such-program does not start, exit status 9"
    assert "last" in (tmp_path / "log").read_text()


def test_commands_see_the_project_and_no_interpreter_of_kernels(root, tmp_path):
    code = "import os; print(os.environ['PYTHONPATH'].split(os.pathsep)[:2], os.environ['TRITON_INTERPRET'])"
    run_commands([(*PYTHON, code)], tmp_path / "log", 20, root)
    assert f"['{root}/tests', '{root}'] 0" in (tmp_path / "log").read_text()


def test_the_parts_fit_eight_minutes_and_leave_six_files():
    parts = make_parts()
    assert [part.name for part in parts][:3] == ["tests", "tune", "benchmarks"]
    assert sum(part.seconds + sum(ENDING) * len(part.commands) for part in parts) <= 480
    assert len({part.number for part in parts}) == len(parts)
    assert 2 + sum(len(part.results) for part in parts) == 6
    for one in parts:
        assert fingerprint(one.sources, MACHINE) != fingerprint((), MACHINE), "its sources are there"


def test_a_launch_that_is_not_seen_or_not_finite_is_no_pass(monkeypatch, capsys):
    monkeypatch.setattr(gpu_launches, "ODD", dict(list(gpu_launches.ODD.items())[:2]))
    monkeypatch.setattr(gpu_launches, "on_gpu", lambda case: case)
    assert gpu_launches.main(["odd"]) == 0 and "NOT FINITE" not in capsys.readouterr().out
    monkeypatch.setattr(gpu_launches, "context_attention", lambda **case: case["q"] * torch.nan)
    assert gpu_launches.main(["odd"]) == 1 and capsys.readouterr().out.count("NOT FINITE") == 2
    monkeypatch.setattr(gpu_launches, "lora_on_gpu", lambda case: case)
    assert gpu_launches.main(["odd-lora"]) == 0 and "NOT FINITE" not in capsys.readouterr().out
    of_cpu = partial(torch.profiler.profile, activities=[torch.profiler.ProfilerActivity.CPU])
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: of_cpu())
    monkeypatch.setattr(gpu_launches, "launch_layers", lambda device: None)
    monkeypatch.setattr(gpu_launches.shutil, "which", lambda program: None)
    assert gpu_launches.main(["profile"]) == 1 and "saw 0 launches" in capsys.readouterr().out


def test_a_folder_must_be_named(capsys):
    with pytest.raises(SystemExit):
        main([])
    assert "--out" in capsys.readouterr().err
