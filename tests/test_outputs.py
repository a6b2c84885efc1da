"""Results are written whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from jobs import TRAINED, job_of, picture

from weaver import folder, outputs
from weaver.errors import WeaverError
from weaver.folder import check_folder
from weaver.job import TemplateSpec, prepare
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


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "drawn"])
def test_the_sheet_tells_whether_the_background_was_kept(job_folder, tmp_path, monkeypatch, kept):
    panels, sheet = [], outputs.contact_sheet

    def noted(cards, shown, **texts):
        panels.extend(shown)
        return sheet(cards, shown, **texts)

    monkeypatch.setattr(outputs, "contact_sheet", noted)
    run_job(job_of(job_folder, template={"image": "template.png"}, steps=1, keep_background=kept), tmp_path / "run")
    assert panels[-1][1].endswith(", the template's background kept") == kept


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        (TemplateSpec(image=Path("photo.jpg")), "from a picture"),
        (TemplateSpec(model="same"), "from the prompt, by the base model"),
        (TemplateSpec(model="embedded"), "from the prompt, by the embedded model"),
        (TemplateSpec(model="stabilityai/sdxl-turbo"), "from the prompt, by stabilityai/sdxl-turbo"),
    ],
    ids=["picture", "same", "embedded", "hub"],
)
def test_the_sheet_names_the_model_of_the_template(spec, told):
    assert outputs._template_source(spec) == told


def test_a_template_of_another_folder_is_called_by_its_name(job_folder, tmp_path, monkeypatch):
    panels, sheet = [], outputs.contact_sheet
    monkeypatch.setattr(
        outputs, "contact_sheet", lambda cards, shown, **k: panels.extend(shown) or sheet(cards, shown, **k)
    )
    other = tmp_path / "painter"
    shutil.copytree(job_folder / "model", other)
    run_job(job_of(job_folder, template={"model": str(other), "steps": 1}, steps=1), tmp_path / "run")
    assert panels[0][:2] == ("Template", "from the prompt, by painter")


def test_results_can_not_go_into_a_file(job_folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WeaverError, match="out: .*file is a file, not a folder"):
        run_job(job_of(job_folder), tmp_path / "file" / "run")


def test_results_can_not_go_where_nothing_can_be_written(tmp_path):
    results = [Path("sheet.png"), Path("concepts/tom.safetensors")]
    with pytest.raises(WeaverError, match=r"out: /proc is not writable \("):
        check_folder(Path("/proc/none"), results)
    (tmp_path / "sheet.png").mkdir()
    with pytest.raises(WeaverError, match="out: .*sheet.png is a folder"):
        check_folder(tmp_path, results)
    (tmp_path / "sheet.png").rmdir()
    (tmp_path / "concepts").write_text("")
    with pytest.raises(WeaverError, match="out: .*concepts is a file"):
        check_folder(tmp_path, results)
    check_folder(tmp_path, results[:1])
    assert [path.name for path in tmp_path.iterdir()] == ["concepts"]
    check_folder(tmp_path / "new" / "run", results)
    assert not (tmp_path / "new").exists()


def test_no_result_replaces_what_the_run_reads(job_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    (tmp_path / "concepts").mkdir()
    (tmp_path / "manifest.json").write_text("the job")
    picture(5).save(tmp_path / "template.png")
    own = tmp_path / "concepts" / "tom.safetensors"
    own.write_bytes((job_folder / "rex.safetensors").read_bytes())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    job = job_of(
        job_folder,
        template={"image": str(tmp_path / "template.png")},
        concepts=[TRAINED | {"train": TRAINED["train"] | {"images": str(tmp_path)}}, {"file": str(own), "name": "rex"}],
    )
    with pytest.raises(WeaverError) as caught:
        run_job(job, tmp_path, source=str(tmp_path / "manifest.json"))
    for told in (
        f"template.image: {tmp_path}/template.png would be overwritten by a result",
        f"concepts[0].train.images: results in {tmp_path} would be among its pictures",
        f"concepts[1].file: {own} would be overwritten by a result",
        f"the job file: {tmp_path}/manifest.json would be overwritten by a result; choose another --out",
    ):
        assert told in str(caught.value)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.parametrize("call", range(4))
def test_an_interrupt_between_two_moves_loses_nothing(tmp_path, monkeypatch, call):
    """The interrupt comes right after a move, before anything else can be noted."""
    (tmp_path / "a.png").write_text("earlier")
    moves, replace = [], os.replace

    def interrupted(*paths):
        moves.append(paths)
        replace(*paths)
        if len(moves) == call + 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), folder.all_or_nothing(tmp_path) as partial:
        for name in ("a.png", "b.png", "c.png"):
            (partial / name).write_text("new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.png": "earlier"}


def test_an_error_while_moving_puts_an_earlier_run_back(tmp_path):
    before = {"a.png": "earlier", "z.png/inside": "a folder in the way"}
    for name, text in before.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(OSError), folder.all_or_nothing(tmp_path) as partial:
        for name in ("a.png", "b.png", "concepts/tom", "z.png"):
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_text("new")
    left = {p.relative_to(tmp_path).as_posix(): p.read_text() for p in tmp_path.rglob("*") if p.is_file()}
    assert left == before and not (tmp_path / "concepts").exists()


def test_a_new_run_replaces_an_earlier_one_and_keeps_its_concept_files(tmp_path):
    (tmp_path / "concepts").mkdir()
    for name in ("a.png", "concepts/tom", "concepts/rex"):
        (tmp_path / name).write_text("earlier")
    with folder.all_or_nothing(tmp_path) as partial:
        (partial / "concepts").mkdir()
        for name in ("a.png", "concepts/tom"):
            (partial / name).write_text("new")
    left = {p.relative_to(tmp_path).as_posix(): p.read_text() for p in tmp_path.rglob("*") if p.is_file()}
    assert left == {"a.png": "new", "concepts/tom": "new", "concepts/rex": "earlier"}
