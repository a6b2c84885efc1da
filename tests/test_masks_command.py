"""`weaver masks`: the overlay before anything is drawn, layers to edit, and the edited layers taken back."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from jobs import SIDE
from PIL import Image

from weaver import cli, run
from weaver.job import prepare
from weaver.job.file import read_job
from weaver.job.inputs import read_inputs
from weaver.job.preview import preview_masks, with_layers
from weaver.models import weights_hash


def write_job(job_folder, path, concepts=None, **changes):
    """Two concepts on a picture; the dog stands where a box is."""
    concepts = concepts or [
        {"file": "tom.safetensors", "mask": {"file": "left.png"}},
        {"file": "rex.safetensors", "mask": {"box": [0.5, 0.25, 1, 0.75]}},
    ]
    for concept in concepts:
        concept["file"] = str(job_folder / concept["file"])
        if "file" in concept.get("mask", {}):
            concept["mask"]["file"] = str(job_folder / concept["mask"]["file"])
    job = {"model": str(job_folder / "model"), "prompt": "a cat and a dog, mountain background", "concepts": concepts}
    path.write_text(json.dumps(job | {"template": {"image": str(job_folder / "template.png")}} | changes))
    return path


@pytest.fixture(autouse=True)
def _loaded(pipe, monkeypatch):
    """The model of the job's folder, which is read once."""
    monkeypatch.setattr(prepare, "load_model", lambda *args, **options: pipe)


@pytest.fixture
def job_file(job_folder, tmp_path):
    return write_job(job_folder, tmp_path / "job.yaml", masks={"dilation": 2})


