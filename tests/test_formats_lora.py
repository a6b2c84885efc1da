"""LoRA files of every dialect do what diffusers does with them, and nothing of a file is dropped unseen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import make_pipeline
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_kohya
from format_files import draw_each
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from pipeline_forms import draw, full_mask
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_sdxl import make_sdxl

from weaver import FusionPlan, attach
from weaver.concepts.changes import change_norm
from weaver.concepts.concept_file import ConceptError
from weaver.concepts.formats import read_concept_file
from weaver.concepts.formats.lora import parse
from weaver.concepts.formats.opening import OpenedFile
from weaver.fusion import ConceptUse

PROMPT = "a dog on the beach"
ATTN2 = r".*attn2\.(to_q|to_k|to_v|to_out\.0)"
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def trained(model, seed: int, **config) -> None:
    """Put a LoRA on a model, every factor of it random: as after a training."""
    model.add_adapter(LoraConfig(**config))
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=rng))


def trained_parts(pipe, unet_targets=ATTN2, **config) -> dict:
    """A pipeline's parts with a LoRA on each, alphas that are no ranks, and one rank that is another."""
    config = {"r": 3, "lora_alpha": 2, "rank_pattern": {"to_k": 2}, "alpha_pattern": {"to_k": 5}} | config
    encoders = {name: getattr(pipe, name) for name in ("text_encoder", "text_encoder_2") if hasattr(pipe, name)}
    trained(pipe.unet, 1, target_modules=unet_targets, **config)
    for seed, encoder in enumerate(encoders.values(), start=2):
        trained(encoder, seed, r=2, lora_alpha=3, target_modules=TEXT)
    return {"unet": pipe.unet} | encoders


EVERYWHERE = ["to_k", "to_v", "to_q", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2"]
EVERYWHERE += ["conv_shortcut", "time_emb_proj"]


def saved(pipe, folder, **config):
    """The file that diffusers' own saver makes of a trained pipeline."""
    parts = trained_parts(pipe, **config)
    layers = {f"{name}_lora_layers": get_peft_model_state_dict(part) for name, part in parts.items()}
    type(pipe).save_lora_weights(folder, **layers, **_collate_lora_metadata(parts))
    return folder / "pytorch_lora_weights.safetensors"


def read(path):
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}


def parsed_of(tensors, metadata):
    return parse(OpenedFile(Path("rex.safetensors"), "safetensors", tensors, metadata))


def alphas_told(tensors, to_k):
    """The alpha of every factor pair as kohya's scripts keep it, from the configuration that it was trained with."""
    for key in [key for key in tensors if key.endswith(".alpha")]:
        part = "unet" if key.startswith("lora_unet") else "text_encoder"
        alpha = 3 if part == "text_encoder" else to_k if "attn2_to_k" in key else 2
        tensors[key] = torch.tensor(float(alpha))
    return tensors


def kohya(path, to_k: float = 2, encoder: str = "lora_te_text_model_"):
    """The same file as kohya's scripts name it."""
    named = {key.replace(".text_model.", "."): x for key, x in read(path)[0].items()}
    named = {key.replace("lora_te1_", encoder): x for key, x in convert_state_dict_to_kohya(named).items()}
    tensors = alphas_told(named, to_k)
    other = path.with_name("kohya.safetensors")
    save_file(tensors, other, {"ss_steps": "1500", "ss_network_dim": "3"})
    return other


def old_diffusers(path):
    """The same in the names that diffusers had before PEFT, alphas taken into the factors, which it did not keep."""
    parsed = read_concept_file(path)
    short = {"to_q": "to_q_lora", "to_k": "to_k_lora", "to_v": "to_v_lora", "to_out.0": "to_out_lora"}
    tensors = {}
    for key, change in parsed.deltas.items():
        module, _, name = key.partition(".attn2.")
        for part, x in change._asdict().items():
            tensors[f"unet.{module}.attn2.processor.{short[name]}.{part}.weight"] = x.clone()
    for key, change in parsed.text_deltas.items():
        for part, x in change._asdict().items():
            tensors[f"{key}.lora_linear_layer.{part}.weight"] = x.clone()
    other = path.with_name("old.safetensors")
    save_file(tensors, other)
    return other


DIALECTS = {"diffusers": lambda path: path, "kohya": kohya, "old-diffusers": old_diffusers}


def latents_of(pipe, prompt=PROMPT, **arguments):
    return draw(pipe, prompt=prompt, guidance_scale=1.0, **arguments)


