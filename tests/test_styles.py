"""Styles of a job: the whole picture is drawn with a LoRA, concepts are learned without, and the model is as it was."""

from __future__ import annotations

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import make_concept, make_pipeline
from jobs import TRAINED, job_of
from peft import LoraConfig, get_peft_model_state_dict
from pipeline_forms import draw
from safetensors.torch import load_file, save_file
from test_formats_lora import kohya, saved

from weaver.concepts.concept import attn2_hash
from weaver.concepts.formats.convert import convert
from weaver.errors import WeaverError
from weaver.hashing import file_hash
from weaver.job import prepare
from weaver.job.file import job_to_mapping, read_job
from weaver.job.parse import job_from_mapping
from weaver.job.spec import StyleSpec
from weaver.memory.estimate import estimate_job
from weaver.run import run_job
from weaver.styles import style_numbers, styled

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "net.2"]


@pytest.fixture(scope="module")
def folder(job_folder, tmp_path_factory):
    """The job's folder with a LoRA of U-Net and text encoder by diffusers' own saver, and one of another model."""
    folder = tmp_path_factory.mktemp("styles") / "job"
    shutil.copytree(job_folder, folder)
    pipe = make_pipeline()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe.unet.add_adapter(LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False), "style")
        pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), "style")

    parts = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    layers = {
        f"{name}_lora_layers": get_peft_model_state_dict(part, adapter_name="style") for name, part in parts.items()
    }
    type(pipe).save_lora_weights(folder, **layers, weight_name="style.safetensors")
    wide = {
        name: torch.cat([x, x], -1) if ".lora_A." in name else x
        for name, x in load_file(folder / "style.safetensors").items()
    }
    save_file(wide, folder / "wide.safetensors")
    save_file(
        {
            "unet.down_blocks.9.attn.to_q.lora_A.weight": torch.ones(2, 8),
            "unet.down_blocks.9.attn.to_q.lora_B.weight": torch.ones(8, 2),
        },
        folder / "elsewhere.safetensors",
    )
    factors = {"lora_A": torch.ones(2, 4, 5, 5), "lora_B": torch.ones(8, 2, 1, 1)}
    save_file({f"unet.conv_in.{name}.weight": x for name, x in factors.items()}, folder / "convolved.safetensors")
    save_file({"emb_params": torch.ones(1, 8)}, folder / "vectors.safetensors")
    return folder


@pytest.fixture
def loaded(monkeypatch):
    """The model that jobs load."""
    found = make_pipeline(dtype=torch.float32)
    monkeypatch.setattr(prepare, "load_model", lambda *args, **options: found)
    return found


def drawn(job, out, **options) -> tuple[np.ndarray, np.ndarray]:
    result = run_job(job, out, **options).result
    return tuple(np.asarray(picture).astype(int) for picture in (result.template, result.image))


def test_template_and_picture_are_drawn_in_it_and_the_model_is_as_it_was(folder, loaded, tmp_path):
    weights = {name: x.clone() for name, x in loaded.unet.state_dict().items()}
    plain = drawn(job_of(folder), tmp_path / "plain")
    job = job_of(folder, styles=[{"file": "style.safetensors", "weight": 0.7}])
    found = drawn(job, tmp_path / "found")
    assert {name for name, _ in loaded.unet.state_dict().items()} == weights.keys()
    assert all(torch.equal(x, weights[name]) for name, x in loaded.unet.state_dict().items())
    loaded.load_lora_weights(folder, weight_name="style.safetensors", adapter_name="by hand")
    loaded.set_adapters(["by hand"], [0.7])
    expected = drawn(job_of(folder), tmp_path / "expected")
    loaded.unload_lora_weights()
    for ours, theirs, without in zip(found, expected, plain, strict=True):
        assert np.array_equal(ours, theirs) and np.abs(ours - without).mean() > 2
    nothing = drawn(job_of(folder, styles=[{"file": "style.safetensors", "weight": 0}]), tmp_path / "nothing")
    assert all(map(np.array_equal, nothing, plain))


