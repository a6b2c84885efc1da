"""Converted concepts do in other programs, and read back by our own readers, what they do here."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from conftest import make_concept, make_pipeline
from pipeline_forms import full_mask
from safetensors.torch import load_file, save_file
from test_formats_lora import PROMPT, latents_of, saved
from tiny_sdxl import make_sdxl

from weaver import FusionPlan, attach, load_concept
from weaver.cli import main
from weaver.concepts.concept import Concept, ConceptError, attn2_hash, text_module
from weaver.concepts.decompose import Losses, factors_of
from weaver.concepts.formats import read_concept_file
from weaver.concepts.formats.convert import convert
from weaver.concepts.formats.parsed import BASE_KEY
from weaver.fusion import ConceptUse
from weaver_kernels import LowRank

ALL = ("to_k", "to_v", "to_q", "to_out.0")
LORAS = ("diffusers-lora", "kohya-lora")
NAMED = PROMPT.replace("dog", "<v1> dog")


@pytest.fixture(scope="module")
def concept(pipe):
    """Whole matrices on every projection of cross-attention, and a token of two vectors."""
    made = make_concept(pipe, 1, "dog", 0.3, ALL)
    return replace(made, embeddings={"text_encoder": torch.cat([*made.embeddings.values()] * 2)})


@pytest.fixture(scope="module")
def drawn(pipe, concept):
    """What the concept draws on its own, by the fusion's own processors."""
    plan = FusionPlan.build(
        pipe, [ConceptUse(concept)], full_mask(), prompt=PROMPT, suppression=0.0, height=32, width=32
    )
    with attach(pipe, plan):
        return latents_of(pipe, PROMPT)


def products(changes):
    whole = {}
    for key, change in changes.items():
        whole[key] = change.up.double() @ change.down.double() if isinstance(change, LowRank) else change.double()
    return whole


def converted(concept, to, folder, *options, name="out.safetensors"):
    """The file that the command line makes of a concept's own."""
    file = concept.save(folder / "in" / "rex.safetensors")
    out = folder / to / name
    assert main(["bank", "convert", str(file), "--to", to, "--out", str(out), *map(str, options)]) == 0
    return out


