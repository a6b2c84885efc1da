"""The README's picture: taken of the whole demonstration only, with the time that it took."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import cache

import pytest
from safetensors.torch import load_file, save_file

from benchmarks import embedded_demo as module
from weaver.concepts.bank import resolve_prompts
from weaver.demo import demo_job, with_shipped_concepts
from weaver.embedded import concept_path, load_pipeline
from weaver.job.choose import SEED_STRIDE
from weaver.job.file import MANIFEST_VERSION, job_to_mapping
from weaver.job.resolve import resolve_job

REPORT = {"stages": {"bank": 200.0, "fusion": 6.5}, "total_seconds": 212.5, "concepts": {}}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """What the demonstration leaves, as far as it is read; figures go into the folder too."""
    monkeypatch.setattr(module, "PICTURE", tmp_path / "demo.png")
    monkeypatch.setattr(module, "RECORD", tmp_path / "embedded_demo.json")
    found = tmp_path / "run"
    (found / "concepts").mkdir(parents=True)
    for spec in demo_job().everyone:
        shutil.copy(concept_path(spec.name), found / "concepts")
    (found / "sheet.png").write_bytes(b"a sheet")
    (found / "report.json").write_text(json.dumps(REPORT))
    write_manifest(found, demo_job())
    return found


@cache
def model():
    """The embedded model, of which a manifest reads what it is."""
    return load_pipeline()


def write_manifest(folder, job, fusion=None, as_well=lambda job: job, template=1, **changes) -> None:
    """As a run writes it: with the one template that was taken, by its number."""
    resolved = as_well(resolve_job(job, model(), resolve_prompts(job, {})))
    taken = {"seed": resolved.template.seed + template * SEED_STRIDE, "tries": 1}
    mapping = job_to_mapping(replace(resolved, template=replace(resolved.template, **taken)), folder) | changes
    mapping["fusion"] |= fusion or {}
    record = {"versions": {}, "weights": {}}
    text = json.dumps({"weaver_manifest": MANIFEST_VERSION, "job": mapping, "inputs": {}, "record": record})
    (folder / "manifest.json").write_text(text)


def test_the_demonstration_is_taken_with_its_time_and_the_machine(folder, tmp_path):
    assert module.main([str(folder)]) == 0
    record = json.loads((tmp_path / "embedded_demo.json").read_text())
    assert (tmp_path / "demo.png").read_bytes() == b"a sheet"
    assert record["stages"] == REPORT["stages"] and record["total_seconds"] == 212.5 and "threads" in record["machine"]
    assert set(record["concepts"]) == {spec.name for spec in demo_job().everyone} and "cached" not in record
    assert record["other_numbers"] == []


def test_a_processor_that_rounds_otherwise_is_told(folder, tmp_path, capsys):
    path = folder / "concepts" / "blue-panda.safetensors"
    save_file({name: values * (1 + 1e-6) for name, values in load_file(path).items()}, path)
    assert module.main([str(folder)]) == 0 and "than those that ship: blue-panda" in capsys.readouterr().out
    assert json.loads((tmp_path / "embedded_demo.json").read_text())["other_numbers"] == ["blue-panda"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda f: write_manifest(f, demo_job(), as_well=with_shipped_concepts), "concepts[0].file is 'embedded"),
        (
            lambda f: write_manifest(f, demo_job("1")),
            "prompt is 'a cat, forest background', the demonstration's is 'a cat and",
        ),
        (lambda f: write_manifest(f, demo_job(), seed=3), "seed is 3, the demonstration's is 11"),
        (lambda f: write_manifest(f, demo_job(), template=10), "template.seed is 10000041, the demonstration's is 11"),
        (lambda f: write_manifest(f, demo_job(), {"guidance": 7.5}), "fusion.guidance is 7.5, the demonstration's is"),
        (lambda f: (f / "manifest.json").write_text("[]"), "expected fields with names"),
        (lambda f: (f / "manifest.json").unlink(), "holds no manifest.json"),
        (lambda f: (f / "report.json").unlink(), "holds no report.json"),
        (
            lambda f: (f / "report.json").write_text(json.dumps(REPORT | {"cached": ["inversion", "features"]})),
            "inversion and features taken from the cache (--cache off computes them)",
        ),
        (lambda f: shutil.rmtree(f / "concepts"), "not trained in this run: tuxedo-cat"),
    ],
    ids=[
        "quick",
        "one animal",
        "another seed",
        "another template",
        "another guidance",
        "no manifest",
        "without",
        "no report",
        "cached",
        "no concepts",
    ],
)
def test_another_sheet_is_refused_and_nothing_taken(folder, tmp_path, capsys, change, told):
    change(folder)
    assert module.main([str(folder)]) == 1 and told in capsys.readouterr().err
    assert not (tmp_path / "demo.png").exists() and not (tmp_path / "embedded_demo.json").exists()


def test_the_recorded_demonstration_tells_its_time():
    record = json.loads((module.ROOT / "benchmarks" / "results" / "embedded_demo.json").read_text(encoding="utf-8"))
    assert record["machine"] and 0 < sum(record["stages"].values()) <= record["total_seconds"]
    assert min(record["stages"].values()) > 0 and "cached" not in record
    assert f"after {record['total_seconds']:.0f} seconds" in (module.ROOT / "README.md").read_text(encoding="utf-8")
