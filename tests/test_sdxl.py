"""SDXL outside of `attach`: prompts, inversion, features, the cache, masks by words, `weave`, and what they cost."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from paper_reference import encode as reference_encode
from PIL import Image
from pipeline_forms import full_mask, make
from tiny_sdxl import make_sdxl

from weaver import Concept, WeaverError, weave
from weaver.cache import Cache, inversion_identity
from weaver.concepts.concept import attn2_hash
from weaver.concepts.encoding import encode
from weaver.conditioning import make_time_ids
from weaver.defaults import defaults_for
from weaver.features import collect_features, reconstruction_psnr
from weaver.fusion import ConceptUse, FusionPlan, attach, sample_fusion
from weaver.inversion import invert
from weaver.latents import decode_latents
from weaver.layers import SDXL, InjectionSites, site_reasons, sites_for
from weaver.masks.attention import attention_maps
from weaver.schedule import ddim_scheduler

SITES = InjectionSites("some", resnets=(1,), attentions=(1, 4), resnet_window=0.6, attention_window=0.4)


@pytest.fixture
def picture():
    levels = torch.randint(256, (48, 32, 3), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    return Image.fromarray(levels.numpy())


@pytest.mark.parametrize("zeros", [True, False], ids=["zeros", "empty"])
@pytest.mark.parametrize(
    "prompt", ["a dog and a cat", "", None, "a dog and " * 8], ids=["some", "empty", "none", "cut"]
)
def test_prompts_are_encoded_as_the_pipeline_does(tiny_sdxl, prompt, zeros):
    """As the negative prompt, which may be none at all."""
    pipe = make(type(tiny_sdxl), tiny_sdxl, force_zeros_for_empty_prompt=zeros)
    _, text, _, pooled = pipe.encode_prompt("a fox", device="cpu", negative_prompt=prompt)
    found = encode(pipe, prompt)
    assert torch.equal(found.text, text) and torch.equal(found.pooled, pooled)
    assert bool(found.pooled.any()) == (prompt is not None or not zeros)


def test_a_token_stands_in_both_encoders(tiny_sdxl, concepts_sdxl):
    prompt = "a <v1> dog, mountain"
    for ours, by_hand in zip(
        encode(tiny_sdxl, prompt, concepts_sdxl[0]), reference_encode(tiny_sdxl, prompt, concepts_sdxl[0]), strict=True
    ):
        torch.testing.assert_close(ours, by_hand)
    for name in ("text_encoder", "text_encoder_2"):
        assert not getattr(tiny_sdxl, name).get_input_embeddings()._forward_hooks


def test_a_concept_file_holds_both_embeddings(tiny_sdxl, concepts_sdxl, tmp_path):
    concept = Concept.load(concepts_sdxl[0].save(tmp_path / "dog.safetensors"))
    concept.check_base(tiny_sdxl)
    assert concept.embeddings.keys() == {"text_encoder", "text_encoder_2"}


def test_inversion_is_ddim_run_backwards_with_the_prompts_conditions(tiny_sdxl, picture):
    """Each step is the DDIM step between the same two noise levels, solved the other way round."""
    inversion = invert(tiny_sdxl, picture, "a dog", 5)
    levels, x = tiny_sdxl.scheduler.alphas_cumprod, inversion.z_0
    text, _, pooled, _ = tiny_sdxl.encode_prompt("a dog", device="cpu", do_classifier_free_guidance=False)
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[48, 32, 0, 0, 48, 32]]).double()}
    for i in range(5):
        t = 1 + 200 * i
        low, high = (levels[t - 200] if i else levels[0]), levels[t]
        with torch.no_grad():
            eps = tiny_sdxl.unet(x, t, text, added_cond_kwargs=added).sample
        x = high**0.5 * (x - (1 - low) ** 0.5 * eps) / low**0.5 + (1 - high) ** 0.5 * eps
        torch.testing.assert_close(inversion.latents[i + 1 : i + 2], x, rtol=1e-9, atol=1e-9)


def test_more_steps_reconstruct_better(tiny_sdxl):
    """The error of DDIM inversion falls with the number of steps, under the prompt's own conditions and no others."""
    z = 0.2 * torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    found = []
    for steps in (5, 30):
        inversion = invert(tiny_sdxl, z, "a dog", steps)
        features = collect_features(tiny_sdxl, inversion, InjectionSites("none"))
        found.append(reconstruction_psnr(tiny_sdxl, inversion, features))
    assert found[1] > found[0] + 6, found