@pytest.mark.parametrize("to", LORAS)
def test_a_lora_of_full_rank_draws_what_the_concept_draws(concept, drawn, tmp_path, to):
    out = converted(concept, to, tmp_path, "--rank", 99)
    stock = make_pipeline(dtype=torch.float32)
    plain = latents_of(stock)
    stock.load_textual_inversion(out.parent, weight_name="<v1>.safetensors")
    stock.load_lora_weights(out.parent, weight_name=out.name)
    found = latents_of(stock, NAMED)
    assert (found - plain).abs().max() > 0.1
    torch.testing.assert_close(found, drawn, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("to", LORAS)
def test_our_own_reader_reads_a_lora_back(pipe, concept, tmp_path, capsys, to):
    out = converted(concept, to, tmp_path, "--rank", 99)
    assert "become factors of rank 16:" in capsys.readouterr().out  # no matrix has more
    told = []
    again = load_concept(out, pipe, word="dog", tell=told.append)
    whole = products(again.deltas)
    assert whole.keys() == concept.deltas.keys()
    for key, change in products(concept.deltas).items():
        torch.testing.assert_close(whole[key], change, rtol=0, atol=2e-6)
    assert again.token == "<v1>" and torch.equal(again.embeddings["text_encoder"], concept.embeddings["text_encoder"])
    assert told == [f"{out}: its token <v1> was taken from <v1>.safetensors beside it"]
    token = load_concept(out.with_name("<v1>.safetensors"), pipe, word="dog")
    assert token.token == "<v1>" and torch.equal(token.embeddings["text_encoder"], concept.embeddings["text_encoder"])


@pytest.mark.parametrize("changed", [("to_k", "to_v"), (*ALL, "to_out.0.bias")], ids=["keys-values", "all"])
def test_custom_diffusion_draws_what_the_concept_draws(pipe, model, tmp_path, capsys, changed):
    concept = make_concept(pipe, 1, "dog", 0.3, changed)
    plan = FusionPlan.build(
        pipe, [ConceptUse(concept)], full_mask(), prompt=PROMPT, suppression=0.0, height=32, width=32
    )
    with attach(pipe, plan):
        expected = latents_of(pipe, PROMPT)
    out = converted(concept, "custom-diffusion", tmp_path, "--model", model, name="weights.bin")
    assert f"training settings, base model (hash {concept.base_hash[:12]})\n" in capsys.readouterr().out
    stock = make_pipeline(dtype=torch.float32)
    stock.load_textual_inversion(out.parent, weight_name="<v1>.safetensors")
    stock.unet.load_attn_procs(out.parent, weight_name=out.name, _pipeline=stock)
    torch.testing.assert_close(latents_of(stock, NAMED), expected, rtol=1e-4, atol=1e-4)
    again = load_concept(out, pipe, word="dog")
    assert (again.token, again.base_hash, again.deltas.keys()) == ("<v1>", concept.base_hash, concept.deltas.keys())
    for key, delta in concept.deltas.items():
        torch.testing.assert_close(again.deltas[key].float(), delta, rtol=1e-3, atol=1e-6)  # half precision


def test_custom_diffusion_in_safetensors_is_what_diffusers_saves(pipe, model, concept, tmp_path, capsys):
    stock = make_pipeline(dtype=torch.float32)
    whole = converted(concept, "custom-diffusion", tmp_path, "--model", model, name="weights.bin")
    stock.unet.load_attn_procs(whole.parent, weight_name=whole.name, _pipeline=stock)
    stock.unet.save_attn_procs(tmp_path / "theirs", safe_serialization=True)
    name = "pytorch_custom_diffusion_weights.safetensors"
    capsys.readouterr()
    ours = converted(concept, "custom-diffusion", tmp_path, "--model", model, "--replace", name=name)
    assert "diffusers' own loader reads this layout from a .bin alone" in capsys.readouterr().out
    expected, found = load_file(tmp_path / "theirs" / name), load_file(ours)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert load_concept(ours, pipe, word="dog").deltas.keys() == concept.deltas.keys()


def test_only_the_layers_that_change_are_written(pipe, model, concept, tmp_path):
    key = next(iter(concept.deltas)).rpartition(".")[0]
    few = replace(concept, deltas={k: x for k, x in concept.deltas.items() if k.startswith(f"{key}.to_q")})
    out = converted(few, "custom-diffusion", tmp_path, "--model", model)
    layer = f"{key}.processor"
    names = ("to_k_custom_diffusion", "to_v_custom_diffusion", "to_q_custom_diffusion", "to_out_custom_diffusion.0")
    assert load_file(out).keys() == {f"{layer}.{name}.weight" for name in names} | {f"{layer}.{names[3]}.bias"}
    whole = load_concept(out, pipe, word="dog").deltas
    assert not whole[f"{key}.to_k"].any() and whole[f"{key}.to_q"].any()


@pytest.mark.parametrize("to", LORAS)
def test_factors_stay_as_they_are_also_outside_and_in_text_encoders(tmp_path, to, capsys):
    targets = ["to_k", "to_v", "to_q", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2"]
    targets += ["conv_shortcut", "time_emb_proj"]
    # diffusers takes one alpha of a kohya file for all, so that ranks are one
    uniform = {"rank_pattern": {}, "alpha_pattern": {}} if to == "kohya-lora" else {}
    file = saved(make_pipeline(dtype=torch.float32), tmp_path, unet_targets=targets, **uniform)
    out = tmp_path / "out.safetensors"
    assert main(["bank", "convert", str(file), "--to", to, "--out", str(out), "--word", "dog"]) == 0
    told = capsys.readouterr()
    assert "are factors already, which are kept as they are" in told.out
    assert "relative error" not in told.out and "its ranks differ" not in told.out
    assert told.err == ""
    before, after = read_concept_file(file), read_concept_file(out)
    for group in ("deltas", "outside", "text_deltas"):
        expected, found = getattr(before, group), getattr(after, group)
        assert expected and found.keys() == expected.keys()
        for key, change in expected.items():
            assert all(torch.equal(a, b) for a, b in zip(found[key], change, strict=True)), key
    pictures = []
    for path in (file, out):
        stock = make_pipeline(dtype=torch.float32)
        stock.load_lora_weights(path.parent, weight_name=path.name)
        pictures.append(latents_of(stock))
    torch.testing.assert_close(*pictures, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("to", LORAS)
def test_the_error_that_is_told_is_the_true_one(concept, tmp_path, capsys, to):
    out = converted(concept, to, tmp_path, "--rank", 3)
    told = re.search(r"rank 3: relative error ([\d.]+) .*, at worst ([\d.]+) in unet\.(\S+)", capsys.readouterr().out)
    found, whole = products(read_concept_file(out).deltas), products(concept.deltas)
    lost = {key: (found[key] - change).norm() for key, change in whole.items()}
    parts = {key: lost[key] / change.norm() for key, change in whole.items()}
    overall = sum(x**2 for x in lost.values()).sqrt() / sum(x.norm() ** 2 for x in whole.values()).sqrt()
    assert float(told[1]) == pytest.approx(overall.item(), rel=1e-3) and overall > 0.3
    assert float(told[2]) == pytest.approx(max(parts.values()).item(), rel=1e-3)
    assert told[3] == max(parts, key=parts.get)


@pytest.mark.parametrize("to", LORAS)
def test_biases_have_no_place_in_a_lora_which_is_told(pipe, tmp_path, capsys, to):
    concept = make_concept(pipe, 1, "dog", 0.3, (*ALL, "to_out.0.bias"))
    out = converted(concept, to, tmp_path, "--rank", 99)
    told = capsys.readouterr().out
    assert "64 matrices become" in told and "16 changes of biases are left out" in told
    found, whole = products(read_concept_file(out).deltas), products(concept.deltas)
    assert whole.keys() - found.keys() == {key for key in whole if key.endswith(".bias")}
    lost = sum(whole[key].norm() ** 2 for key in whole.keys() - found.keys()).sqrt()
    expected = (lost / sum(x.norm() ** 2 for x in whole.values()).sqrt()).item()
    assert float(re.search(r"relative error ([\d.]+) ", told)[1]) == pytest.approx(expected, rel=1e-3)
    alone = replace(concept, deltas={key: x for key, x in concept.deltas.items() if key.endswith(".bias")})
    with pytest.raises(ConceptError, match="changes biases alone: a LoRA has no place for them"):
        convert(alone, to, tmp_path / "out.safetensors")


@pytest.mark.parametrize("to", [*LORAS, "custom-diffusion"])
def test_the_base_model_is_known_again_by_its_hash(pipe, model, concept, tmp_path, capsys, to):
    out = converted(concept, to, tmp_path, *(("--model", model) if to == "custom-diffusion" else ()))
    assert "base model" not in capsys.readouterr().out
    assert main(["inspect", str(out)]) == 0 and concept.base_hash in capsys.readouterr().out
    assert load_concept(out, pipe, word="dog").base_hash == concept.base_hash
    with pytest.raises(
        ConceptError, match=f"belongs to another base model: its base has hash {concept.base_hash[:12]}"
    ):
        load_concept(out, make_pipeline(dtype=torch.float32, seed=3), word="dog")


def test_the_base_model_of_an_sdxl_lora_is_known_again(sdxl, tmp_path):
    concept = replace(make_concept(sdxl, 1, "dog"), embeddings={}, token="")
    other = make_sdxl(dtype=torch.float32, seed=3)
    for to in LORAS:
        out = convert(concept, to, tmp_path / to / "rex.safetensors").files[0]
        assert load_concept(out, sdxl, word="dog").base_hash == concept.base_hash == attn2_hash(sdxl.unet)
        with pytest.raises(ConceptError, match="belongs to another base model: its base has hash"):
            load_concept(out, other, word="dog")


def test_what_is_no_hash_of_a_base_model_is_refused(tmp_path):
    key = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    tensors = {f"{key}.lora_A.weight": torch.ones(1, 4), f"{key}.lora_B.weight": torch.ones(4, 1)}
    save_file(tensors, tmp_path / "rex.safetensors", {BASE_KEY: "sd21"})
    with pytest.raises(ConceptError, match="rex.safetensors: the hash of its base model is 'sd21', expected 64 hex"):
        read_concept_file(tmp_path / "rex.safetensors")
    save_file(tensors, tmp_path / "rex.safetensors")
    assert load_concept(tmp_path / "rex.safetensors", word="dog").base_hash == ""


def test_no_other_factors_of_a_rank_are_nearer():
    """The singular values that are left out are all that is lost (Eckart and Young)."""
    change = torch.randn(7, 5, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    losses = Losses(2)
    factors = factors_of(change, losses.rank)
    losses.note("conv", change, factors)
    assert (factors.down.shape, factors.up.shape) == ((2, 5, 3, 3), (7, 2, 1, 1))
    rest = torch.linalg.svdvals(change.flatten(1))[2:].norm() / change.norm()
    assert losses.overall == pytest.approx(rest.item(), rel=1e-6) and losses.worst == ("conv", losses.overall)


def test_of_two_text_encoders(tmp_path):
    pipe = make_sdxl(dtype=torch.float32)
    concept = make_concept(pipe, 1, "dog")
    file = saved(make_sdxl(dtype=torch.float32), tmp_path)
    lora = load_concept(file, pipe, word="dog")
    whole = replace(concept, deltas=lora.deltas, text_deltas=lora.text_deltas)
    for to in LORAS:
        done = convert(whole, to, tmp_path / to / "out.safetensors")
        again = load_concept(done.files[0], pipe, word="dog")
        (tmp_path / to / "<v2>.safetensors").write_bytes(b"of another concept, and not opened")
        assert load_concept(done.files[0], pipe, word="dog").token == "<v1>"
        assert all(torch.equal(again.embeddings[key], x) for key, x in concept.embeddings.items())
        for group in ("deltas", "text_deltas"):
            found, expected = getattr(again, group), getattr(whole, group)
            assert found.keys() == expected.keys()
            assert all(torch.equal(a, b) for key in expected for a, b in zip(found[key], expected[key], strict=True))
        token = load_concept(done.files[1], pipe, word="dog")
        assert token.token == "<v1>" and token.embeddings.keys() == concept.embeddings.keys()
        assert all(torch.equal(token.embeddings[key], x) for key, x in concept.embeddings.items())
        assert any("diffusers takes one for all" in note for note in done.notes) == (to == "kohya-lora")
    pictures = []
    for path in (file, tmp_path / "diffusers-lora" / "out.safetensors"):
        stock = make_sdxl(dtype=torch.float32)
        stock.load_lora_weights(path.parent, weight_name=path.name)
        pictures.append(latents_of(stock))
    torch.testing.assert_close(*pictures, rtol=1e-4, atol=1e-4)
    with pytest.raises(ConceptError, match="a token for two text encoders"):
        convert(concept, "custom-diffusion", tmp_path / "out.bin", pipe=pipe)


def test_the_projection_of_a_text_encoder_is_found_by_diffusers(sdxl, tmp_path):
    """Which stands beside its `text_model`; the loader of kohya's names knows none."""
    rng, paths = torch.Generator().manual_seed(0), ("text_projection", "encoder.layers.0.self_attn.q_proj")
    changes = {f"text_encoder_2.{path}": text_module(sdxl, f"text_encoder_2.{path}").weight.shape for path in paths}
    for key, (outputs, inputs) in changes.items():
        changes[key] = LowRank(torch.randn(2, inputs, generator=rng), torch.randn(outputs, 2, generator=rng))
    concept = Concept("rex", "", "dog", text_deltas=changes)
    for to in reversed(LORAS):
        out = convert(concept, to, tmp_path / f"{to}.safetensors").files[0]
        assert read_concept_file(out).text_deltas.keys() == concept.text_deltas.keys()
    stock = make_sdxl(dtype=torch.float32)
    stock.load_lora_weights(tmp_path, weight_name=out.name)
    pooled = stock.encode_prompt(PROMPT, do_classifier_free_guidance=False)[2]
    stock.unload_lora_weights()
    with torch.no_grad():
        for key, change in changes.items():
            text_module(stock, key).weight.add_(change.up @ change.down)
    torch.testing.assert_close(pooled, stock.encode_prompt(PROMPT, do_classifier_free_guidance=False)[2])


MOST_OF_SDXL = ["to_k", "to_v", "to_q", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1"]
MOST_OF_SDXL += ["conv2", "conv_shortcut", "time_emb_proj", "conv", "linear_1", "linear_2", "conv_in", "conv_out"]


def test_sdxl_has_kohyas_names_for_it(tmp_path):
    """Those of Stability AI's U-Net, which other programs look for; diffusers and our reader find every factor."""
    file = saved(make_sdxl(dtype=torch.float32), tmp_path, unet_targets=MOST_OF_SDXL, rank_pattern={}, alpha_pattern={})
    concept = read_concept_file(file).concept(name="rex", word="dog")
    out = convert(concept, "kohya-lora", tmp_path / "kohya.safetensors").files[0]
    names = {key.partition(".")[0] for key in load_file(out)}
    assert names >= {
        "lora_unet_input_blocks_0_0",
        "lora_unet_input_blocks_3_0_op",
        "lora_unet_input_blocks_4_0_skip_connection",
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k",
        "lora_unet_input_blocks_8_1_transformer_blocks_2_attn2_to_out_0",
        "lora_unet_middle_block_1_proj_in",
        "lora_unet_middle_block_2_emb_layers_1",
        "lora_unet_output_blocks_0_1_transformer_blocks_2_ff_net_0_proj",
        "lora_unet_output_blocks_5_1_transformer_blocks_1_attn2_to_v",
        "lora_unet_output_blocks_5_2_conv",
        "lora_unet_output_blocks_8_0_in_layers_2",
        "lora_unet_out_2",
        "lora_unet_time_embed_2",
        "lora_unet_label_emb_0_0",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1",
        "lora_te2_text_model_encoder_layers_1_self_attn_q_proj",
    }
    assert not any("_blocks" in name and "put_blocks" not in name and "middle" not in name for name in names)
    again = read_concept_file(out)
    for group in ("deltas", "outside", "text_deltas"):
        expected, found = getattr(concept, group), getattr(again, group)
        assert expected and found.keys() == expected.keys()
        for key, change in expected.items():
            assert all(torch.equal(a, b) for a, b in zip(found[key], change, strict=True)), key
    pictures = []
    for path in (file, out):
        stock = make_sdxl(dtype=torch.float32)
        stock.load_lora_weights(tmp_path, weight_name=path.name)
        pictures.append(latents_of(stock))
    torch.testing.assert_close(*pictures, rtol=1e-4, atol=1e-4)


def kohya_names_of(concept, folder):
    out = convert(concept, "kohya-lora", folder / "kohya.safetensors", replace=True).files[0]
    return {key.partition(".")[0] for key in load_file(out)}


def test_sdxl_is_known_by_its_parts(tmp_path):
    mid, first = (
        f"{path}.transformer_blocks.0.attn2" for path in ("mid_block.attentions.0", "up_blocks.0.attentions.0")
    )
    pair, other = (LowRank(torch.ones(1, 6), torch.ones(8, 1)) for _ in range(2))
    wide = LowRank(torch.ones(1, 2048), torch.ones(8, 1))
    sd = Concept("rex", "", "dog", deltas={f"{mid}.to_k": pair})
    text = LowRank(torch.ones(1, 4), torch.ones(4, 1))
    encoder = {"text_encoder.encoder.layers.0.mlp.fc1": text}
    assert kohya_names_of(replace(sd, text_deltas=encoder), tmp_path) == {
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k",
        "lora_te_text_model_encoder_layers_0_mlp_fc1",
    }
    middle = "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_k"
    for changes in (
        {"embeddings": {"text_encoder": torch.ones(1, 4), "text_encoder_2": torch.ones(1, 5)}, "token": "<v1>"},
        {"text_deltas": {"text_encoder_2.encoder.layers.0.mlp.fc1": text}},
        {"deltas": {f"{mid}.to_k": wide}},
        {"deltas": {f"{mid}.to_k": pair, f"{first}.to_q": other}},
        {"deltas": {f"{mid}.to_k": pair, f"{mid.replace('blocks.0', 'blocks.9')}.to_k": other}},
    ):
        assert middle in kohya_names_of(replace(sd, **changes), tmp_path), changes
    of_one = replace(sd, deltas={f"{mid}.to_k": wide}, text_deltas=encoder)
    assert "lora_te1_text_model_encoder_layers_0_mlp_fc1" in kohya_names_of(of_one, tmp_path)


def test_our_own_format_is_the_concept_itself(concept, tmp_path):
    again = Concept.load(converted(concept, "weaver", tmp_path, "--token", "<rex>"))
    assert (again.token, again.word, again.base_hash) == ("<rex>", "dog", concept.base_hash)
    assert all(torch.equal(again.deltas[key], delta) for key, delta in concept.deltas.items())


@pytest.mark.parametrize(
    ("to", "options", "message"),
    [
        (
            "custom-diffusion",
            [],
            "model: Custom Diffusion's files hold whole weights, tell the base model with --model",
        ),
        ("diffusers-lora", ["--rank", "0"], "rank: is 0, expected 1 or more"),
        ("diffusers-lora", ["--out", "rex.bin"], "out: rex.bin must end in .safetensors"),
        ("kohya-lora", ["--token", "../v"], "token '../v' gives no name for a file beside out.safetensors"),
        ("weaver", ["--rank", "4"], "--rank is a LoRA's, there is none in weaver"),
        ("weaver", ["--out", "{there}"], "is there already; give --replace, or another --out"),
    ],
)
def test_what_cannot_be_converted_is_told_in_one_line(concept, tmp_path, capsys, to, options, message):
    file = concept.save(tmp_path / "rex.safetensors")
    options = [option.format(there=file) for option in options]
    out = tmp_path / "made" / "out.safetensors"
    assert main(["bank", "convert", str(file), "--to", to, "--out", str(out), *options]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1 and not out.parent.exists()


def test_what_has_no_place_in_a_layout_is_refused(pipe, concept, tmp_path):
    factors = LowRank(torch.ones(1, 8), torch.ones(8, 1))
    more = replace(concept, outside={"conv_in": factors}, text_deltas={"text_encoder.fc": factors})
    with pytest.raises(
        ConceptError, match="1 changes outside cross-attention and 1 changes of text encoders: .* a LoRA"
    ):
        convert(more, "custom-diffusion", tmp_path / "out.bin", pipe=pipe)
    alone = replace(concept, deltas={})
    with pytest.raises(ConceptError, match="no changes of cross-attention: .* convert it to weaver"):
        convert(alone, "custom-diffusion", tmp_path / "out.bin", pipe=pipe)
    with pytest.raises(ConceptError, match="it is a token alone: a LoRA has none"):
        convert(alone, "kohya-lora", tmp_path / "out.safetensors")
    other = make_pipeline(dtype=torch.float32, seed=3)
    with pytest.raises(ConceptError, match="belongs to another base model"):
        convert(concept, "custom-diffusion", tmp_path / "out.bin", pipe=other)
    assert list(tmp_path.iterdir()) == []


def test_a_token_that_is_not_in_brackets_is_found_again(pipe, concept, tmp_path):
    rex = replace(concept, token="rex")
    done = convert(rex, "custom-diffusion", tmp_path / "rex.bin", pipe=pipe)
    assert done.files[1].name == "<rex>.safetensors" and load_concept(done.files[0], pipe, word="dog").token == "rex"
    with pytest.raises(ConceptError, match="token 'rex' gives no name for a file beside rex.safetensors"):
        convert(rex, "kohya-lora", tmp_path / "rex.safetensors")


@pytest.mark.parametrize("token", ["<v1>", "rex"])
def test_the_token_of_a_lora_comes_back_into_the_bank_by_itself(concept, tmp_path, capsys, token):
    out = converted(replace(concept, token=token), "kohya-lora", tmp_path, name="lora.safetensors")
    capsys.readouterr()
    assert main(["inspect", str(out)]) == 0
    assert f"token {token}: 2 vectors in each text encoder, in {token}.safetensors beside it" in capsys.readouterr().out
    assert main(["bank", "add", str(out), "--word", "dog", "--folder", str(tmp_path / "bank")]) == 0
    told = capsys.readouterr().out
    assert f"{out}: its token {token} was taken from {token}.safetensors beside it\nlora: '{token} dog'" in told
    kept = Concept.load(tmp_path / "bank" / "lora.safetensors")
    assert torch.equal(kept.embeddings["text_encoder"], concept.embeddings["text_encoder"])


def test_a_token_file_of_the_same_vectors_is_no_conflict(concept, tmp_path):
    first = convert(concept, "diffusers-lora", tmp_path / "first.safetensors")
    written = first.files[1].stat().st_mtime_ns
    second = convert(concept, "kohya-lora", tmp_path / "second.safetensors")
    assert second.files[1] == first.files[1] and first.files[1].stat().st_mtime_ns == written
    other = replace(concept, embeddings={"text_encoder": torch.ones(2, 16)})
    for content in ("first.safetensors", None):  # a file of another kind, and another token
        if content:
            first.files[1].write_bytes((tmp_path / content).read_bytes())
        else:
            replaced = convert(other, "diffusers-lora", tmp_path / "first.safetensors", replace=True)
            assert any("<v1>.safetensors: held other vectors, which were" in note for note in replaced.notes)
        with pytest.raises(ConceptError, match="is there already with other vectors; give another folder, an"):
            convert(concept, "kohya-lora", tmp_path / "third.safetensors")
    assert not (tmp_path / "third.safetensors").exists()


def test_a_token_file_that_is_gone_is_missed(concept, tmp_path, capsys):
    out = converted(concept, "diffusers-lora", tmp_path)
    out.with_name("<v1>.safetensors").unlink()
    with pytest.raises(ConceptError, match=r"\(<v1>.safetensors\) is not beside it: put it there, or"):
        load_concept(out, word="dog")
    capsys.readouterr()
    assert main(["inspect", str(out)]) == 0 and "no token: the file of its token (<v1" in capsys.readouterr().out
    assert load_concept(out, word="dog", token="a rex").modifier == ""


def test_no_other_token_is_taken_for_a_loras(concept, tmp_path):
    """Neither another one of the same name, nor one that lies beside a LoRA that had none."""
    out = converted(concept, "diffusers-lora", tmp_path)
    other = replace(concept, embeddings={"text_encoder": concept.embeddings["text_encoder"] + 1})
    second = convert(other, "diffusers-lora", out.with_name("other.safetensors"), replace=True).files[0]
    found = load_concept(second, word="dog").embeddings["text_encoder"]
    assert torch.equal(found, other.embeddings["text_encoder"])
    with pytest.raises(ConceptError, match="<v1>.safetensors beside it holds another token than it was saved with"):
        load_concept(out, word="dog")
    third = convert(replace(concept, embeddings={}, token="sks"), "kohya-lora", out.with_name("plain.safetensors"))
    plain = load_concept(third.files[0], word="dog")
    assert (plain.token, plain.embeddings) == ("", {})


def test_a_header_names_no_file_elsewhere(concept, tmp_path):
    out = converted(concept, "kohya-lora", tmp_path)
    save_file(load_file(out), out, {"concept_weaver_token": "../in/rex"})
    with pytest.raises(ConceptError, match=r"names a token '\.\./in/rex', which no file beside it can have"):
        read_concept_file(out)
