"""A manifest makes the same picture again, or says why not."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version

import pytest
import torch
from conftest import make_concept, make_pipeline
from jobs import TRAINED, job_of, picture
from peft import LoraConfig, get_peft_model

from weaver.concepts.formats.convert import convert
from weaver.errors import WeaverError
from weaver.hashing import file_hash
from weaver.job import JobError, prepare
from weaver.job.file import read_job
from weaver.job.inputs import read_inputs
from weaver.manifest import changed_versions, check_inputs
from weaver.models import load_model, weights_hash
from weaver.run import run_job


def test_the_manifest_makes_the_same_picture_again(finished, tmp_path):
    path = finished.folder / "manifest.json"
    job, manifest = read_job(path)
    assert changed_versions(manifest) == []
    again = run_job(job, tmp_path / "again", manifest=manifest)
    for name in ("fused.png", "template.png", "masks.png"):
        assert (again.folder / name).read_bytes() == (finished.folder / name).read_bytes(), name
    other = json.loads((again.folder / "manifest.json").read_text())
    assert other["record"] == json.loads(path.read_text())["record"]


@pytest.fixture
def changed(finished):
    """The run's manifest and job, with files, libraries and weights recorded that are not there."""
    path = finished.folder / "manifest.json"
    job, manifest = read_job(path)
    manifest["inputs"]["concepts[1].file"] = "0" * 64
    manifest["record"]["versions"]["torch"] = "0.1"
    manifest["record"]["weights"]["model"] = "0" * 64
    return manifest, job


def test_a_manifest_tells_what_has_changed_since(changed):
    manifest, job = changed
    with pytest.raises(WeaverError, match=r"^m.json: concepts\[1\].file: rex.safetensors is not what it was"):
        check_inputs(manifest, read_inputs(job), "m.json")
    assert changed_versions(manifest) == [f"torch {version('torch')} (was 0.1)"]


@pytest.mark.parametrize("name", ["9.png", "0.txt"], ids=["picture", "caption"])
def test_what_was_not_there_is_told_too(job_folder, tmp_path, monkeypatch, name):
    pictures = shutil.copytree(job_folder / "pictures", tmp_path / "pictures")
    train = TRAINED["train"] | {"images": str(pictures)}
    job = job_of(job_folder, concepts=[TRAINED | {"train": train}])
    manifest = {"inputs": {file.field: file.sha256 for file in read_inputs(job)}}
    check_inputs(manifest, read_inputs(job), "m.json")
    if name == "9.png":
        picture(9).save(pictures / name)
    else:
        (pictures / name).write_text("a {token} {word} at night")
    monkeypatch.setattr(prepare, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    with pytest.raises(WeaverError, match=rf"^m.json: concepts\[0\].train.images\[.*: {name} was not there when"):
        run_job(job, tmp_path / "out", source="m.json", manifest=manifest)
    assert not (tmp_path / "out").exists()


def test_other_weights_are_not_taken_for_the_same_model(changed, tmp_path, monkeypatch):
    manifest, job = changed
    monkeypatch.setattr(prepare, "choose_template", lambda *a, **k: pytest.fail("sampling began"))
    manifest["inputs"]["concepts[1].file"] = file_hash(job.concepts[1].file)
    with pytest.raises(WeaverError, match="^m.json: model: its weights are not those that the manifest was written"):
        run_job(job, tmp_path / "out", source="m.json", manifest=manifest)
    assert list(tmp_path.iterdir()) == []


def test_weights_hash_alike_in_any_precision_and_tell_every_part(job_folder, pipe):
    found = weights_hash(pipe)
    half = load_model(str(job_folder / "model"), device="cpu", dtype=torch.float16)
    assert weights_hash(half) == found
    with torch.no_grad():
        half.vae.decoder.conv_out.bias += 1
    assert weights_hash(half) != found


def test_what_lies_beside_a_concepts_file_and_is_read_is_an_input(pipe, job_folder, tmp_path):
    made = convert(make_concept(pipe, 1, "dog"), "diffusers-lora", tmp_path / "rex.safetensors")
    convert(make_concept(pipe, 2, "dog"), "kohya-lora", tmp_path / "other.safetensors")
    concepts = [{"file": str(made.files[0]), "word": "dog"}]
    job = job_of(job_folder, concepts=concepts, prompt="a dog, mountain")
    inputs = read_inputs(job)
    fields = ["concepts[0].file", "concepts[0].file:<v1>.safetensors"]
    assert [file.field for file in inputs] == fields and [file.path for file in inputs] == made.files
    manifest = {"inputs": {file.field: file.sha256 for file in inputs}}
    check_inputs(manifest, read_inputs(job), "job.yaml")
    made.files[1].write_bytes(made.files[1].read_bytes().replace(b'"format":"pt"', b'"format":"xt"'))
    with pytest.raises(JobError, match=r"concepts\[0\].file:<v1>.safetensors: <v1>.safetensors is not what it was"):
        check_inputs(manifest, read_inputs(job), "job.yaml")


def test_the_settings_of_pefts_files_are_inputs(pipe, job_folder, tmp_path):
    unet = get_peft_model(make_pipeline(dtype=torch.float32).unet, LoraConfig(r=2, target_modules=["attn2.to_k"]))
    unet.save_pretrained(tmp_path)
    file = str(tmp_path / "adapter_model.safetensors")
    job = job_of(job_folder, concepts=[{"file": file, "word": "dog"}], styles=[{"file": file}], prompt="a dog")
    names = {"concepts[0].file", "styles[0].file"}
    assert {file.field for file in read_inputs(job)} == names | {f"{name}:adapter_config.json" for name in names}


def test_a_caption_and_its_picture_are_both_inputs(job_folder, tmp_path):
    picture(0).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a {token} {word} at night")
    train = TRAINED["train"] | {"images": str(tmp_path)}
    inputs = read_inputs(job_of(job_folder, concepts=[TRAINED | {"train": train}]))
    fields = [file.field for file in inputs if file.field.startswith("concepts[0].train")]
    assert fields == ["concepts[0].train.images[0]", "concepts[0].train.images[0].txt"]
