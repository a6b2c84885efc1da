"""Masks of words: from the model's own attention, and from a segmenter."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler
from PIL import Image

from weaver.latents import encode_image
from weaver.masks import attention
from weaver.masks.attention import attention_maps, attention_masks, capture_cross_attention, word_positions
from weaver.masks.compose import MaskError
from weaver.masks.segmenter import segmenter_masks, segmenter_reasons


def picture(size=32):
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8))


def test_every_pass_of_the_model_is_told(tiny_pipe):
    told = []
    image, prompt = picture(), "a dog and a cat, mountain"
    attention_maps(tiny_pipe, image, prompt, ["dog"], progress=lambda *step: told.append(step))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_captured_attention_is_what_the_model_attends_with(tiny_pipe):
    """Values of one-hot rows make attention itself the output of the layer."""
    unet = tiny_pipe.unet
    path = "up_blocks.3.attentions.0.transformer_blocks.0.attn2"
    attn = unet.get_submodule(path)
    seen = {}

    def look(module, args, kwargs):
        seen["hidden"], seen["text"] = args[0], kwargs["encoder_hidden_states"]

    handle = attn.register_forward_pre_hook(look, with_kwargs=True)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 4, 16, 16, generator=generator, dtype=torch.float64)
    text = torch.randn(2, 16, 16, generator=generator, dtype=torch.float64)
    try:
        with torch.no_grad(), capture_cross_attention(unet) as captured:
            unet(z, 500, encoder_hidden_states=text)
    finally:
        handle.remove()
    with torch.no_grad():
        q = attn.head_to_batch_dim(attn.to_q(seen["hidden"]))
        k = attn.head_to_batch_dim(attn.to_k(seen["text"]))
        expected = attn.get_attention_scores(q, k).unflatten(0, (2, attn.heads)).mean(1)
    assert captured[path].shape == (2, 256, 16)
    torch.testing.assert_close(captured[path], expected.float())


def test_capturing_changes_nothing_and_ends(tiny_pipe):
    unet = tiny_pipe.unet
    z, text = torch.ones(1, 4, 16, 16, dtype=torch.float64), torch.ones(1, 16, 16, dtype=torch.float64)
    processors = dict(unet.attn_processors)
    with torch.no_grad():
        plain = unet(z, 500, encoder_hidden_states=text).sample
        with pytest.raises(RuntimeError, match="stop"), capture_cross_attention(unet) as captured:
            assert torch.equal(unet(z, 500, encoder_hidden_states=text).sample, plain)
            assert len(captured) == 16
            raise RuntimeError("stop")
    assert unet.attn_processors == processors
    assert not any(module._forward_pre_hooks for module in unet.modules())


def test_maps_have_mean_one_and_the_size_of_the_latents(tiny_pipe):
    image = picture()
    maps = attention_maps(tiny_pipe, image, "a dog and a cat, beach background", ["cat", "beach background"])
    assert maps.shape == (3, *encode_image(tiny_pipe.vae, image).shape[-2:])
    torch.testing.assert_close(maps.mean((1, 2)), torch.ones(3), atol=0.02, rtol=0)
    again = attention_maps(tiny_pipe, image, "a dog and a cat, beach background", ["cat", "beach background"])
    assert torch.equal(maps, again)


def test_maps_of_pictures_that_are_not_square(tiny_pipe):
    image = picture(64).crop((0, 0, 64, 36))
    assert attention_maps(tiny_pipe, image, "a cat", ["cat"], noise_levels=[0.5]).shape == (2, 18, 32)
    assert attention_masks(tiny_pipe, image, "a cat", ["cat"], noise_levels=[0.5]).shape == (1, 36, 64)


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_maps_do_not_depend_on_the_scheduler(tiny_pipe, kind):
    """Nor on what the pipeline drew with it before."""
    arguments = (picture(), "a dog and a cat", ["dog", "cat"])
    expected = attention_maps(tiny_pipe, *arguments, noise_levels=[0.4])
    own = tiny_pipe.scheduler
    tiny_pipe.scheduler = kind.from_config(own.config)
    try:
        tiny_pipe("a dog", num_inference_steps=2, output_type="latent")
        assert torch.equal(attention_maps(tiny_pipe, *arguments, noise_levels=[0.4]), expected)
    finally:
        tiny_pipe.scheduler = own


def test_masks_of_words_do_not_overlap(tiny_pipe):
    masks = attention_masks(tiny_pipe, picture(), "a dog and a cat", ["dog", "cat"], noise_levels=[0.3])
    assert masks.dtype == torch.bool
    assert masks.shape == (2, 32, 32)
    assert masks.any((1, 2)).all()


def test_a_word_that_is_not_in_the_prompt(tiny_pipe):
    with pytest.raises(MaskError, match="no attention map for 'fox': it is not in the prompt 'a cat'"):
        attention_masks(tiny_pipe, picture(), "a cat", ["fox"])


class Halves:
    """A segmenter that sees cats on the left and on the right, and a dog between them."""

    def __init__(self):
        self.asked = []

    def segment(self, image, words, prompt=None):
        self.asked.append((list(words), prompt))
        sure = np.zeros((len(words), image.height, image.width), dtype=np.float32)
        for k, word in enumerate(words):
            if word == "cat":
                sure[k, :, :10] = sure[k, :, 22:] = 0.9
            if word == "dog":
                sure[k, :, 8:20] = 0.7
        return sure


def test_segmenter_is_asked_each_word_once_and_the_surest_wins():
    segmenter = Halves()
    masks = segmenter_masks(picture(), ["cat", "dog", "cat"], "two cats, a dog", segmenter=segmenter)
    assert segmenter.asked == [(["cat", "dog"], "two cats, a dog")]
    columns = [mask[0].nonzero()[:, 0].tolist() for mask in masks]
    assert columns == [list(range(10)), list(range(10, 20)), list(range(22, 32))]


def test_words_that_the_embedded_segmenter_can_not_know():
    assert segmenter_reasons(["cat", "panda"]) == []
    assert "does not know 'owl', 'cart' (only" in segmenter_reasons(["owl", "cat", "cart"])[0]


def test_segmenter_threshold():
    with pytest.raises(MaskError, match="1 'dog' asked for, .*; nothing was found: use another template"):
        segmenter_masks(picture(), ["dog"], segmenter=Halves(), threshold=0.8)


def test_words_that_are_not_found_are_all_named_with_what_was():
    told = r"1 'fox' and 1 'owl' asked for, .*; nothing of that was found, only 'cat' in box \[0, 0, 32, 32\]"
    with pytest.raises(MaskError, match=told):
        segmenter_masks(picture(), ["fox", "cat", "owl"], segmenter=Halves())


def test_more_concepts_than_objects():
    """What there is is shown, the largest first, as detectors' errors show it."""
    told = (
        r"4 'cat' asked for, each .*; found 'cat' in box \[0, 0, 10, 32\], 'cat' in box \[22, 0, 32, 32\]: use another"
    )
    with pytest.raises(MaskError, match=told):
        segmenter_masks(picture(), ["cat"] * 4, segmenter=Halves())


