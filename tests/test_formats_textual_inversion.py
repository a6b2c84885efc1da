"""Textual inversion in every layout: prompts read what diffusers' own loader makes of the file."""

from __future__ import annotations

import copy

import format_files as files
import pytest
import torch

from weaver.concepts.concept import ConceptError
from weaver.concepts.encoding import encode
from weaver.concepts.formats import read_concept_file
from weaver.concepts.own_prompts import token_reasons

OWN = "a {} dog, mountain"


def automatic(rows: torch.Tensor) -> dict:
    """What AUTOMATIC1111's web UI saves."""
    return {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": torch.nn.Parameter(rows)},
        "name": "toy-3500",
        "step": 3499,
        "sd_checkpoint": "7460a6fa",
        "sd_checkpoint_name": "v1-5",
    }


LAYOUTS = {
    "diffusers-bin": ("learned_embeds.bin", lambda rows: {"<toy>": rows}, "<toy>"),
    "diffusers-safetensors": ("learned_embeds.safetensors", lambda rows: {"<toy>": rows}, "<toy>"),
    "automatic1111-pt": ("toy.pt", automatic, "toy"),
    "emb-params": ("toy.safetensors", lambda rows: {"emb_params": rows}, "toy"),
    "clip-l-alone": ("toy.safetensors", lambda rows: {"clip_l": rows}, "toy"),
}


def loaded_by_diffusers(pipe, path, token, count):
    """A copy of the pipeline in which diffusers has loaded the file."""
    parts = {name: copy.deepcopy(part) for name, part in pipe.components.items()}
    loaded = type(pipe)(**parts, **files.options(pipe))
    loaded.set_progress_bar_config(disable=True)
    loaded.load_textual_inversion(str(path.parent), weight_name=path.name, token=token, local_files_only=True)
    assert len(loaded.tokenizer) == len(pipe.tokenizer) + count
    return loaded


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [0, 1, 3], ids=["[C]", "[1,C]", "[3,C]"])
def test_a_prompt_is_read_as_diffusers_reads_it(pipe, layout, count, tmp_path):
    name, content, token = LAYOUTS[layout]
    rows = files.vectors(pipe, max(count, 1))["text_encoder"]
    path = files.save(content(rows if count else rows[0]), tmp_path / name)
    concept = read_concept_file(path).concept(pipe, name="toy", word="dog")
    assert (concept.token, concept.vectors, concept.base_hash) == (token, max(count, 1), "")
    loaded = loaded_by_diffusers(pipe, path, token, max(count, 1))
    expected = files.draw_by_hand(loaded, OWN.format(token))
    torch.testing.assert_close(files.draw_fused(pipe, concept, OWN.format(token)), expected, **files.CLOSE)
    for row in range(max(count, 1)):  # each vector moves the text by far more than that
        embeddings = {"text_encoder": rows.index_fill(0, torch.tensor(row), 0.0)}
        other = files.by_hand(pipe, {}, embeddings, token)
        assert (files.draw_by_hand(other, OWN.format(token)) - expected).abs().max() > files.VISIBLE


@pytest.mark.parametrize("count", [1, 2])
def test_sdxl_has_vectors_for_both_text_encoders(sdxl, count, tmp_path):
    rows = files.vectors(sdxl, count)
    content = {"clip_l": rows["text_encoder"], "clip_g": rows["text_encoder_2"]}
    path = files.save(content, tmp_path / "toy.safetensors")
    concept = read_concept_file(path).concept(sdxl, name="toy", word="dog")
    prompt = OWN.format("toy")
    loaded = type(sdxl)(**{name: copy.deepcopy(part) for name, part in sdxl.components.items()})
    for key, suffix in (("clip_l", ""), ("clip_g", "_2")):
        tokenizer, encoder = getattr(loaded, f"tokenizer{suffix}"), getattr(loaded, f"text_encoder{suffix}")
        loaded.load_textual_inversion({"toy": content[key]}, tokenizer=tokenizer, text_encoder=encoder, token="toy")
    text, _, pooled, _ = loaded.encode_prompt(prompt, do_classifier_free_guidance=False)
    read = encode(sdxl, prompt, concept)
    torch.testing.assert_close(read.text, text, **files.CLOSE)
    torch.testing.assert_close(read.pooled, pooled, **files.CLOSE)
    expected = files.draw_by_hand(loaded, prompt)
    torch.testing.assert_close(files.draw_fused(sdxl, concept, prompt), expected, **files.CLOSE)
    for key in content:
        files.save({**content, key: torch.zeros_like(content[key])}, path)
        without = read_concept_file(path).concept(sdxl, name="toy", word="dog")
        assert (files.draw_fused(sdxl, without, prompt) - expected).abs().max() > files.VISIBLE


def test_a_half_of_an_sdxl_embedding_is_missed(sdxl, pipe, tmp_path):
    rows = files.vectors(sdxl)
    parsed = read_concept_file(files.save({"clip_l": rows["text_encoder"]}, tmp_path / "toy.safetensors"))
    with pytest.raises(ConceptError, match="no embedding for text_encoder_2"):
        parsed.concept(sdxl, name="toy", word="dog")
    parsed = read_concept_file(files.save({"clip_g": rows["text_encoder_2"]}, tmp_path / "toy.safetensors"))
    with pytest.raises(ConceptError, match="no embedding for text_encoder"):
        parsed.concept(pipe, name="toy", word="dog")