def test_the_cache_knows_time_ids_and_second_encoder(tiny_sdxl, picture, tmp_path):
    cache = Cache(tmp_path, features=True)
    cold = invert(tiny_sdxl, picture, "a dog", 3, cache=cache)
    expected = collect_features(tiny_sdxl, cold, SITES, cache=cache)
    warm = invert(tiny_sdxl, picture, "a dog", 3, cache=cache)
    features = collect_features(tiny_sdxl, warm, SITES, cache=cache)
    assert warm.cached and features.cached and not cold.cached
    for name in ("latents", "pooled", "time_ids"):
        assert torch.equal(getattr(warm, name), getattr(cold, name))
    assert torch.equal(features.time_ids, expected.time_ids)
    assert not invert(tiny_sdxl, picture, "a dog", 3, time_ids=(64, 64, 0, 0, 48, 32), cache=cache).cached

    def identity():
        return inversion_identity(tiny_sdxl, picture, "a dog", 3, time_ids=cold.time_ids)

    assert identity() == cold.identity and len(identity()["tokens"]) == 2
    weight = tiny_sdxl.text_encoder_2.text_projection.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] += 1e-12
    assert identity() != cold.identity
    with torch.no_grad():
        weight.copy_(before)
    tokenizer = tiny_sdxl.tokenizer_2
    tiny_sdxl.tokenizer_2 = lambda *_, **__: tokenizer("a cat")
    assert identity() != cold.identity
    tiny_sdxl.tokenizer_2 = tokenizer


@pytest.mark.parametrize("time_ids", [(32, 32), (32, 32, 0, 0, 32, "32")], ids=["two", "text"])
def test_odd_time_ids_are_an_error(tiny_sdxl, picture, time_ids):
    with pytest.raises(WeaverError, match="time_ids: is .*expected 6 numbers"):
        invert(tiny_sdxl, picture, "a dog", 1, time_ids=time_ids)


def test_time_ids_are_the_pipelines(tiny_sdxl, tiny_pipe):
    text = torch.zeros(1, 16, 40, dtype=torch.bfloat16)
    found = make_time_ids(tiny_sdxl, (1001, 777), text, (1500, 999, 3, 5, 1001, 777))
    size, crop, target = (1500, 999), (3, 5), (1001, 777)
    assert torch.equal(found, tiny_sdxl._get_add_time_ids(size, crop, target, text.dtype, 10))
    assert make_time_ids(tiny_pipe, (32, 32), text) is None


def test_words_are_found_in_a_picture(tiny_sdxl, picture):
    maps = attention_maps(tiny_sdxl, picture, "a dog and a cat, beach", ["cat", "beach"])
    assert maps.shape == (3, 24, 16)
    torch.testing.assert_close(maps.mean((1, 2)), torch.ones(3), atol=0.02, rtol=0)


def test_a_whole_run_of_the_library(tiny_sdxl, concepts_sdxl):
    assert defaults_for(tiny_sdxl).sites is SDXL
    masks = torch.zeros(1, 32, 32)
    masks[0, 8:24, 8:24] = 1
    uses = [ConceptUse(concepts_sdxl[0])]
    results = [
        weave(tiny_sdxl, "a dog, mountain", uses, masks=masks, steps=2, template_steps=2, negative_prompt=negative)
        for negative in (None, "")
    ]
    assert [result.prompts for result in results] == [
        (p, "a dog, mountain", "a <v1> dog, mountain") for p in (None, "")
    ]
    assert results[0].image.size == (32, 32) and results[0].settings["injection"]["sites"] == "sdxl"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lower_precision(tiny_sdxl, concepts_sdxl, dtype):
    """Every stage in the model's own dtype, near what float64 gives and what the pipeline gives under `attach`.

    In float32 those are the same numbers. In bfloat16 the scheduler rounds what ours counts in float32.
    """
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))

    def draw(pipe):
        features = collect_features(pipe, invert(pipe, z, "a dog", 2), SITES)
        concept = dataclasses.replace(concepts_sdxl[0], base_hash=attn2_hash(pipe.unet))
        uses, amounts = [ConceptUse(concept)], {"suppression": 0.2, "guidance": 2.0}
        plan = FusionPlan.build(pipe, uses, full_mask(), prompt="a dog", features=features, **amounts)
        ours = sample_fusion(pipe.unet, features.z_T, ddim_scheduler(pipe.scheduler), plan)
        with attach(pipe, plan):
            stock = pipe(**plan.pipeline_arguments(), output_type="latent").images
        assert torch.equal(ours, stock) if ours.dtype != torch.bfloat16 else error(ours, stock) < 0.03
        return ours

    def error(ours, truth):
        return (ours.double() - truth.double()).norm() / (truth.double() - z).norm()

    truth, ours = draw(tiny_sdxl), draw(make_sdxl(dtype=dtype))
    assert ours.dtype == dtype
    assert error(ours, truth) < (1e-5 if dtype == torch.float32 else 0.1)