def test_attention_shows_what_it_found(tiny_pipe, monkeypatch):
    """And a word whose map is nowhere the highest is not found."""
    maps = torch.zeros(3, 16, 16)
    maps[0, 4:12, 2:8] = 1
    monkeypatch.setattr(attention, "attention_maps", lambda *args, **options: maps)
    monkeypatch.setattr(attention, "follow_edges", lambda maps, *args: maps)
    prompt, image = "a dog and a cat", picture(16)
    for words, told in (
        (["dog", "cat"], r"1 'cat' asked for, .*; nothing of that was found, only 'dog' in box \[2, 4, 8, 12\]: use"),
        (["dog"] * 40, r"40 'dog' asked for, .*; found 'dog' in box \[2, 4, 8, 12\]: use another template, give"),
    ):
        with pytest.raises(MaskError, match=told):
            attention_masks(tiny_pipe, image, prompt, words)


def test_layers_count_by_how_well_they_tell_the_words_apart(tiny_pipe, monkeypatch):
    """Of two layers, one sees each word in a half of its own, the other everything everywhere, which says nothing."""
    prompt, words = "dog cat", ["dog", "cat"]
    (dog, cat, _), length = word_positions(tiny_pipe, prompt, words), tiny_pipe.tokenizer.model_max_length
    sharp, flat = torch.ones(1, 64, length), torch.ones(1, 64, length)
    sharp[:, :32, cat] = sharp[:, 32:, dog] = 0

    @contextmanager
    def seen(unet):
        yield {"a": sharp, "b": flat}

    monkeypatch.setattr(attention, "capture_cross_attention", seen)
    monkeypatch.setattr(attention, "layer_size", lambda path, levels, size: (8, 8))
    maps = attention_maps(tiny_pipe, picture(), prompt, words, noise_levels=[0.5])
    assert maps[0, 0].min() == maps[1, -1].min() == 2 and maps[0, -1].max() == maps[1, 0].max() == 0
