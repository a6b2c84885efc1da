"""Loading what a job names as its model: the right kind, from the right place, or one clear line."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import make_pipeline

from weaver.job import Job
from weaver.models import ModelError, choose_device, load_model, threads_for
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
