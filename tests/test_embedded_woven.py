"""Pictures to learn a concept from as a fusion shows it: what is where, and what the captions say."""

from __future__ import annotations

import numpy as np
import pytest

from weaver.concepts.images import load_images
from weaver.concepts.prompts import names_token
from weaver.embedded.catalog import CONCEPTS, concept_images
from weaver.embedded.drawings import ANIMALS
from weaver.embedded.woven import woven_scenes


def scenes_of(name: str, **options):
    card = CONCEPTS[name]
    pictures = load_images(concept_images(name), card.token, card.word)
    return card, woven_scenes(pictures, card.token, card.word, **options)


@pytest.mark.parametrize("name", CONCEPTS)
def test_the_concept_is_inside_its_mask_and_nowhere_else(name):
    card, scenes = scenes_of(name, count=8)
    assert len(scenes.images) == 8
    for image, template, mask in zip(scenes.images, scenes.templates, scenes.masks, strict=True):
        changed = np.abs(np.asarray(image).astype(int) - np.asarray(template)).max(-1) > 40
        assert 0.02 < mask.mean() < 0.98 and changed[mask].mean() > 0.3
        if card.kind == "background":
            assert changed[~mask].mean() < changed[mask].mean() / 2  # only the rim by which the animals' masks grow
    for own, base in zip(scenes.captions, scenes.base_captions, strict=True):
        assert names_token(own, card.token) and not names_token(base, card.token) and card.word in base
        if card.kind == "animal":  # the own prompt names no neighbour
            assert {word for word in ANIMALS if f"{word} " in f"{own} ".replace(",", " ")} == {card.word}


def test_the_same_seed_gives_the_same_scenes():
    first, second, other = (scenes_of("pug", count=3, seed=seed)[1] for seed in (1, 1, 2))
    assert [image.tobytes() for image in first.images] == [image.tobytes() for image in second.images]
    assert [image.tobytes() for image in first.images] != [image.tobytes() for image in other.images]


def test_words_that_the_world_does_not_know_have_none():
    pictures = load_images(concept_images("pug"), "<pug>", "dog")
    assert woven_scenes(pictures, "<pug>", "castle") is None