def weaver(capsys, *arguments):
    code = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_preview_is_the_overlay_and_the_template(job_file, job_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = weaver(capsys, "masks", job_file, "--preview")
    assert code == 0 and files(tmp_path / "outputs" / "job-masks") == ["masks.png", "template.png"]
    assert min(Image.open(tmp_path / "outputs/job-masks/masks.png").size) >= 512
    template = Image.open(tmp_path / "outputs/job-masks/template.png")
    assert template.tobytes() == Image.open(job_folder / "template.png").tobytes()
    lines = [line.split() for line in out.splitlines()]
    grown = 100 * preview_masks(cli_job(job_file)).final.mean((1, 2))
    assert [line[:2] for line in lines[:2]] == [["tom", f"{grown[0]:.1f}%"], ["rex", f"{grown[1]:.1f}%"]]
    assert [line[-1] for line in lines[:2]] == ["file", "box"]


def cli_job(path):
    return read_job(path)[0]


def test_layers_are_the_masks_and_come_back_as_edited(job_file, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    code, told, _ = weaver(capsys, "masks", job_file, "--edit", "--out", out)
    assert code == 0 and f"`weaver run {job_file} --masks {out}`" in told
    assert files(out) == ["layers/rex.png", "layers/tom.png", "masks.png", "template.png"]
    layer = np.array(Image.open(out / "layers" / "rex.png"))
    assert layer.shape == (SIDE, SIDE, 4)
    expected = np.zeros((SIDE, SIDE), bool)
    expected[8:24, 16:] = True
    assert np.array_equal(layer[..., 3] == 255, expected) and set(np.unique(layer[..., 3])) == {0, 255}

    layer[:16, :, 3] = 0  # what an eraser does
    Image.fromarray(layer).save(out / "layers" / "rex.png")
    expected[:16] = False
    edited = with_layers(cli_job(job_file), out)
    assert torch.equal(preview_masks(edited).dense[1].bool(), torch.from_numpy(expected))
    code, told, _ = weaver(capsys, "masks", job_file, "--masks", out)
    assert code == 0 and told.splitlines()[1].endswith("of the picture, file")
    jobs = []
    monkeypatch.setattr(
        run, "run_job", lambda job, folder, **options: jobs.append(job) or run.Run(folder, None, (), REPORT)
    )
    assert weaver(capsys, "run", job_file, "--masks", out, "--out", tmp_path / "run")[0] == 0
    assert jobs == [edited] and edited.template.image == out / "template.png"


REPORT = {"concepts": {}, "total_seconds": 1}


def test_edited_layers_are_not_written_over_unasked(job_file, tmp_path, capsys):
    out = tmp_path / "out"
    assert weaver(capsys, "masks", job_file, "--edit", "--out", out)[0] == 0
    Image.new("RGBA", (SIDE, SIDE), "red").save(out / "layers" / "rex.png")
    edited = (out / "layers" / "rex.png").read_bytes()
    code, _, err = weaver(capsys, "masks", job_file, "--edit", "--out", out)
    assert code == 2 and err.endswith(f"tom.png is there already: --replace writes it anew, --masks {out} takes it\n")
    assert weaver(capsys, "masks", job_file, "--out", out)[0] == 0
    assert (out / "layers" / "rex.png").read_bytes() == edited
    assert weaver(capsys, "masks", job_file, "--edit", "--replace", "--out", out)[0] == 0
    assert (out / "layers" / "rex.png").read_bytes() != edited


def test_a_layer_with_nothing_left_is_an_empty_mask(job_file, tmp_path, capsys):
    out = tmp_path / "out"
    assert weaver(capsys, "masks", job_file, "--edit", "--out", out)[0] == 0
    Image.new("RGBA", (SIDE, SIDE), (255, 255, 255, 0)).save(out / "layers" / "tom.png")
    code, _, err = weaver(capsys, "masks", job_file, "--masks", out)
    assert (
        code == 2
        and "concepts[0].mask: " in err
        and err.endswith("the mask is empty: none of it is opaque by a half; paint it solid\n")
    )


def test_a_layer_is_not_saved_together_with_the_template(job_file, tmp_path, capsys):
    """Painted all over it is the whole picture; flattened onto the template, onto white, it is no mask."""
    out = tmp_path / "out"
    assert weaver(capsys, "masks", job_file, "--edit", "--out", out)[0] == 0
    file, ground = out / "layers" / "rex.png", Image.new("RGBA", (SIDE, SIDE), "white")
    layer, template = Image.open(file), Image.open(out / "template.png").convert("RGBA")
    Image.alpha_composite(template, layer).save(file)
    code, _, err = weaver(capsys, "masks", job_file, "--masks", out)
    assert code == 2 and f"--masks: {file} hold the template too, and no transparent pixel: hide every other" in err
    Image.alpha_composite(ground, layer).save(file)
    code, _, err = weaver(capsys, "masks", job_file, "--masks", out)
    assert code == 2 and "concepts[1].mask: " in err and "rex.png: no pixel is transparent or dark" in err
    Image.new("RGBA", (SIDE, SIDE), layer.getpixel((0, 0))[:3]).save(file)
    assert preview_masks(with_layers(cli_job(job_file), out)).dense[1].all()


@pytest.fixture
def manifest(job_file, pipe, tmp_path):
    """That of a run of the job, with which it was made."""
    files = {file.field: file.sha256 for file in read_inputs(cli_job(job_file))}
    record = {"versions": {"torch": "0.1"}, "weights": {"model": weights_hash(pipe)}}
    content = {"weaver_manifest": 1, "job": json.loads(job_file.read_text()), "inputs": files, "record": record}

    def write(**changes):
        path = tmp_path / "manifest.json"
        path.write_text(json.dumps(content | changes))
        return path

    return write


def test_a_manifest_s_masks_are_of_its_own_files_and_models(manifest, tmp_path, capsys):
    code, _, err = weaver(capsys, "masks", manifest(), "--out", tmp_path / "out")
    assert code == 0 and "weaver: the manifest was made with other versions: torch" in err
    wrong = {"inputs": {"template.image": "0" * 64}}, {"record": {"versions": {}, "weights": {"model": "0" * 64}}}
    for change, told in zip(
        wrong,
        ("template.image: template.png is not what it was when the manifest was", "model: its weights are not those"),
        strict=True,
    ):
        code, _, err = weaver(capsys, "masks", manifest(**change), "--out", tmp_path / "other")
        assert code == 2 and f"manifest.json: {told}" in err
    assert not (tmp_path / "other").exists()


def test_layers_of_a_manifest_s_masks_are_taken_in_the_place_of_its_files(manifest, job_folder, tmp_path, capsys):
    out, path = tmp_path / "out", manifest()
    assert weaver(capsys, "masks", path, "--edit", "--out", out)[0] == 0
    Image.open(out / "layers" / "tom.png").rotate(180).save(out / "layers" / "tom.png")
    code, told, _ = weaver(capsys, "masks", path, "--masks", out)
    assert code == 0 and [line.split()[-1] for line in told.splitlines()[:2]] == ["file", "file"]
    inputs = manifest(inputs={"concepts[0].file": "0" * 64})
    code, _, err = weaver(capsys, "masks", inputs, "--masks", out)
    assert code == 2 and "concepts[0].file: tom.safetensors is not what it was" in err


def test_a_template_that_can_not_be_used_is_told_with_its_field(job_folder, tmp_path, capsys):
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    job = write_job(job_folder, tmp_path / "job.yaml", template={"image": str(tmp_path / "dot.png")})
    code, _, err = weaver(capsys, "masks", job)
    assert code == 2 and err.count("\n") == 1
    assert f"{job}: template.image: {tmp_path}/dot.png: is 1x1, which would have to be enlarged 32 times" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--edit", "--masks", "{out}"], "--edit: the layers in {out} are edited already"),
        (["--replace"], "--replace: replaces layers, which --edit writes"),
        (
            ["--masks", "{out}"],
            "{out}/template.png, {out}/layers/tom.png, {out}/layers/rex.png not there; `weaver masks",
        ),
        (["--out", "{job}"], "{job} is a file, not a folder"),
    ],
    ids=["edit and masks", "replace alone", "no layers", "out is a file"],
)
def test_wrong_arguments_are_one_line_and_write_nothing(job_file, tmp_path, capsys, arguments, message):
    names = {"out": tmp_path / "out", "job": job_file}
    code, out, err = weaver(capsys, "masks", job_file, *(argument.format(**names) for argument in arguments))
    assert code == 2 and message.format(**names) in err and err.count("\n") == 1
    assert files(tmp_path) == ["job.yaml"]


