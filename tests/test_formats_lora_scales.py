"""What a LoRA's products are multiplied by, as files of strangers tell it, and the names of text encoders' layers."""

from __future__ import annotations

import json

import pytest
import test_formats_lora
import torch
from conftest import make_pipeline
from peft import LoraConfig, get_peft_model
from test_formats_lora import DIALECTS, kohya, old_diffusers, parsed_of, read, saved

from weaver.concepts.concept_file import ConceptError
from weaver.concepts.formats import read_concept_file


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return saved(make_pipeline(dtype=torch.float32), tmp_path_factory.mktemp("lora"))


def scaled_by(file, config):
    tensors, metadata = read(file)
    told = json.loads(metadata["lora_adapter_metadata"]) | config
    return parsed_of(tensors, metadata | {"lora_adapter_metadata": json.dumps(told)})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"unet.alpha_pattern": {"([a-z0-9_.]+)+X": 3}},
            "its alpha_pattern names modules by '.*X': save it with names",
        ),
        ({"unet.lora_alpha": float("nan")}, "its alpha is nan, expected a number up to"),
        ({"unet.lora_alpha": float("inf")}, "its alpha is inf, expected a number"),
        ({"unet.lora_alpha": 10**400}, "its alpha is 1000+.*, expected a number"),
        ({"unet.lora_alpha": 1e300}, r"its alpha is 1e\+300, expected a number"),
        ({"unet.lora_alpha": True}, "its alpha is True, expected a number"),
        ({"unet.lora_alpha": "two"}, "its alpha is 'two', expected a number"),
        ({"unet.alpha_pattern": [3]}, "its alphas are not by names of modules"),
    ],
)
def test_scales_that_are_none_are_refused(file, config, message):
    with pytest.raises(ConceptError, match=message):
        scaled_by(file, config)


@pytest.mark.parametrize("pattern", ["attn2.to_k", r"attn2\.to_k", "to_k$", "^down_blocks.0.attentions.0.to_k"])
def test_names_with_alphas_of_their_own(file, pattern):
    plain = scaled_by(file, {"unet.alpha_pattern": {}})
    for key, change in scaled_by(file, {"unet.alpha_pattern": {pattern: 40}}).deltas.items():
        factor = 20 if key.endswith("to_k") and not pattern.startswith("^") else 1  # the usual alpha is 2
        torch.testing.assert_close(change.up, factor * plain.deltas[key].up)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "fc1", "fc2"]], ids=["no-out", "with-fc"])
@pytest.mark.parametrize("dialect", ["kohya", "old-diffusers"])
def test_text_encoders_with_some_projections_alone(tmp_path, monkeypatch, targets, dialect):
    monkeypatch.setattr(test_formats_lora, "TEXT", targets)
    path = saved(make_pipeline(dtype=torch.float32), tmp_path, rank_pattern={}, alpha_pattern={})
    expected, found = read_concept_file(path), read_concept_file(DIALECTS[dialect](path))
    assert found.text_deltas.keys() == expected.text_deltas.keys() and len(found.text_deltas) == 2 * len(targets)
    for key, change in found.text_deltas.items():
        torch.testing.assert_close(
            change.up @ change.down, expected.text_deltas[key].up @ expected.text_deltas[key].down
        )


def test_a_factor_without_axes_is_refused(file):
    tensors, _ = read(kohya(file))
    down = next(key for key in tensors if key.endswith("lora_down.weight"))
    with pytest.raises(ConceptError, match=r"lora_down.weight has shape \(\), expected \[r, in\]"):
        parsed_of(tensors | {down: torch.tensor(1.0)}, {})


def test_pefts_saver_of_a_text_encoder_and_what_it_leaves_beside(tmp_path):
    encoder = make_pipeline(dtype=torch.float32).text_encoder
    wrapped = get_peft_model(encoder, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    wrapped.save_pretrained(tmp_path)
    parsed = read_concept_file(tmp_path / "adapter_model.safetensors")
    assert len(parsed.text_deltas) == 4 and not parsed.deltas
    renamed = tmp_path / "rex.safetensors"
    (tmp_path / "adapter_model.safetensors").rename(renamed)
    again = read_concept_file(renamed)
    assert all(torch.equal(again.text_deltas[key].up, change.up) for key, change in parsed.text_deltas.items())
    config = (tmp_path / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(config + " " * 2**20)
    with pytest.raises(ConceptError, match="how it was made can't be read .*more than 1048576 bytes"):
        read_concept_file(renamed)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(ConceptError, match="whose scale is in its adapter_config.json: put that beside it"):
        read_concept_file(renamed)


def test_a_layer_of_a_text_encoder_under_two_names_is_refused(tmp_path):
    path = saved(make_pipeline(dtype=torch.float32), tmp_path)
    tensors, _ = read(old_diffusers(path))
    key = next(key for key in tensors if "q_proj.lora_linear_layer.down" in key)
    other = key.replace("q_proj.lora_linear_layer", "to_q_lora")
    with pytest.raises(ConceptError, match="1 factors of text_encoder are there under two names"):
        parsed_of(tensors | {other: tensors[key].clone()}, {})


def test_an_alpha_of_kohyas_that_can_not_be_is_refused(file):
    tensors, metadata = read(kohya(file))
    key = next(key for key in tensors if key.endswith(".alpha"))
    with pytest.raises(ConceptError, match=r"its alpha is 1\.0+\d*e\+30, expected a number up to 1e\+06"):
        parsed_of(tensors | {key: torch.tensor(1e30)}, metadata)
