"""Results are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
from jobs import job_of

from weaver import outputs
from weaver.errors import WeaverError
from weaver.run import run_job


def test_an_error_while_writing_leaves_nothing_half_written(job_folder, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("no space left")

    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "fused.png").write_text("of an earlier run")
    job = job_of(job_folder, template={"image": "template.png"}, steps=1)
    monkeypatch.setattr(outputs, "contact_sheet", full)
    for out in (tmp_path / "new" / "run", kept):
        with pytest.raises(OSError, match="no space left"):
            run_job(job, out)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert [path.name for path in kept.iterdir()] == ["fused.png"]
    assert (kept / "fused.png").read_text() == "of an earlier run"


def test_results_can_not_go_into_a_file(job_folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WeaverError, match="out: .*file is a file, not a folder"):
        run_job(job_of(job_folder), tmp_path / "file" / "run")


def test_results_can_not_go_where_nothing_can_be_written(tmp_path):
    with pytest.raises(WeaverError, match=r"out: can't write into /proc \("):
        outputs.check_folder(Path("/proc/none"))
    (tmp_path / "sheet.png").mkdir()
    with pytest.raises(WeaverError, match="out: .*sheet.png is a folder"):
        outputs.check_folder(tmp_path)
    (tmp_path / "sheet.png").rmdir()
    (tmp_path / "concepts").write_text("")
    with pytest.raises(WeaverError, match="out: .*concepts is a file"):
        outputs.check_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["concepts"]
    outputs.check_folder(tmp_path / "new" / "run")
    assert not (tmp_path / "new").exists()


def test_an_error_while_moving_puts_an_earlier_run_back(tmp_path):
    before = {"a.png": "earlier", "z.png/inside": "a folder in the way"}
    for name, text in before.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(OSError), outputs._all_or_nothing(tmp_path) as partial:
        for name in ("a.png", "b.png", "concepts/tom", "z.png"):
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_text("new")
    left = {p.relative_to(tmp_path).as_posix(): p.read_text() for p in tmp_path.rglob("*") if p.is_file()}
    assert left == before and not (tmp_path / "concepts").exists()


def test_a_new_run_replaces_an_earlier_one_and_keeps_its_concept_files(tmp_path):
    (tmp_path / "concepts").mkdir()
    for name in ("a.png", "concepts/tom", "concepts/rex"):
        (tmp_path / name).write_text("earlier")
    with outputs._all_or_nothing(tmp_path) as partial:
        (partial / "concepts").mkdir()
        for name in ("a.png", "concepts/tom"):
            (partial / name).write_text("new")
    left = {p.relative_to(tmp_path).as_posix(): p.read_text() for p in tmp_path.rglob("*") if p.is_file()}
    assert left == {"a.png": "new", "concepts/tom": "new", "concepts/rex": "earlier"}