def test_results_do_not_replace_what_the_job_reads(job_folder, tmp_path, capsys):
    concepts = [{"file": "tom.safetensors", "mask": {"file": "left.png"}}]
    job = write_job(job_folder, tmp_path / "job.yaml", concepts, prompt="a cat", template={"image": "template.png"})
    Image.open(job_folder / "template.png").save(tmp_path / "template.png")
    code, _, err = weaver(capsys, "masks", job, "--out", tmp_path)
    assert code == 2 and "template.image: " in err and "would be overwritten by a result" in err


@pytest.mark.parametrize(("images", "told"), [("cat", "would be among its pictures"), ("cat/masks.png", "overwritten")])
def test_pictures_that_a_concept_learns_from_are_left_alone(job_folder, tmp_path, capsys, images, told):
    pictures = tmp_path / "cat"
    pictures.mkdir()
    Image.open(job_folder / "template.png").save(pictures / "masks.png")
    job = write_job(job_folder, tmp_path / "job.yaml", prompt="a cat")
    entry = {"word": "cat", "train": {"images": images, "token": "<v1>"}, "mask": {"box": [0, 0, 1, 1]}}
    job.write_text(json.dumps(json.loads(job.read_text()) | {"concepts": [entry]}))
    code, _, err = weaver(capsys, "masks", job, "--out", pictures)
    assert code == 2 and "concepts[0].train.images: " in err and told in err
    assert files(pictures) == ["masks.png"]


def test_what_is_not_found_is_told_with_its_field(job_folder, tmp_path, capsys):
    job = write_job(
        job_folder,
        tmp_path / "job.yaml",
        [{"file": "tom.safetensors", "mask": {"order": 50}}],
        prompt="a cat",
        masks={"source": "attention"},
    )
    code, _, err = weaver(capsys, "masks", job)
    assert code == 2 and "concepts[0].mask: no 'cat' number 50 from the left; found 'cat' in box [" in err
    assert files(tmp_path) == ["job.yaml"]


def test_a_mask_of_attention_is_told_to_be_a_guess(job_folder, tmp_path, capsys):
    for source, told in ({"mask": {"box": [0.1, 0.1, 0.9, 0.9]}}, False), ({}, True):
        concepts = [{"file": "tom.safetensors"} | source]
        options = {"prompt": "a cat", "masks": {"source": "attention"}}
        job = write_job(job_folder, tmp_path / "job.yaml", concepts, **options)
        code, out, _ = weaver(capsys, "masks", job, "--out", tmp_path / f"out{told}")
        assert code == 0 and ("attention finds a place for every word, there or not" in out) == told
