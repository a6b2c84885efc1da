"""The drawn world: scenes, captions, masks, and what is held out of it."""

import random

import numpy as np
import pytest
from PIL import Image

from weaver.embedded.backgrounds import BACKGROUNDS, HELD_OUT_BACKGROUNDS, draw_background
from weaver.embedded.catalog import CONCEPTS, card_of, concept_images, concept_scenes
from weaver.embedded.crops import CROP_SIZE, crop_region
from weaver.embedded.drawings import (
    ANIMALS,
    DRAWINGS,
    HELD_OUT_VENDORS,
    LINE_DRAWINGS,
    TRAINING_VENDORS,
    load_sprite,
    vendors_of,
)
from weaver.embedded.render_sprites import fill_fields
from weaver.embedded.repaint import PALETTE, repaint_sprite
from weaver.embedded.training.tokenizer import MAX_TOKENS, build_tokenizer
from weaver.embedded.training.vary import vary_drawing
from weaver.embedded.world import IMAGE_SIZE, SceneObject, draw_scene
from weaver.errors import WeaverError


def test_world_is_as_wide_as_promised():
    assert len(ANIMALS) >= 6 and len(BACKGROUNDS) >= 4
    assert not set(TRAINING_VENDORS) & set(HELD_OUT_VENDORS)
    animals = {card.word for card in CONCEPTS.values() if card.kind == "animal"}
    grounds = {card.source for card in CONCEPTS.values() if card.kind == "background"}
    assert len(animals) >= 4 and len(grounds) >= 2
    assert {card.source for card in CONCEPTS.values() if card.kind == "animal"} <= set(HELD_OUT_VENDORS)
    assert grounds <= set(HELD_OUT_BACKGROUNDS)


@pytest.mark.parametrize("vendor", DRAWINGS)
def test_every_drawing_ships(vendor):
    for animal in DRAWINGS[vendor]:
        sprite = load_sprite(vendor, animal)
        assert sprite.mode == "RGBA" and max(sprite.size) > 120
        assert np.asarray(sprite)[..., 3].max() == 255


@pytest.mark.parametrize("vendor", LINE_DRAWINGS)
def test_line_drawings_have_a_white_a_field(vendor):
    for animal in LINE_DRAWINGS[vendor]:
        pixels = np.asarray(load_sprite(vendor, animal))
        inside = pixels[..., 3] == 255
        assert (inside | (pixels[..., 3] == 0)).all()
        tones, areas = np.unique(pixels[inside][:, 0], return_counts=True)
        assert tones[0] == 0 and set(tones[1:]) <= set(range(200, 256))
        assert areas[1:].sum() > 0.05 * inside.sum(), "its outline is not closed"


def test_fields_of_a_line_drawing_are_what_its_lines_enclose():
    lines = np.zeros((20, 30, 4), np.uint8)
    lines[2:18, 2:28, 3] = 255  # a frame that holds a large and a small field
    lines[4:16, 4:18, 3] = 0
    lines[4:16, 20:26, 3] = 0
    filled = np.asarray(fill_fields(Image.fromarray(lines, "RGBA")))
    assert (filled[..., 3] == 255).sum() == 16 * 26 and filled[0, 0, 3] == 0
    assert len({tuple(filled[y, x]) for y, x in ((2, 2), (5, 5), (5, 22))}) == 3
    assert (filled[4:16, 4:18, :3] == filled[5, 5, :3]).all() and filled[2, 2, 0] == 0


def test_a_varied_line_drawing_is_painted():
    animal = SceneObject("cat", None, "lucide", repainted=False)
    pixels = np.asarray(vary_drawing(load_sprite("lucide", "cat"), animal, random.Random(3)))
    assert np.ptp(pixels[pixels[..., 3] == 255][:, :3].astype(int), axis=1).max() > 10  # no longer black and white


def test_same_seed_same_scene():
    first, second, other = (draw_scene(random.Random(seed)) for seed in (4, 4, 5))
    assert first.caption == second.caption and first.image.tobytes() == second.image.tobytes()
    assert (first.labels == second.labels).all()
    assert first.image.tobytes() != other.image.tobytes()


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_object_is_seen(count):
    for seed in range(20):
        scene = draw_scene(random.Random(seed), count=count)
        assert scene.image.size == (IMAGE_SIZE, IMAGE_SIZE) and len(scene.objects) == count
        assert set(np.unique(scene.labels)) == set(range(count + 1))
        assert all(scene.mask(index).sum() > 60 for index in range(count))


