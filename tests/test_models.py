"""Loading what a job names as its model: the right kind, from the right place, or one clear line."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import diffusers
import huggingface_hub
import pytest
import torch
import transformers
from conftest import make_pipeline

from weaver.concepts.settings import TrainSettings
from weaver.defaults import defaults_for
from weaver.embedded import MODEL_DIR, load_pipeline
from weaver.job import Job
from weaver.job.parse import job_from_mapping
from weaver.job.resolve import check_model, resolve_job
from weaver.models import ModelError, choose_device, is_embedded, load_model, threads_for
from weaver.places import best_source
from weaver.run import run_job


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_pipeline(dtype=torch.float32).save_pretrained(folder / "good")
    (folder / "sdxl").mkdir()
    (folder / "sdxl" / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    (folder / "partial").mkdir()
    index = json.loads((folder / "good" / "model_index.json").read_text())
    (folder / "partial" / "model_index.json").write_text(json.dumps(index))
    return folder


def test_a_folder_is_loaded_without_asking_the_network(folder, monkeypatch):
    monkeypatch.setattr("socket.getaddrinfo", lambda *a, **k: pytest.fail("asked the network"))
    pipe = load_model(str(folder / "good"), device="cpu")
    assert pipe.unet.dtype == torch.float32 and pipe.device.type == "cpu"
    assert best_source(pipe) == "attention"


def test_a_copy_of_the_embedded_model_is_the_embedded_model(folder):
    copied = shutil.copytree(MODEL_DIR, folder / "copied")
    mapping = {"model": str(copied), "prompt": "a dog", "concepts": [{"file": "embedded:pug"}]}
    mapping["background"] = {"word": "forest", "train": {"images": "embedded:autumn-forest", "token": "<f>"}}
    job = job_from_mapping(mapping, folder=folder)
    pipe = load_model(job.model, device="cpu")
    assert is_embedded(pipe) and is_embedded(load_pipeline(dtype=torch.float16))
    resolved = resolve_job(job, pipe, ["a <pug> dog", "a <f> forest"])
    own = resolve_job(replace(job, model="embedded"), load_pipeline(), ["a <pug> dog", "a <f> forest"])
    assert replace(resolved, model="embedded") == own
    assert (own.masks.source, own.fusion.sites, own.template.model) == ("segmenter", "embedded", "same")
    assert own.fusion.guidance == defaults_for(pipe).guidance != defaults_for(make_pipeline()).guidance
    assert dict(own.background.train.settings)["batch"] == TrainSettings.embedded().batch
    check_model(resolved, pipe, "job.yaml")


def test_a_model_of_the_same_kind_with_other_weights_is_not_the_embedded_one(folder):
    pipe = load_pipeline()
    with torch.no_grad():
        for parameter in pipe.unet.parameters():
            parameter.mul_(1.01)
    assert not is_embedded(pipe) and not is_embedded(load_model(str(folder / "good"), device="cpu"))


def test_the_embedded_model_opens_without_a_word_and_leaves_the_libraries_as_they_were(capfd):
    logs = [library.utils.logging for library in (diffusers, transformers)]
    before = [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    try:
        for log in logs:
            log.set_verbosity_info()
            log.enable_progress_bar()
        load_pipeline()
        assert capfd.readouterr() == ("", "")
        assert all(log.get_verbosity() == log.INFO and log.is_progress_bar_enabled() for log in logs)
        assert not huggingface_hub.utils.are_progress_bars_disabled()
    finally:
        for log, (verbosity, bars) in zip(logs, before, strict=True):
            log.set_verbosity(verbosity)
            (log.enable_progress_bar if bars else log.disable_progress_bar)()


def test_another_kind_of_pipeline_is_told_apart(folder):
    with pytest.raises(ModelError, match="is a StableDiffusionXLPipeline; concepts are fused in a StableDiffusionPip"):
        load_model(str(folder / "sdxl"))


def test_a_folder_that_is_not_complete(folder):
    with pytest.raises(ModelError, match="can't be loaded; the folder must hold a complete diffusers pipeline"):
        load_model(str(folder / "partial"))


def test_a_hub_model_that_is_not_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="'nobody/nothing' can't be loaded; .* run once without --offline") as caught:
        load_model("nobody/nothing", offline=True)
    assert "\n" not in str(caught.value)


def test_a_device_that_is_not_there(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device() == "cpu"
    job = Job(model=str(folder / "good"), prompt="a cat", concepts=(), device="cuda")
    with pytest.raises(ValueError, match="^my.yaml: device: 'cuda' is not available here; use 'auto' or 'cpu'$"):
        run_job(job, tmp_path / "out", source="my.yaml")


def test_a_small_model_works_on_one_thread_and_leaves_the_setting(folder):
    pipe = load_model(str(folder / "good"), device="cpu")
    torch.set_num_threads(2)
    try:
        with threads_for(pipe):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
