"""A LoRA's file with textual inversions in it does what diffusers does with the two as files of their own."""

from __future__ import annotations

import format_files as files
import pytest
import torch
from conftest import make_pipeline
from safetensors.torch import save_file
from test_formats_lora import kohya, read, saved

from weaver.concepts.concept_file import ConceptError
from weaver.concepts.formats import read_concept_file
from weaver.concepts.formats.summary import summarise

OWN = "a rex dog on the beach"


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    path = saved(make_pipeline(dtype=torch.float32), folder, rank_pattern={}, alpha_pattern={})
    return kohya(path)


def bundle(lora, folder, tensors):
    tensors = read(lora)[0] | {f"bundle_emb.{name}": value for name, value in tensors.items()}
    save_file(tensors, folder / "rex.safetensors")
    return folder / "rex.safetensors"


def test_a_bundle_draws_what_diffusers_draws_with_its_two_parts(pipe, lora, tmp_path):
    rows = files.vectors(pipe, 2)["text_encoder"]
    parsed = read_concept_file(bundle(lora, tmp_path, {"rex.string_to_param.*": rows}))
    assert (parsed.format, list(parsed.embeddings)) == ("kohya LoRA", ["rex"])
    stock = make_pipeline(dtype=torch.float32)
    stock.load_lora_weights(lora.parent, weight_name=lora.name)
    without = files.draw_by_hand(stock, OWN)
    stock.load_textual_inversion({"rex": rows}, token="rex")
    expected = files.draw_by_hand(stock, OWN)
    assert (expected - without).abs().max() > files.VISIBLE
    concept = parsed.concept(pipe, name="rex", word="dog")
    torch.testing.assert_close(files.draw_fused(pipe, concept, OWN), expected, **files.CLOSE)


def test_every_token_of_a_bundle_is_there_for_both_text_encoders(sdxl, lora, tmp_path):
    rows = files.vectors(sdxl, 2)
    parts = {"clip_l": rows["text_encoder"], "clip_g": rows["text_encoder_2"]}
    path = bundle(
        lora, tmp_path, {f"{token}.{part}": x.clone() for token in ("rex", "old-rex") for part, x in parts.items()}
    )
    assert summarise(path)["tokens"] == {"rex": 2, "old-rex": 2}
    found = read_concept_file(path).embeddings["old-rex"]
    assert all(torch.equal(found[name], value) for name, value in rows.items()) and found.keys() == rows.keys()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"rex.weights": torch.ones(1, 16)}, "a bundle of a LoRA and textual inversions, and 'bundle_emb.rex.weights'"),
        ({"rex.clip_l": torch.ones(1, 16), "rex.emb_params": torch.ones(1, 16)}, "a bundle .*'bundle_emb.rex."),
        ({"rex.clip_l": torch.ones(1, 16), "rex.clip_g": torch.ones(2, 24)}, r"numbers of vectors, \[1, 2\]"),
        ({"rex.clip_l": torch.ones(1, 3000)}, "too large for a token"),
        ({"rex.clip_l": torch.ones(1, 1, 16)}, r"token 'rex' has shape \(1, 1, 16\), expected vectors"),
    ],
    ids=["unknown", "twice", "counts", "large", "axes"],
)
def test_what_is_no_token_in_a_bundle_is_told(lora, tmp_path, tensors, message):
    path = bundle(lora, tmp_path, tensors)
    with pytest.raises(ConceptError, match=message) as raised:
        read_concept_file(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)