def test_the_file_name_is_the_token_where_prompts_can_name_it(pipe, tmp_path):
    rows = files.vectors(pipe)["text_encoder"]
    for name, token in (("my-toy.pt", "my-toy"), ("my toy.pt", "toy-3500")):
        assert list(read_concept_file(files.save(automatic(rows), tmp_path / name)).embeddings) == [token]
    with pytest.raises(ConceptError, match="has white space in it: rename the file"):
        read_concept_file(files.save({"emb_params": rows}, tmp_path / "my toy.safetensors"))


def test_what_the_file_tells_of_its_training_is_kept(pipe, tmp_path):
    path = files.save(automatic(files.vectors(pipe)["text_encoder"]), tmp_path / "toy.pt")
    settings = read_concept_file(path).concept(pipe, name="toy", word="dog").settings
    assert (settings["step"], settings["sd_checkpoint_name"]) == (3499, "v1-5")


def test_several_tokens_in_one_file(pipe, tmp_path):
    path = files.save({"<a>": torch.ones(16), "<b>": torch.full((2, 16), 2.0)}, tmp_path / "two.bin")
    parsed = read_concept_file(path)
    with pytest.raises(ConceptError, match="tell which token: the file has <a>, <b>"):
        parsed.concept(pipe, name="toy", word="dog")
    assert parsed.concept(pipe, name="toy", word="dog", token="<b>").vectors == 2


def test_a_token_that_is_a_word_can_be_called_otherwise(pipe, tmp_path):
    path = files.save(automatic(files.vectors(pipe)["text_encoder"]), tmp_path / "cat.pt")
    parsed = read_concept_file(path)
    own, called = (parsed.concept(pipe, name="cat", word="cat", token=token) for token in (None, "<cat>"))
    assert (own.token, called.token) == ("cat", "<cat>")
    assert torch.equal(called.embeddings["text_encoder"], own.embeddings["text_encoder"])
    (told,) = token_reasons({"prompt": "a cat and a dog"}, [own])
    assert told.endswith("the base model reads that as a word: call the concept otherwise, such as token '<cat>'")
    assert token_reasons({"prompt": "a cat and a dog"}, [called]) == []
    with pytest.raises(ConceptError, match="no token 'kitty': the file has cat"):
        parsed.concept(pipe, name="cat", word="cat", token="kitty")
    path = files.save({"<a>": torch.ones(16)}, tmp_path / "a.bin")
    with pytest.raises(ConceptError, match="no token '<b>': the file has <a>"):
        read_concept_file(path).concept(pipe, name="cat", word="cat", token="<b>")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"clip_l": torch.ones(2, 16), "clip_g": torch.ones(3, 24)}, r"different numbers of vectors, \[2, 3\]"),
        ({"clip_l": torch.ones(2, 16), "else": torch.ones(2)}, "'else'"),
        ({"emb_params": torch.ones(1, 16), "clip_l": torch.ones(1, 16)}, "expected emb_params, or clip_l and clip_g"),
        ({"emb_params": torch.ones(1, 1, 16)}, r"shape \(1, 1, 16\), expected vectors"),
        ({"<a>": torch.ones(76, 16)}, "76 vectors, a prompt has room for 75"),
        ({"string_to_param": {"*": torch.ones(16), "+": torch.ones(16)}}, "expected the vectors of one placeholder"),
        ({"string_to_param": {"*": "x"}}, "has a str, expected vectors"),
        (torch.ones(1, 16), "a bare Tensor, without a name"),
        ({"mean": torch.ones(16), "std": torch.ones(16)}, "'mean', 'std', ...*of no format that is known"),
        ({"latents": torch.ones(2, 16)}, "'latents', .*of no format that is known"),
        ({"first": torch.ones(16), "<a>": torch.ones(16)}, "2 vectors or matrices, 'first' among them, .*one by one"),
    ],
    ids=[
        "counts",
        "unknown-part",
        "two-layouts",
        "axes",
        "too-many",
        "placeholders",
        "text",
        "no-name",
        "statistics",
        "latents",
        "several-words",
    ],
)
def test_what_does_not_hold_together_is_refused(content, message, tmp_path):
    path = files.save(content, tmp_path / "toy.pt")
    with pytest.raises(ConceptError, match=message) as raised:
        read_concept_file(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_a_parameter_dict_of_the_first_code_is_told(tmp_path):
    vectors = torch.nn.ParameterDict({"*": torch.nn.Parameter(torch.randn(2, 8))})
    torch.save({"string_to_token": {"*": 265}, "string_to_param": vectors}, tmp_path / "rex.pt")
    with pytest.raises(ConceptError, match=r"rex\.pt: its vectors are a torch\.nn\.ParameterDict, .* by safetensors"):
        read_concept_file(tmp_path / "rex.pt")
