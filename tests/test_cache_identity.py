"""What results of an inversion are found by, and which models have none that could be found."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image

from weaver.cache import Cache, inversion_identity, uncacheable_reasons
from weaver.inversion import invert
from weaver.latents import encode_image


@pytest.fixture
def picture():
    return Image.effect_noise((32, 32), 80).convert("RGB")


def test_what_decides_an_inversion_is_in_its_identity(tiny_pipe, picture):
    def identity(image=picture, prompt="a dog", steps=3):
        return inversion_identity(tiny_pipe, image, prompt, steps)

    first = identity()
    assert first == identity(picture.copy())
    dotted = picture.copy()
    dotted.putpixel((3, 3), (1, 2, 3))
    others = [identity(dotted), identity(prompt="a cat"), identity(steps=4), identity(torch.zeros(1, 4, 16, 16))]
    others.append(identity(torch.zeros(1, 4, 16, 16).double()))
    weight = tiny_pipe.unet.conv_in.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0, 0, 0] += 1e-12  # less than float16 knows
    others.append(identity())
    with torch.no_grad():
        weight.copy_(before)
    scheduler = tiny_pipe.scheduler
    tiny_pipe.scheduler = type(scheduler).from_config(scheduler.config, timestep_spacing="trailing")
    others.append(identity())
    tiny_pipe.scheduler = scheduler
    processors = dict(tiny_pipe.unet.attn_processors)
    tiny_pipe.unet.set_attn_processor(AttnProcessor())
    others.append(identity())
    tiny_pipe.unet.set_attn_processor(processors)
    assert identity() == first
    found = [first, *others]
    assert all(a != b for i, a in enumerate(found) for b in found[:i])


def test_a_model_that_is_changed_beside_its_weights_is_not_cached(tiny_pipe, tmp_path, picture):
    unet = tiny_pipe.unet
    assert uncacheable_reasons(tiny_pipe) == []
    hook = unet.conv_in.register_forward_hook(lambda *a: None)
    assert uncacheable_reasons(tiny_pipe) == ["unet.conv_in has forward hooks"]
    inversion = invert(tiny_pipe, picture, "a dog", 1, cache=Cache(tmp_path / "cache"))
    hook.remove()
    assert inversion.identity is None and not (tmp_path / "cache").exists()
    tiny_pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert "FreeU" in uncacheable_reasons(tiny_pipe)[0]
    tiny_pipe.disable_freeu()
    assert uncacheable_reasons(tiny_pipe) == []


@pytest.mark.parametrize("path", ["vae", "vae.encoder.conv_in", "text_encoder", "text_encoder.final_layer_norm"])
@pytest.mark.parametrize("kind", ["hook", "pre-hook"])
def test_hooks_in_any_part_are_not_cached(tiny_pipe, picture, path, kind):
    part, _, rest = path.partition(".")
    module = getattr(tiny_pipe, part).get_submodule(rest)
    register = module.register_forward_hook if kind == "hook" else module.register_forward_pre_hook
    hook = register(lambda *a: None)
    try:
        assert uncacheable_reasons(tiny_pipe) == [f"{path} has forward hooks"]
        assert inversion_identity(tiny_pipe, picture, "a dog", 1) is None
    finally:
        hook.remove()
    assert uncacheable_reasons(tiny_pipe) == []


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_adapters_in_any_part_are_not_cached(tiny_sdxl, part, monkeypatch):
    monkeypatch.setattr(getattr(tiny_sdxl, part), "_hf_peft_config_loaded", True, raising=False)
    assert uncacheable_reasons(tiny_sdxl) == [f"{part} has adapters loaded: fuse them, or unload them"]


def test_attention_processors_of_the_autoencoder_count(tiny_pipe, picture):
    class Own(AttnProcessor):
        pass

    vae, first = tiny_pipe.vae, inversion_identity(tiny_pipe, picture, "a dog", 1)
    before = dict(vae.attn_processors)
    try:
        vae.set_attn_processor(AttnProcessor())
        assert inversion_identity(tiny_pipe, picture, "a dog", 1) != first
        vae.set_attn_processor(Own())
        assert uncacheable_reasons(tiny_pipe) == ["vae has attention processors of its own (Own)"]
    finally:
        vae.set_attn_processor(before)


def test_offload_and_notes_of_hidden_states_are_no_reason(tiny_pipe, tiny_sdxl, monkeypatch):
    for part in (tiny_pipe.unet, tiny_pipe.vae, tiny_pipe.text_encoder):
        monkeypatch.setattr(part, "_hf_hook", object(), raising=False)  # accelerate's, which wraps `forward`
    assert uncacheable_reasons(tiny_pipe) == []
    encoder = tiny_sdxl.text_encoder
    encoder(torch.zeros(1, 4, dtype=torch.long), output_hidden_states=True)
    assert any(module._forward_hooks for module in encoder.modules())  # transformers leaves them there
    assert uncacheable_reasons(tiny_sdxl) == []


def test_tiles_of_the_autoencoder_are_in_the_identity(tiny_pipe):
    picture, vae = Image.effect_noise((64, 48), 80).convert("RGB"), tiny_pipe.vae
    plain, size = inversion_identity(tiny_pipe, picture, "a dog", 1), vae.tile_sample_min_size
    latents = encode_image(vae, picture)
    vae.enable_slicing()  # one picture is one slice
    try:
        assert torch.equal(encode_image(vae, picture), latents)
        assert inversion_identity(tiny_pipe, picture, "a dog", 1) == plain
        vae.enable_tiling()
        assert not torch.equal(encode_image(vae, picture), latents)
        tiled = inversion_identity(tiny_pipe, picture, "a dog", 1)
        vae.tile_sample_min_size = 2 * size
        larger = inversion_identity(tiny_pipe, picture, "a dog", 1)
    finally:
        vae.tile_sample_min_size = size
        vae.disable_tiling()
        vae.disable_slicing()
    assert plain != tiled != larger != plain
    assert inversion_identity(tiny_pipe, picture, "a dog", 1) == plain