def woven_latents(pipe, parsed, scale=1.0, prompt=PROMPT):
    concept = parsed.concept(pipe, name="rex", word="dog")
    options = {"prompt": prompt, "suppression": 0.0, "height": 32, "width": 32}
    plan = FusionPlan.build(pipe, [ConceptUse(concept, scale=scale)], full_mask(), **options)
    with attach(pipe, plan):
        return latents_of(pipe, prompt)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return saved(make_pipeline(dtype=torch.float32), tmp_path_factory.mktemp("lora"))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_lora_draws_what_diffusers_draws_with_it(file, tmp_path, dialect):
    if dialect == "kohya":  # of whose alphas diffusers takes one for all
        file = saved(make_pipeline(dtype=torch.float32), tmp_path, rank_pattern={}, alpha_pattern={})
    path = DIALECTS[dialect](file)
    pipe, stock = make_pipeline(dtype=torch.float32), make_pipeline(dtype=torch.float32)
    plain = latents_of(stock)
    stock.load_lora_weights(path.parent, weight_name=path.name)
    expected = latents_of(stock)
    assert (expected - plain).abs().max() > 0.1
    found = woven_latents(pipe, read_concept_file(path))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_every_alpha_of_kohyas_is_its_own(file):
    expected, found = read_concept_file(file), read_concept_file(kohya(file, to_k=5))
    assert (expected.format, found.format) == ("diffusers LoRA", "kohya LoRA")
    assert found.settings == {"rank": [2, 3], "steps": "1500"}
    for group in ("deltas", "text_deltas"):
        ours, theirs = getattr(found, group), getattr(expected, group)
        assert ours.keys() == theirs.keys()
        for key, change in ours.items():
            torch.testing.assert_close(change.up @ change.down, theirs[key].up @ theirs[key].down)


def test_scale_is_that_of_the_whole_lora(file):
    pipe, stock = make_pipeline(dtype=torch.float32), make_pipeline(dtype=torch.float32)
    stock.load_lora_weights(file.parent, weight_name=file.name, adapter_name="rex")
    stock.set_adapters(["rex"], [0.6])
    found = woven_latents(pipe, read_concept_file(file), scale=0.6)
    torch.testing.assert_close(found, latents_of(stock), rtol=1e-4, atol=1e-4)


def test_every_key_counts(tiny_pipe, file):
    """Without any one pair of factors the picture is another: nothing is read in vain. In float64, to see each."""
    tensors, metadata = read(file)
    pairs = sorted({key.rpartition(".lora_")[0] for key in tensors})
    assert len(pairs) > 40

    def concept_without(pair):
        rest = {key: x for key, x in tensors.items() if not key.startswith(f"{pair}.lora_")}
        return parsed_of(rest, metadata).concept(tiny_pipe, name="rex", word="dog")

    whole, *found = draw_each(tiny_pipe, [concept_without(pair) for pair in ["none", *pairs]], PROMPT)
    for pair, latents in zip(pairs, found, strict=True):
        assert (latents - whole).abs().max() > 1e-6, pair
    read_keys = parsed_of(tensors, metadata)
    assert 2 * (len(read_keys.deltas) + len(read_keys.text_deltas)) == len(tensors)


def test_text_encoder_parts_act_on_their_own_prompt_alone(file):
    pipe = make_pipeline(dtype=torch.float32)
    tensors, metadata = read(file)
    of_text = {key: x for key, x in tensors.items() if key.startswith("text_encoder")}
    concept = parsed_of(of_text, metadata).concept(pipe, name="rex", word="dog")
    options = {"prompt": "a dog and a cat", "height": 32, "width": 32}
    with_it, without = (
        FusionPlan.build(pipe, [use], full_mask(), **options)
        for use in (ConceptUse(concept, "a dog"), ConceptUse(None, "a dog"))
    )
    for path, kv in with_it.keys_values.items():
        same = (kv.keys == without.keys_values[path].keys).flatten(1).all(1)
        assert same.tolist() == [True, True, False]  # negative, base, and the concept's own


@pytest.mark.parametrize("targets", [None, EVERYWHERE], ids=["cross-attention", "whole"])
def test_sdxl(tmp_path, targets):
    """Over the whole picture it is what diffusers draws with the file loaded, its text encoders' parts included."""
    pipe, stock = make_sdxl(dtype=torch.float32), make_sdxl(dtype=torch.float32)
    path = saved(make_sdxl(dtype=torch.float32), tmp_path, **({"unet_targets": targets} if targets else {}))
    parsed = read_concept_file(path)
    assert {key.split(".")[0] for key in parsed.text_deltas} == {"text_encoder", "text_encoder_2"}
    pooled = stock.encode_prompt(PROMPT, do_classifier_free_guidance=False)[2]  # that of the base prompt stays
    stock.load_lora_weights(tmp_path, weight_name=path.name)
    text = stock.encode_prompt(PROMPT, do_classifier_free_guidance=False)[0]
    expected = latents_of(stock, None, prompt_embeds=text, pooled_prompt_embeds=pooled)
    torch.testing.assert_close(woven_latents(pipe, parsed), expected, rtol=1e-4, atol=1e-4)