def test_objects_touch_and_repeat():
    scenes = [draw_scene(random.Random(seed), count=2) for seed in range(60)]
    assert any(scene.objects[0].word == scene.objects[1].word for scene in scenes)
    touching = [np.roll(scene.mask(0), 1, 1) & scene.mask(1) for scene in scenes]
    assert any(mask.any() for mask in touching)


def test_caption_tells_what_is_drawn():
    told = 0
    for seed in range(40):
        scene = draw_scene(random.Random(seed))
        for animal in scene.objects:
            assert animal.word in scene.caption
            if animal.colour:
                told += 1
                assert f"{animal.colour} {animal.word}" in scene.caption and animal.repainted
        assert scene.caption.endswith(f"{scene.background} background")
    assert told > 5


def test_training_captions_leave_things_out_but_say_nothing_false():
    rng, told = random.Random(0), []
    scene = draw_scene(rng, animals=["cat", "panda", "dog"], background="beach", varied=False)
    for _ in range(400):
        caption = scene.training_caption(rng)
        assert set(caption.replace(",", "").split()) <= {"a", "and", "cat", "panda", "dog", "beach", "background"}
        told.append(caption)
    assert told.count(scene.caption) > 200  # mostly the whole truth
    assert {"beach background", "a panda", "a cat and a dog", "a cat, beach background"} <= set(told)
    assert "a dog and a cat" not in told  # always from left to right


def test_training_scenes_never_show_what_is_held_out():
    for seed in range(200):
        scene = draw_scene(random.Random(seed))
        assert scene.background in BACKGROUNDS
        assert {animal.vendor for animal in scene.objects} <= set(TRAINING_VENDORS)


def test_concept_scenes_show_the_concept_only():
    for name, card in CONCEPTS.items():
        for scene in concept_scenes(name, 4):
            if card.kind == "animal":
                assert [(a.word, a.vendor, a.repainted) for a in scene.objects] == [(card.word, card.source, False)]
            else:
                assert scene.background == card.source


@pytest.mark.parametrize("name", CONCEPTS)
def test_concept_pictures_ship_with_captions(name):
    pictures = sorted(concept_images(name).glob("*.png"))
    assert 5 <= len(pictures) <= 8
    for path in pictures:
        with Image.open(path) as image:
            assert image.size == (IMAGE_SIZE, IMAGE_SIZE)
        assert "{token} {word}" in path.with_suffix(".txt").read_text()


def test_unknown_concept_names_the_choices():
    with pytest.raises(WeaverError, match="no embedded concept is called 'unicorn'.*tuxedo-cat"):
        card_of("unicorn")


def test_repainting_changes_colours_not_outlines():
    for animal in ANIMALS:
        for vendor in vendors_of(animal):
            plain = np.asarray(load_sprite(vendor, animal))
            blue = np.asarray(repaint_sprite(vendor, animal, random.Random(0), "blue", None))
            assert (plain[..., 3] == blue[..., 3]).all()
            solid = plain[..., 3] > 200
            near = np.abs(blue[solid, :3].astype(int) - PALETTE["blue"]).max(1) < 70
            assert near.mean() > 0.15


def test_held_out_backgrounds_differ_from_their_class():
    for name, (word, _) in HELD_OUT_BACKGROUNDS.items():
        held_out, plain = (np.asarray(draw_background(kind, random.Random(1), 64), float) for kind in (name, word))
        assert np.abs(held_out - plain).mean() > 30


def test_every_word_is_one_token():
    tokenizer = build_tokenizer()
    words = [*ANIMALS, *BACKGROUNDS, *PALETTE, "a", "an", "and", "background"]
    assert all(len(tokenizer.tokenize(word)) == 1 for word in words)
    longest = draw_scene(random.Random(0), animals=["dog"] * 4).caption
    assert len(tokenizer(longest).input_ids) <= MAX_TOKENS
    assert tokenizer.decode(tokenizer("a blue dog").input_ids, skip_special_tokens=True).strip() == "a blue dog"


def test_crop_is_the_masked_object_on_grey():
    image = Image.new("RGB", (64, 64), (255, 0, 0))
    mask = np.zeros((64, 64), bool)
    mask[10:30, 20:40] = True
    crop = crop_region(image, mask)
    assert crop.shape == (3, CROP_SIZE, CROP_SIZE)
    assert (crop[0] == 1).all() and (crop[1] == -1).all()
    whole = crop_region(image, mask, whole=True)
    assert abs(whole[:, 0, 0]).max() < 0.01
    with pytest.raises(ValueError, match="mask is empty"):
        crop_region(image, np.zeros((64, 64)))
    with pytest.raises(ValueError, match=r"mask is \(32, 32\), the picture \(64, 64\)"):
        crop_region(image, np.ones((32, 32)))
