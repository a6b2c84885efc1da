"""Custom Diffusion's files are read key by key: a fusion draws what a stock pipeline with their weights draws."""

from __future__ import annotations

import copy
from dataclasses import replace

import format_files as files
import pytest
import torch
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor

from weaver.concepts.concept import Concept, ConceptError, attn2_projections
from weaver.concepts.formats import read_concept_file
from weaver_kernels import LowRank

OWN = "a <new1> dog"
KEYS_VALUES = ("to_k", "to_v")
PROJECTIONS = pytest.mark.parametrize("names", [KEYS_VALUES, files.ALL], ids=["keys-values", "queries-outputs-too"])


def concept_of(path, pipe, **told):
    return read_concept_file(path).concept(pipe, name="rex", word="dog", **told)


def assert_drawn(path, pipe, weights, vectors):
    expected = files.draw_by_hand(files.by_hand(pipe, weights, vectors), OWN)
    torch.testing.assert_close(files.draw_fused(pipe, concept_of(path, pipe), OWN), expected, **files.CLOSE)


def trained_biases(pipe):
    """Biases that move the picture visibly each, the deepest level's too."""
    generator = files.rng(5)
    amounts = {name: 8.0 if "mid_block" in name else 0.8 for name in biases(pipe)}
    return {name: files.noisy(value, generator, amounts[name]) for name, value in biases(pipe).items()}


def biases(pipe):
    return {name: x.detach() for name, x in pipe.unet.named_parameters() if name.endswith("attn2.to_out.0.bias")}


@PROJECTIONS
def test_delta_of_the_authors(pipe, names, tmp_path):
    weights, vectors = files.changed_weights(pipe, names), files.vectors(pipe)
    weights |= trained_biases(pipe) if "to_out.0" in names else {}
    delta = {"unet": weights, "modifier_token": {"<new1>": vectors["text_encoder"][0]}}
    assert_drawn(files.save(delta, tmp_path / "delta.bin"), pipe, weights, vectors)


@PROJECTIONS
def test_compressed_factors_are_added(pipe, names, tmp_path):
    """As the authors' script compresses: keys and values as factors, the rest as it is."""
    generator, vectors = files.rng(3), files.vectors(pipe)
    unet, weights = {}, files.changed_weights(pipe, names)
    for name, linear in attn2_projections(pipe.unet).items():
        out, width = linear.weight.shape
        u, v = (0.5 * torch.randn(shape, generator=generator) for shape in ((out, 3), (3, width)))
        unet[f"{name}.weight"] = {"u": u, "v": v}
        weights[f"{name}.weight"] = linear.weight.detach() + u @ v
    delta = {"unet": weights | unet, "modifier_token": {"<new1>": vectors["text_encoder"][0]}}
    path = files.save(delta, tmp_path / "compressed_delta.bin")
    assert_drawn(path, pipe, weights, vectors)
    concept = concept_of(path, pipe)
    assert sum(isinstance(change, LowRank) for change in concept.deltas.values()) == len(unet)
    assert bool(concept.base_hash) == (names == files.ALL)


@pytest.mark.parametrize("layout", ["list", "second-mapping"])
def test_sdxl_has_a_vector_for_each_text_encoder(sdxl, layout, tmp_path):
    weights, vectors = files.changed_weights(sdxl), files.vectors(sdxl)
    first, second = (rows[0] for rows in vectors.values())
    if layout == "list":
        tokens = {"modifier_token": {"<new1>": [first, second]}}
    else:
        tokens = {"modifier_token": {"<new1>": first}, "modifier_token_2": {"<new1>": second}}
    assert_drawn(files.save({"unet": weights} | tokens, tmp_path / "delta.bin"), sdxl, weights, vectors)


def save_by_diffusers(pipe, weights, folder, safe):
    """`save_attn_procs` of a U-Net with diffusers' own processors, as its example ends."""
    unet = copy.deepcopy(pipe.unet)
    processors, queries = {}, any(".to_q." in name for name in weights)
    for name in unet.attn_processors:
        path = name.removesuffix(".processor")
        if path.endswith("attn1"):
            processors[name] = CustomDiffusionAttnProcessor(False, False)
            continue
        rows, width = weights[f"{path}.to_k.weight"].shape
        processor = CustomDiffusionAttnProcessor(True, queries, rows, width)
        state = {key: weights[f"{path}.{key.replace('_custom_diffusion', '')}"] for key in processor.state_dict()}
        processor.load_state_dict(state)
        processors[name] = processor
    unet.set_attn_processor(processors)
    unet.save_attn_procs(folder, safe_serialization=safe)
    (path,) = folder.glob("pytorch_custom_diffusion_weights.*")
    return path