def test_half_precision_decodes_in_float32_where_the_model_says_so(tiny_sdxl, picture):
    """SDXL's autoencoder overflows in float16; here a scale is so large that this one does too."""
    from diffusers import AutoencoderKL

    from weaver.latents import encode_image

    vae = AutoencoderKL.from_config(tiny_sdxl.vae.config, force_upcast=True)
    torch.manual_seed(0)
    for parameter in vae.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    vae.decoder.conv_in.weight.data *= 1e4
    vae.half().eval()
    z = torch.randn(1, 4, 8, 8).half()
    wide = AutoencoderKL.from_config(vae.config)
    wide.load_state_dict({name: value.float() for name, value in vae.state_dict().items()})
    with torch.no_grad():
        assert not vae.decode(z / vae.config.scaling_factor)[0].isfinite().all()
    found, latents = decode_latents(vae, z), encode_image(vae, picture)
    assert torch.equal(found, decode_latents(wide, z)) and found.isfinite().all()
    assert torch.equal(latents, (encode_image(wide, picture) / 0.18215).half() * 0.18215)
    assert vae.dtype == latents.dtype == torch.float16
    with pytest.raises(RuntimeError):
        decode_latents(vae, z[:, :3])
    assert vae.dtype == torch.float16


def test_latents_are_normalised_as_the_pipeline_does(tiny_sdxl):
    """By mean and standard deviation where the autoencoder has them."""
    moments = {"latents_mean": [0.5, -0.25, 0.0, 1.0], "latents_std": [2.0, 0.5, 1.0, 3.0]}
    before = {name: tiny_sdxl.vae.config.get(name) for name in moments}
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    tiny_sdxl.vae.register_to_config(**moments)
    try:
        arguments = {"prompt": "a dog", "num_inference_steps": 1, "latents": z}
        end = tiny_sdxl(**arguments, output_type="latent").images
        pixels = tiny_sdxl(**arguments, output_type="pt").images
        torch.testing.assert_close(decode_latents(tiny_sdxl.vae, end).div(2).add(0.5).clamp(0, 1), pixels)
    finally:
        tiny_sdxl.vae.register_to_config(**before)


CONFIG = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def test_the_sites_of_sdxl_and_the_memory_they_take():
    """Of the real model without its weights, from the shapes of one pass: what the table's documentation says."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**CONFIG).half()
    assert sites_for(unet) is SDXL is sites_for("sdxl") and site_reasons(unet, SDXL) == []
    attentions = SDXL.attention_modules(unet)
    assert len(attentions) == 12 and SDXL.resnet_modules() == ["up_blocks.0.resnets.1.conv2"]
    taken: dict[str, int] = {}

    def note(path):
        return lambda module, args, output: taken.update({path: math.prod(output.shape) * output.element_size()})

    for path in [*SDXL.resnet_modules(), *(f"{path}.{name}" for path in attentions for name in ("to_q", "to_k"))]:
        unet.get_submodule(path).register_forward_hook(note(path))
    half = {"dtype": torch.float16, "device": "meta"}
    added = {"text_embeds": torch.zeros(1, 1280, **half), "time_ids": torch.zeros(1, 6, **half)}
    with torch.no_grad():
        unet(torch.zeros(1, 4, 128, 128, **half), 1, torch.zeros(1, 77, 2048, **half), added_cond_kwargs=added)
    resnet = taken.pop("up_blocks.0.resnets.1.conv2")
    deep, fine = (sum(n for p, n in taken.items() if p.startswith(f"up_blocks.{block}.")) for block in (0, 1))
    assert [round(n / 1e6, 2) for n in (resnet, deep, fine)] == [2.62, 52.43, 20.97]
    assert round((SDXL.resnet_steps(50) * resnet + SDXL.attention_steps(50) * (deep + fine)) / 1e6) == 1940
