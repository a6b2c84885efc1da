"""The concept file: what is written is read again, and nothing else is."""

import copy
import json
import os
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from weaver.concepts.concept import Concept, ConceptError, attn2_hash, attn2_projections
from weaver.errors import WeaverError


def make_concept(pipe, **changes):
    generator = torch.Generator().manual_seed(0)
    deltas = {
        path: torch.randn(linear.weight.shape, generator=generator).half()
        for path, linear in attn2_projections(pipe.unet).items()
    }
    width = pipe.text_encoder.config.hidden_size
    values = {
        "name": "tuxedo",
        "token": "<v1>",
        "word": "cat",
        "base_hash": attn2_hash(pipe.unet),
        "embeddings": {"text_encoder": torch.randn(2, width, generator=generator)},
        "deltas": deltas,
        "settings": {"steps": 3, "seed": 0, "learning_rate": 1e-5},
        "versions": {"torch": torch.__version__},
    }
    return Concept(**values | changes)


@pytest.fixture
def saved(tiny_pipe, tmp_path):
    return make_concept(tiny_pipe).save(tmp_path / "tuxedo.safetensors")


def rewrite(path, tensors=None, metadata=None):
    """Write a concept file again, changed: None removes a key."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        merged = file.metadata() | (metadata or {})
    every = load_file(path) | (tensors or {})
    save_file(
        {key: value for key, value in every.items() if value is not None},
        path,
        {key: value for key, value in merged.items() if value is not None},
    )


def test_round_trip(tiny_pipe, saved):
    written, read = make_concept(tiny_pipe), Concept.load(saved)
    for key in ("name", "token", "word", "base_hash", "settings", "versions"):
        assert getattr(read, key) == getattr(written, key)
    for group in ("embeddings", "deltas"):
        ours, theirs = getattr(written, group), getattr(read, group)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)
    assert read.vectors == 2


def test_is_frozen(tiny_pipe):
    with pytest.raises(FrozenInstanceError):
        make_concept(tiny_pipe).word = "dog"


def test_metadata_is_readable_without_us(saved):
    with safe_open(saved, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "concept-weaver/concept"
    assert (metadata["token"], metadata["word"]) == ("<v1>", "cat")
    assert json.loads(metadata["settings"])["steps"] == 3


def test_save_is_whole_or_not_at_all(tiny_pipe, saved, monkeypatch):
    before = saved.read_bytes()

    def half_way(path, content):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", half_way)
    with pytest.raises(OSError, match="disk full"):
        make_concept(tiny_pipe).save(saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_save_makes_the_folder_and_a_file_that_others_may_read(tiny_pipe, tmp_path):
    path = make_concept(tiny_pipe).save(tmp_path / "new" / "deep" / "c.safetensors")
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"x" * 5000], ids=["empty", "png", "noise"])
def test_load_refuses_what_is_no_safetensors_file(tmp_path, content):
    path = tmp_path / "c.safetensors"
    path.write_bytes(content)
    with pytest.raises(ConceptError, match=r"c\.safetensors: not a readable safetensors file, or cut short"):
        Concept.load(path)


@pytest.mark.parametrize("kept", [0.01, 0.5, 0.999])
def test_load_refuses_a_truncated_file(saved, kept):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ConceptError, match="cut short"):
        Concept.load(saved)


def test_load_refuses_a_missing_file_and_a_folder(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(ConceptError, match="no such concept file"):
            Concept.load(path)


KEY = "deltas/down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ({"format": None}, {}, "not a concept file"),
        ({"format": "pt"}, {}, "format 'pt'"),
        ({"format_version": "4"}, {}, "version 4, this release reads up to 3"),
        ({"token": None, "base_hash": None}, {}, "metadata lacks token, base_hash"),
        ({"settings": "{"}, {}, "not a readable"),
        ({"settings": "[]"}, {}, "settings is not a JSON object"),
        ({"token": "<v 1>"}, {}, "white space"),
        ({"token": ""}, {}, "token is empty, and there are embeddings for it"),
        ({}, {"deltas/a.attn2.to_k/down": torch.zeros(2, 16)}, "deltas/a.attn2.to_k lacks its factor 'up'"),
        ({}, {"deltas/a.attn2.to_k/down": torch.ones(2, 16), "deltas/a.attn2.to_k/up": torch.ones(8, 3)}, "of ranks 2"),
        ({}, {"outside/conv_in": torch.zeros(8, 16, 3)}, r"shape \(8, 16, 3\), expected two or four axes"),
        ({}, {KEY: None}, "no partner"),
        ({}, {KEY: torch.full((8, 16), torch.nan)}, f"{KEY} has NaN"),
        ({}, {KEY: torch.full((8, 16), torch.inf)}, "NaN or infinite"),
        ({}, {KEY: torch.zeros(8)}, r"shape \(8,\), expected two axes"),
        ({}, {"deltas/a.attn2.to_out.0.bias": torch.ones(8, 8)}, r"shape \(8, 8\), expected one axis"),
        ({}, {KEY: torch.zeros(8, 16, dtype=torch.int32)}, "expected floating point"),
        ({}, {"embeddings/text_encoder": torch.zeros(0, 16)}, r"shape \(0, 16\)"),
        ({}, {"deltas/conv_in": torch.zeros(8, 16)}, "no cross-attention projection"),
        ({}, {"lora.up": torch.zeros(8, 16)}, "unknown tensor 'lora.up'"),
    ],
)
def test_load_refuses_other_contents_naming_them(saved, metadata, tensors, message):
    rewrite(saved, tensors, metadata)
    with pytest.raises(ConceptError, match=message) as raised:
        Concept.load(saved)
    assert str(raised.value).count(str(saved)) == 1 and isinstance(raised.value, WeaverError)


def test_every_reason_is_told_at_once(tiny_pipe):
    with pytest.raises(ConceptError, match="name is empty.*white space.*NaN") as raised:
        make_concept(tiny_pipe, name="", token="a b", embeddings={"text_encoder": torch.full((1, 16), torch.nan)})
    assert "\n" not in str(raised.value)


def test_hash_is_of_values_not_of_precision(tiny_pipe):
    half = copy.deepcopy(tiny_pipe.unet).half()
    assert attn2_hash(half) == attn2_hash(copy.deepcopy(half).float()) == attn2_hash(copy.deepcopy(half).double())


def test_hash_sees_each_key_and_value_weight_and_nothing_else(tiny_pipe):
    unet = copy.deepcopy(tiny_pipe.unet)
    before = attn2_hash(unet)
    with torch.no_grad():
        unet.conv_in.weight.add_(1)
        for path in attn2_projections(unet):
            unet.get_submodule(path.rsplit(".", 1)[0]).to_q.weight.add_(1)
    assert attn2_hash(unet) == before
    seen = {before}
    for linear in attn2_projections(unet).values():
        with torch.no_grad():
            linear.weight[0, 0] += 0.5
        seen.add(attn2_hash(unet))
    assert len(seen) == 1 + len(attn2_projections(unet)) == 33


def test_hash_reads_through_an_adapter(tiny_pipe):
    unet = copy.deepcopy(tiny_pipe.unet)
    before = attn2_hash(unet)
    for path, linear in attn2_projections(unet).items():
        wrapper = torch.nn.Module()
        wrapper.base_layer = linear
        parent, name = path.rsplit(".", 1)
        setattr(unet.get_submodule(parent), name, wrapper)
    assert attn2_hash(unet) == before


def test_check_base_takes_its_own_model_only(tiny_pipe, tiny_pipe_v):
    concept = make_concept(tiny_pipe)
    concept.check_base(tiny_pipe)
    with pytest.raises(ConceptError, match="'tuxedo' belongs to another base model: its base has hash"):
        concept.check_base(tiny_pipe_v)


def test_check_base_tells_what_does_not_fit(tiny_pipe):
    concept = make_concept(tiny_pipe)
    wide = {path: torch.zeros(delta.shape[0], 5) for path, delta in concept.deltas.items()}
    other = replace(concept, deltas=wide, embeddings={"text_encoder": torch.zeros(1, 5)})
    with pytest.raises(
        ConceptError, match="32 of its 32 weights do not fit.*width 5 in text_encoder, the model's is 16"
    ):
        other.check_base(tiny_pipe)


def test_the_same_concept_is_the_same_file(tiny_pipe, tmp_path):
    files = [make_concept(tiny_pipe).save(tmp_path / f"{i}.safetensors").read_bytes() for i in range(4)]
    assert len(set(files)) == 1
    with safe_open(tmp_path / "0.safetensors", framework="pt") as file:
        assert list(file.metadata()) and len(list(file.keys())) == 33