def test_a_concept_is_learned_without_it(folder, loaded, tmp_path):
    changes = {"prompt": "a cat, mountain", "concepts": [TRAINED]}
    plain = run_job(job_of(folder, **changes), tmp_path / "plain").concepts[0]
    style = [{"file": "style.safetensors"}]
    found = run_job(job_of(folder, **changes, styles=style), tmp_path / "found").concepts[0]
    assert found.base_hash == plain.base_hash == attn2_hash(loaded.unet)
    assert all(torch.equal(delta, plain.deltas[name]) for name, delta in found.deltas.items())


def test_two_add_up_and_the_manifest_makes_the_same_again(folder, loaded, tmp_path):
    once = [{"file": "style.safetensors", "weight": 0.6}]
    twice = [{"file": "style.safetensors", "weight": 0.3}] * 2
    first, second = (drawn(job_of(folder, styles=styles), tmp_path / str(len(styles))) for styles in (once, twice))
    assert max(np.abs(a - b).max() for a, b in zip(first, second, strict=True)) <= 2  # of 255
    job, manifest = read_job(tmp_path / "2" / "manifest.json")
    assert [style.weight for style in job.styles] == [0.3, 0.3]
    again = drawn(job, tmp_path / "again", manifest=manifest)
    assert all(map(np.array_equal, again, second))
    record = manifest["record"]["styles"]
    assert (
        record
        == [
            {"weight": 0.3, "files": [{"name": "style.safetensors", "sha256": file_hash(folder / "style.safetensors")}]}
        ]
        * 2
    )
    assert str(tmp_path) not in json.dumps(record)


def test_a_job_with_styles_is_written_and_read_back(folder):
    job = job_of(folder, styles=[{"file": "style.safetensors"}])
    assert job_from_mapping(job_to_mapping(job, folder), folder=folder) == job


@pytest.mark.parametrize(
    ("style", "message"),
    [
        ({"file": "tom.safetensors"}, r"styles\[0\].file: tom.safetensors is a concept file, and a style is a LoRA"),
        ({"file": "vectors.safetensors"}, r"styles\[0\].file: vectors.safetensors is a textual inversion"),
        ({"file": "broken.safetensors"}, r"styles\[0\].file: .*broken.safetensors"),
        ({"file": "none.safetensors"}, r"styles\[0\].file: 'none.safetensors' is not there"),
        ({"weight": 1}, r"styles\[0\].file: is missing; name a LoRA"),
        ({"file": "embedded:pug"}, r"styles\[0\].file: 'embedded:pug' is no file"),
        ({"file": "style.safetensors", "weight": "much"}, r"styles\[0\].weight: expected a number"),
        ({"file": "style.safetensors", "strength": 1}, r"styles\[0\].strength: unknown field"),
        ({"file": "wide.safetensors"}, r"styles\[0\].file: wide.safetensors belongs to another base model: .* not fit"),
        ({"file": "elsewhere.safetensors"}, r"styles\[0\].file: elsewhere.safetensors belongs to another base model"),
        ({"file": "convolved.safetensors"}, r"convolved.safetensors .*: 1 of its 1 changes do not fit, unet.conv_in"),
        ({"file": "bank:rex"}, r"styles\[0\].file: 'bank:rex' is no file: the bank keeps concepts, and a style is a"),
    ],
)  # fmt: skip
def test_what_is_no_style_of_this_model_is_told_in_one_line(folder, loaded, tmp_path, style, message):
    with pytest.raises(WeaverError, match=message) as found:
        run_job(job_of(folder, styles=[style]), tmp_path / "out")
    assert "\n" not in str(found.value) and not (tmp_path / "out").exists()
    assert not any("lora" in name for name, _ in loaded.unet.named_modules())