@PROJECTIONS
@pytest.mark.parametrize("safe", [False, True], ids=["bin", "safetensors"])
def test_what_diffusers_saves(pipe, names, safe, tmp_path):
    weights, vectors = files.changed_weights(pipe, names), files.vectors(pipe)
    weights |= trained_biases(pipe) if "to_out.0" in names else {}
    path = save_by_diffusers(pipe, weights, tmp_path, safe)
    files.save({"<new1>": vectors["text_encoder"][0]}, tmp_path / f"<new1>{path.suffix}")
    assert_drawn(path, pipe, weights, vectors)


def test_every_key_is_read(pipe, tmp_path):
    """Without any one of them the picture is another, or the file is refused."""
    weights, vectors = files.changed_weights(pipe) | trained_biases(pipe), files.vectors(pipe)
    path = tmp_path / "delta.bin"
    base = {key: pipe.unet.get_parameter(key).detach() for key in weights}

    def concept_without(key):
        delta = {"unet": weights | {key: base[key]} if key in base else weights}
        delta["modifier_token"] = {"<new1>": vectors["text_encoder"][0] * (key != "<new1>")}
        return concept_of(files.save(delta, path), pipe)

    keys = [*weights, "<new1>"]
    whole, *found = files.draw_each(pipe, [concept_without(key) for key in ["", *keys]], OWN)
    torch.testing.assert_close(whole, files.draw_by_hand(files.by_hand(pipe, weights, vectors), OWN)[0], **files.CLOSE)
    assert len(found) == 64 + 16 + 1
    for key, latents in zip(keys, found, strict=True):
        assert (latents - whole).abs().max() > files.VISIBLE, key
    for left_out in weights:
        if ".to_k." in left_out or ".to_v." in left_out:
            rest = {key: value for key, value in weights.items() if key != left_out}
            files.save({"unet": rest, "modifier_token": {"<new1>": vectors["text_encoder"][0]}}, path)
            with pytest.raises(ConceptError, match="has no partner"):
                concept_of(path, pipe)


def test_several_tokens_are_told_apart(pipe, tmp_path):
    tokens = {f"<new{i}>": torch.full((16,), float(i)) for i in (1, 2)}
    path = files.save({"unet": files.changed_weights(pipe), "modifier_token": tokens}, tmp_path / "delta.bin")
    with pytest.raises(ConceptError, match="tell which token: the file has <new1>, <new2>"):
        concept_of(path, pipe)
    assert concept_of(path, pipe, token="<new2>").embeddings["text_encoder"].eq(2).all()


def test_a_token_file_that_is_not_there_is_missed(pipe, tmp_path):
    path = save_by_diffusers(pipe, files.changed_weights(pipe, KEYS_VALUES), tmp_path, safe=True)
    for token in (None, "<new1>"):
        with pytest.raises(ConceptError, match=r"<new1>\.bin.*does not lie beside it.*or tell as token"):
            concept_of(path, pipe, token=token)
    concept = concept_of(path, pipe, token="sks")
    assert (concept.token, concept.modifier, len(concept.deltas)) == ("sks", "", 32)


def test_a_damaged_token_file_is_named(pipe, tmp_path):
    path = save_by_diffusers(pipe, files.changed_weights(pipe, KEYS_VALUES), tmp_path, safe=True)
    (tmp_path / "<new1>.bin").write_bytes(b"PK\x03\x04 no more")
    with pytest.raises(ConceptError, match=r"<new1>\.bin: is no whole file"):
        read_concept_file(path)


def test_a_file_with_biases_is_our_own_again(pipe, tmp_path):
    """Saved and loaded, they are what they were; and they belong to one layer's output."""
    weights = files.changed_weights(pipe) | trained_biases(pipe)
    path = files.save({"unet": weights, "modifier_token": {"<new1>": torch.ones(16)}}, tmp_path / "delta.bin")
    concept = concept_of(path, pipe)
    again = Concept.load(concept.save(tmp_path / "rex.safetensors"))
    assert again.deltas.keys() == concept.deltas.keys() and len(concept.deltas) == 80
    assert all(torch.equal(again.deltas[key], delta) for key, delta in concept.deltas.items())
    name = next(iter(biases(pipe)))
    short = {"unet": weights | {name: torch.ones(3)}, "modifier_token": {"<new1>": torch.ones(16)}}
    with pytest.raises(ConceptError, match="1 of its 80 weights do not fit the U-Net"):
        concept_of(files.save(short, path), pipe)
    wide = {"unet": weights | {name: torch.ones(3, 3)}, "modifier_token": {"<new1>": torch.ones(16)}}
    with pytest.raises(ConceptError, match=r"shape \(3, 3\), expected one axis"):
        concept_of(files.save(wide, path), pipe)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_an_output_bias_may_be_rounded(pipe, dtype, tmp_path):
    rounded = {name: value.to(dtype) for name, value in biases(pipe).items()}
    weights = files.changed_weights(pipe) | rounded
    path = files.save({"unet": weights, "modifier_token": {"<new1>": torch.ones(16)}}, tmp_path / "delta.bin")
    assert len(concept_of(path, pipe).deltas) == 64


