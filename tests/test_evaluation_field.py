"""CLIP, DINO and Detect-and-Compare on tiny networks of the real classes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import make_tokenizer
from PIL import Image

from weaver.errors import WeaverError
from weaver.evaluation.field import (
    FieldModels,
    detect_and_compare,
    field_measures,
    image_alignment,
    inside,
    text_alignment,
)


@pytest.fixture(scope="module")
def models():
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor, ViTConfig, ViTModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    tokenizer = make_tokenizer()
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = size | {"vocab_size": len(tokenizer), "max_position_embeddings": 16}
    text |= {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    text["pad_token_id"] = tokenizer.pad_token_id
    vision = size | {"image_size": 32, "patch_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).eval()
        dino = ViTModel(ViTConfig(**size, image_size=32, patch_size=8), add_pooling_layer=False).eval()
        with torch.no_grad():
            for parameter in [*clip.parameters(), *dino.parameters()]:
                if parameter.ndim > 1:
                    parameter.mul_(10)  # drawn small, they would tell no picture from another
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return FieldModels(
        clip, CLIPProcessor(images, tokenizer), dino, ViTImageProcessorPil(size={"height": 32, "width": 32})
    )


def picture(seed: int, side: int = 40) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.NEAREST)


def test_text_alignment_is_clip_s_own(models):
    pictures, prompts = [picture(1), picture(2)], ["a dog", "a cat on the beach"]
    found = text_alignment(models, pictures, prompts)
    read = models.clip_processor(text=prompts, images=pictures, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = models.clip(**read)
    cosines = output.logits_per_image.diagonal() / models.clip.logit_scale.exp()
    assert found["cosine"] == pytest.approx(cosines.mean().item(), abs=1e-5)
    assert found["score"] == pytest.approx((2.5 * cosines.clamp(min=0)).mean().item(), abs=1e-5)
    with pytest.raises(WeaverError, match="2 pictures for 1 prompts"):
        text_alignment(models, pictures, prompts[:1])


@pytest.mark.parametrize("kind", ["clip", "dino"])
def test_image_alignment_is_the_mean_of_all_pairs(models, kind):
    pictures, references = [picture(1), picture(2)], [picture(3), picture(4), picture(5)]
    pairs = [image_alignment(models, [one], [other], kind) for one in pictures for other in references]
    assert image_alignment(models, pictures, references, kind) == pytest.approx(np.mean(pairs), abs=1e-5)
    assert image_alignment(models, pictures[:1], pictures[:1], kind) == pytest.approx(1, abs=1e-5)
    assert min(pairs) < 0.999


def test_dino_reads_the_class_token(models):
    middle = picture(1, 37).crop((2, 2, 34, 34))  # 256 / 224 of 32 pixels, and the middle of that
    pixels = models.dino_processor([middle], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        token = models.dino(pixel_values=pixels).last_hidden_state[0, 0]
    assert torch.allclose(models.pictures([picture(1, 37)], "dino")[0], token / token.norm(), atol=1e-5)


@pytest.mark.parametrize("kind", ["clip", "dino"])
@pytest.mark.parametrize("upright", [False, True])
def test_of_a_picture_that_is_no_square_the_middle_counts_alone(models, kind, upright):
    def features(margin: str, middle: str = "blue") -> torch.Tensor:
        wide = Image.new("RGB", (120, 40), "white")
        wide.paste(margin, (0, 0, 20, 40))
        wide.paste(middle, (50, 10, 70, 20))
        return models.pictures([wide.rotate(90, expand=True) if upright else wide], kind)

    assert torch.allclose(features("red"), features("green"), atol=1e-6)
    assert not torch.allclose(features("red"), features("red", "black"), atol=1e-3)


def test_inside_a_mask_nothing_else_counts():
    image, mask = picture(1), np.zeros((40, 40), bool)
    mask[10:30, 5:15] = True
    part = inside(image, mask)
    assert part.size == (20, 20)  # 20 high, 10 wide, on a square
    changed = np.asarray(image).copy()
    changed[~mask] = 7
    assert inside(Image.fromarray(changed), mask).tobytes() == part.tobytes()
    assert np.asarray(part)[0, 0].tolist() == [128] * 3
    assert np.array_equal(np.asarray(part)[:, 5:15], np.asarray(image)[10:30, 5:15])


def test_masks_that_show_nothing_are_told():
    with pytest.raises(WeaverError, match="mask is empty"):
        inside(picture(1), np.zeros((40, 40)))
    with pytest.raises(WeaverError, match=r"the mask is \(8, 8\), the picture \(40, 40\)"):
        inside(picture(1), np.ones((8, 8)))


def test_detect_and_compare_tells_right_from_mixed_and_missing(models):
    one, other = picture(1), picture(9)
    references = [[one], [other]]
    right = detect_and_compare(models, [one, other], references)
    assert right == pytest.approx(1, abs=1e-4)
    assert detect_and_compare(models, [other, one], references) == pytest.approx(right, abs=1e-6)  # in any order
    twice = detect_and_compare(models, [one, one], references)
    similar = image_alignment(models, [one], [other], "dino")
    assert twice == pytest.approx(1 - 2 * (1 - similar) ** 2, abs=1e-4)
    for found in ([one], [one, other, picture(5)], []):  # one too few, one too many, none
        assert detect_and_compare(models, found, references) == 0.0
    with pytest.raises(WeaverError, match="no references"):
        detect_and_compare(models, [one], [])


def test_detect_and_compare_follows_its_equation(models):
    sets, found = [[picture(1), picture(2)], [picture(3)]], [picture(4), picture(5)]

    def mean(of: list, to: list) -> float:
        return sum(image_alignment(models, [a], [b], "dino") for a in of for b in to) / len(of) / len(to)

    truth = np.array([[mean(a, b) for b in sets] for a in sets])  # a picture with itself among the pairs
    rows = np.array([[mean([one], b) for b in sets] for one in found])
    first = int(rows[:, 0].argmax())  # the first set chooses first
    expected = 1 - ((rows[[first, 1 - first]] - truth) ** 2).sum()
    assert detect_and_compare(models, found, sets) == pytest.approx(expected, abs=1e-4)
    assert truth[0, 0] < 1 - 1e-3


def test_models_are_loaded_by_their_names(models, tmp_path):
    for name, parts in {
        "clip": (models.clip, models.clip_processor),
        "dino": (models.dino, models.dino_processor),
    }.items():
        for part in parts:
            part.save_pretrained(tmp_path / name)
    loaded = FieldModels.load(str(tmp_path / "clip"), str(tmp_path / "dino"), device="cpu", offline=True)
    for kind in ("clip", "dino"):
        assert torch.allclose(loaded.pictures([picture(1)], kind), models.pictures([picture(1)], kind), atol=1e-5)
    assert torch.allclose(loaded.texts(["a dog"]), models.texts(["a dog"]), atol=1e-5)
    with pytest.raises(WeaverError, match="nowhere' can't be loaded as CLIPModel"):
        FieldModels.load(str(tmp_path / "nowhere"), str(tmp_path / "dino"), device="cpu", offline=True)


def test_unknown_features_are_told(models):
    with pytest.raises(WeaverError, match="'vgg', expected clip or dino"):
        models.pictures([picture(1)], "vgg")
    with pytest.raises(WeaverError, match="no picture"):
        models.pictures([], "clip")


def test_a_picture_s_measures_say_whether_they_are_of_the_whole_or_inside_masks(models):
    image, own = picture(1), {"rex": [picture(2), picture(3)], "tom": [picture(4)]}
    masks = {name: np.zeros((40, 40)) for name in own}
    masks["rex"][:, :20], masks["tom"][10:30, 20:] = 1, 1
    whole = field_measures(models, image, "a dog", own)
    assert set(whole) == {"clip_text", "clip_score", "clip_image", "dino_image"}
    assert whole["clip_text"] == text_alignment(models, [image], ["a dog"])["cosine"]
    assert whole["dino_image"]["rex"] == image_alignment(models, [image], own["rex"], "dino")
    found = field_measures(models, image, "a dog", own, masks)
    parts = [inside(image, masks[name]) for name in own]
    assert found["clip_image_inside_mask"]["tom"] == image_alignment(models, parts[1:], own["tom"])
    assert found["dino_image_inside_mask"]["rex"] == image_alignment(models, parts[:1], own["rex"], "dino")
    assert found["detect_and_compare"] == detect_and_compare(models, parts, list(own.values()))
    assert {name: found[name] for name in whole} == whole