def test_every_layer_of_a_kohya_file_has_its_own_scale(tmp_path):
    """Of whose alphas diffusers' own loader takes one for all."""
    path = saved(make_pipeline(dtype=torch.float32), tmp_path)
    stock, pipe = (make_pipeline(dtype=torch.float32) for _ in range(2))
    stock.load_lora_weights(tmp_path, weight_name=path.name)
    with styled(pipe, [StyleSpec(kohya(path, to_k=5))]):
        found = draw(pipe, prompt="a dog", guidance_scale=1.0)
    torch.testing.assert_close(found, draw(stock, prompt="a dog", guidance_scale=1.0), rtol=1e-4, atol=1e-4)


def test_a_style_of_time_alone_is_one(folder, loaded, tmp_path):
    """Which no concept can be: it acts in no region."""
    factors = {"lora_A": torch.ones(2, 8), "lora_B": torch.full((32, 2), 0.3)}
    save_file(
        {f"unet.time_embedding.linear_1.{name}.weight": x for name, x in factors.items()}, tmp_path / "time.safetensors"
    )
    plain = draw(loaded, prompt="a dog", guidance_scale=1.0)
    with styled(loaded, [StyleSpec(tmp_path / "time.safetensors")]):
        found = draw(loaded, prompt="a dog", guidance_scale=1.0)
    weight = loaded.unet.time_embedding.linear_1.weight
    with torch.no_grad():
        added = factors["lora_B"] @ factors["lora_A"]
        weight += added
        expected = draw(loaded, prompt="a dog", guidance_scale=1.0)
        weight -= added
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - plain).abs().max() > 0.01


def test_a_style_needs_no_token(folder, tmp_path):
    """That of a converted concept is in a file beside, which may be gone."""
    pipe = make_pipeline(dtype=torch.float32)
    made = convert(make_concept(pipe, 1, "dog"), "diffusers-lora", tmp_path / "rex.safetensors")
    style = [StyleSpec(made.files[0])]
    pictures = []
    for _ in range(2):
        with styled(pipe, style):
            pictures.append(draw(pipe, prompt="a dog", guidance_scale=1.0))
        made.files[1].unlink(missing_ok=True)
    assert torch.equal(*pictures) and not torch.equal(pictures[0], draw(pipe, prompt="a dog", guidance_scale=1.0))
    other = make_pipeline(dtype=torch.float32, seed=3)
    with pytest.raises(WeaverError, match="belongs to another base model: its base has hash"), styled(other, style):
        pass


def test_without_peft_it_is_told_how_to_get_it(folder, monkeypatch, tmp_path):
    monkeypatch.setattr("weaver.styles.find_spec", lambda name: None)
    with pytest.raises(WeaverError, match="pip install peft"):
        run_job(job_of(folder, styles=[{"file": "style.safetensors"}]), tmp_path / "out")


def test_its_weights_are_in_the_estimate(folder):
    numbers = style_numbers(folder / "style.safetensors")
    assert numbers == sum(x.numel() for x in load_file(folder / "style.safetensors").values())
    plain, found = (
        estimate_job(job_of(folder, **changes), device="cuda")
        for changes in ({}, {"styles": [{"file": "style.safetensors"}]})
    )
    size = 2 if found.dtype == "float16" else 4
    for name in ("template", "inversion", "fusion"):
        assert found.stages[name].parts["weights"] - plain.stages[name].parts["weights"] == size * numbers


def test_a_failure_within_the_block_leaves_the_model_as_it_was(folder, loaded):
    before = copy.deepcopy(dict(loaded.unet.state_dict()))
    styles = job_of(folder, styles=[{"file": "style.safetensors"}]).styles
    with pytest.raises(KeyboardInterrupt), styled(loaded, styles):
        assert any("lora" in name for name, _ in loaded.unet.named_modules())
        raise KeyboardInterrupt
    assert loaded.unet.state_dict().keys() == before.keys()