def test_what_lies_outside_cross_attention_is_kept_and_told_apart(tmp_path):
    path = saved(make_pipeline(dtype=torch.float32), tmp_path, unet_targets=EVERYWHERE)
    parsed = read_concept_file(path)
    tensors, _ = read(path)
    assert 2 * sum(map(len, (parsed.deltas, parsed.outside, parsed.text_deltas))) == len(tensors)
    assert all("attn2.to_" in key for key in parsed.deltas)
    assert not any("attn2.to_" in key for key in parsed.outside)
    unet = make_pipeline(dtype=torch.float32).unet
    assert {key.rpartition(".")[2] for key in parsed.outside} >= {"proj", "conv1", "conv_shortcut", "to_k", "proj_in"}
    concept = parsed.concept(make_pipeline(dtype=torch.float32), name="rex", word="dog")
    again = type(concept).load(concept.save(tmp_path / "rex.safetensors"))
    for group in ("deltas", "outside", "text_deltas"):
        ours, theirs = getattr(concept, group), getattr(again, group)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(a, b) for key in ours for a, b in zip(ours[key], theirs[key], strict=True))
    for key, change in parsed.outside.items():
        weight = unet.get_submodule(key).weight
        product = (change.up.flatten(1) @ change.down.flatten(1)).view_as(weight)
        assert change_norm(change) == pytest.approx(product.norm().item(), rel=1e-4)


def test_pefts_own_saver(tmp_path):
    config = LoraConfig(r=3, lora_alpha=2, target_modules=ATTN2)
    unet = get_peft_model(make_pipeline(dtype=torch.float32).unet, config)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=rng))
    unet.save_pretrained(tmp_path)
    parsed = read_concept_file(tmp_path / "adapter_model.safetensors")
    stock = make_pipeline(dtype=torch.float32)
    stock.unet = unet.base_model.model
    found = woven_latents(make_pipeline(dtype=torch.float32), parsed)
    torch.testing.assert_close(found, latents_of(stock), rtol=1e-4, atol=1e-4)


def changed(tensors, **changes):
    return {key: x for key, x in (tensors | changes).items() if x is not None}


def test_what_is_no_plain_lora_is_refused(file):
    tensors, metadata = read(file)
    down = next(key for key in tensors if "lora_A" in key and key.startswith("unet"))
    with pytest.raises(ConceptError, match="has no lora_B: the file is not whole"):
        parsed_of(changed(tensors, **{down.replace("lora_A", "lora_B"): None}), metadata)
    with pytest.raises(ConceptError, match="has no lora_A: the file is not whole"):
        parsed_of(changed(tensors, **{down: None}), metadata)
    with pytest.raises(ConceptError, match="a DoRA"):
        parsed_of(changed(tensors, **{down.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(8)}), metadata)
    with pytest.raises(ConceptError, match="no factor of a LoRA: this file has more in it"):
        parsed_of(changed(tensors, **{down.replace("lora_A.weight", "diff_b"): torch.ones(8)}), metadata)
    with pytest.raises(ConceptError, match="another model than Stable Diffusion"):
        parsed_of({key.replace("unet.", "transformer."): x for key, x in tensors.items()}, metadata)
    assert parsed_of({"<v1>": torch.zeros(4)}, {}) is None


def test_factors_under_names_of_two_kinds_are_not_lost(tmp_path):
    """diffusers' converter drops those under SDXL's own names without a word."""
    names = ("lora_unet_input_blocks_4_1_proj_in", "lora_unet_down_blocks_1_attentions_1_proj_in")
    tensors = {f"{name}.lora_down.weight": torch.ones(1, 4) for name in names}
    tensors |= {f"{name}.lora_up.weight": torch.ones(4, 1) for name in names}
    path = tmp_path / "rex.safetensors"
    save_file(tensors, path)
    with pytest.raises(ConceptError, match="2 of its 4 factors are lost among names of two kinds"):
        read_concept_file(path)


@pytest.mark.parametrize("name", ["input_blocks_{}_1_proj_in", "x_{}_output_blocks_1_proj_in", "middle_block_{}_to_q"])
def test_blocks_that_no_u_net_has_are_refused_before_their_names_are_converted(name, tmp_path, monkeypatch):
    """diffusers' converter looks through every name once for each number of a block."""
    monkeypatch.setattr("diffusers.StableDiffusionXLPipeline.lora_state_dict", lambda *a, **k: pytest.fail("read"))
    layers = [f"lora_unet_{name.format(number)}" for number in range(100, 400)]
    tensors = {f"{layer}.lora_{part}.weight": torch.ones(1, 1) for layer in layers for part in ("down", "up")}
    save_file(tensors, tmp_path / "rex.safetensors")
    with pytest.raises(ConceptError, match="is of a block that no Stable Diffusion has"):
        read_concept_file(tmp_path / "rex.safetensors")


def test_a_lora_of_another_size_is_refused(file):
    tensors, metadata = read(file)
    wider = {key: torch.cat([x, x], 1) if "attn2.to_k.lora_A" in key else x for key, x in tensors.items()}
    with pytest.raises(ConceptError, match="belongs to another base model: 16 of its 64 weights do not fit the U-Net"):
        parsed_of(wider, metadata).concept(make_pipeline(), name="rex", word="dog")