SELF = "mid_block.attentions.0.transformer_blocks.0.attn1.to_k.weight"


def test_other_weights_must_be_the_models(pipe, tmp_path):
    own = pipe.unet.get_parameter(SELF).detach()
    unet, tokens = files.changed_weights(pipe, KEYS_VALUES), {"<new1>": torch.ones(16)}
    path = tmp_path / "delta.bin"
    files.save({"unet": unet | {SELF: own}, "modifier_token": tokens}, path)
    assert len(concept_of(path, pipe).deltas) == 32
    files.save({"unet": unet | {SELF: own * 1.01}, "modifier_token": tokens}, path)
    with pytest.raises(ConceptError, match=r"changes 1 parameters that can't be fused, unet\.mid_block"):
        concept_of(path, pipe)
    files.save({"unet": unet | {SELF: own[:-1]}, "modifier_token": tokens}, path)
    with pytest.raises(ConceptError, match="attn1.to_k.weight does not fit the model"):
        concept_of(path, pipe)


def test_factors_outside_cross_attention_are_kept_as_such(pipe, tmp_path):
    factors = {"u": torch.ones(16, 2), "v": torch.ones(2, 16)}
    unet = files.changed_weights(pipe, KEYS_VALUES) | {SELF: factors}
    path = files.save({"unet": unet, "modifier_token": {"<new1>": torch.ones(16)}}, tmp_path / "delta.bin")
    assert list(concept_of(path, pipe).outside) == [SELF.removesuffix(".weight")]


KEY = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"


@pytest.mark.parametrize(
    ("delta", "message"),
    [
        ({"unet": {}, "modifier_token": {}}, "has anything that could be fused"),
        ({"unet": {KEY: torch.ones(8)}}, r"shape \(8,\), expected two axes"),
        ({"unet": {KEY: "x"}}, "is a str, expected a tensor"),
        ({"unet": {KEY: {"u": torch.ones(2, 2)}}}, "expected the factors u and v"),
        ({"unet": {KEY: {"u": torch.ones(2, 2), "v": torch.ones(3, 2)}}}, "do not multiply"),
        ({"unet": {}, "modifier_token": {"<a>": [torch.ones(2)] * 3}}, "vectors for 3 text encoders"),
        ({"unet": {}, "modifier_token": {"<a>": torch.ones(2, 2, 2)}}, r"shape \(2, 2, 2\), expected vectors"),
        (
            {"modifier_token": {"<a>": torch.ones(2)}, "modifier_token_2": {"<b>": torch.ones(2)}},
            "modifier_token_2 has",
        ),
        ({"unet": {KEY: torch.ones(2, 2)}, "text_encoder": {"x.weight": torch.ones(2)}}, "'text_encoder' beside"),
        ({f"{SELF[:-12]}.processor.to_k_custom_diffusion.weight": torch.ones(2, 2)}, "nothing could be fused"),
        ({f"{KEY[:-7]}.processor.to_x_custom_diffusion.weight": torch.ones(2, 2)}, "it is not known what it changes"),
    ],
    ids=[
        "empty",
        "one-axis",
        "text",
        "half",
        "ranks",
        "three",
        "axes",
        "tokens",
        "text-encoder",
        "self-attention",
        "key",
    ],
)
def test_what_does_not_hold_together_is_refused(delta, message, tmp_path):
    path = files.save(delta, tmp_path / "delta.bin")
    with pytest.raises(ConceptError, match=message) as raised:
        read_concept_file(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_weights_of_another_model_do_not_fit(pipe, sdxl, tmp_path):
    delta = {"unet": files.changed_weights(sdxl), "modifier_token": {"<new1>": torch.ones(16)}}
    parsed = read_concept_file(files.save(delta, tmp_path / "delta.bin"))
    with pytest.raises(ConceptError, match="weights do not fit the U-Net"):
        parsed.concept(pipe, name="rex", word="dog")
    assert replace(parsed, weights={}).concept(pipe, name="rex", word="dog").token == "<new1>"


def test_a_token_without_brackets_lies_beside_under_its_own_name(pipe, tmp_path):
    """As diffusers' example writes it with --modifier_token ktn; a damaged file of another name is let be."""
    path = save_by_diffusers(pipe, files.changed_weights(pipe, KEYS_VALUES), tmp_path, safe=True)
    rows = files.vectors(pipe)["text_encoder"]
    files.save({"ktn": rows[0]}, tmp_path / "ktn.bin")
    files.save({"other": rows[0], "more": rows[0]}, tmp_path / "other.bin")
    (tmp_path / "damaged.bin").write_bytes(b"PK\x03\x04 no more")
    concept = concept_of(path, pipe)
    assert concept.token == "ktn" and torch.equal(concept.embeddings["text_encoder"][0], rows[0])
