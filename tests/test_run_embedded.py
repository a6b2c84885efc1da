"""Jobs on the model that ships: the demonstration, and regions that have little of their own."""

from __future__ import annotations

from dataclasses import replace

import pytest
from PIL import Image

from weaver.demo import demo_job, with_shipped_concepts
from weaver.errors import WeaverError
from weaver.job import MaskSpec, TemplateSpec, choose
from weaver.run import run_job

LEFT, RIGHT = MaskSpec(box=(0.05, 0.3, 0.45, 0.95)), MaskSpec(box=(0.55, 0.3, 0.95, 0.95))


def short_demo(*masks: MaskSpec, tries: int = 1, overlap: str = "priority"):
    """`weaver demo --quick` in two steps, with its masks given: two steps draw nothing that could be found."""
    job = with_shipped_concepts(demo_job())
    return replace(
        job,
        steps=2,
        template=replace(job.template, steps=2, tries=tries),
        masks=replace(job.masks, overlap=overlap),
        concepts=tuple(replace(spec, mask=mask) for spec, mask in zip(job.concepts, masks, strict=True)),
    )


def test_the_demonstration_gives_the_same_picture_twice(tmp_path):
    first, again = (run_job(short_demo(LEFT, RIGHT), tmp_path / name) for name in ("first", "again"))
    for name in ("template.png", "masks.png", "fused.png"):
        assert (first.folder / name).read_bytes() == (again.folder / name).read_bytes(), name
    assert list(first.report["concepts"]) == [spec.name for spec in demo_job().everyone]
    assert all(-1 <= value <= 1 for scores in first.report["concepts"].values() for value in scores.values())
    assert all(seconds > 0 for stage, seconds in first.report["stages"].items() if stage != "masks")


@pytest.mark.parametrize("tries", [1, 2])
def test_a_region_that_is_shared_whole_is_scored(tmp_path, tries):
    masks = MaskSpec(box=(0, 0, 0.9, 1)), MaskSpec(box=(0.25, 0.25, 0.75, 0.75))
    done = run_job(short_demo(*masks, tries=tries, overlap="share"), tmp_path / "out")
    assert done.result.masks[1].max() == 0.5
    assert all(None not in scores.values() for scores in done.report["concepts"].values())
    assert (done.folder / "fused.png").is_file()


def test_a_word_that_the_segmenter_does_not_know_is_told_before_the_template(tmp_path, monkeypatch):
    monkeypatch.setattr(choose, "template_picture", lambda *a, **k: pytest.fail("sampling began"))
    with pytest.raises(WeaverError, match=r"^my.yaml: concepts\[1\].mask: the segmenter does not know 'unicorn'"):
        run_job(short_demo(LEFT, MaskSpec(word="unicorn")), tmp_path / "out", source="my.yaml")


def test_a_word_that_is_not_in_the_template_names_its_field(tmp_path):
    job = short_demo(LEFT, MaskSpec(word="Panda"))
    image = tmp_path / "grey.png"
    Image.new("RGB", (64, 64), "grey").save(image)
    job = replace(job, template=TemplateSpec(image=image))
    with pytest.raises(WeaverError, match=r"^my.yaml: concepts\[1\].mask: 1 'panda' asked for, .*; nothing was found"):
        run_job(job, tmp_path / "out", source="my.yaml")
