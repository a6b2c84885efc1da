"""Captions of the embedded world's scenes: what a scene shows, and what a person might say of it."""

from __future__ import annotations

import random
from collections.abc import Sequence

__all__ = ["caption_of", "partial_caption"]

# How often a training caption leaves things out, of scenes it can be left out of.
_BACKGROUND_ONLY = 0.05
_SOME_ANIMALS = 0.12
_SOME_ANIMALS_BEFORE = 0.06


def caption_of(animals: Sequence[str], ground: str | None) -> str:
    """The caption that names `animals` ("a dog", "a red cat") from left to right, and the background's words."""
    listing = ", ".join(animals[:-1]) + " and " + animals[-1] if len(animals) > 1 else "".join(animals)
    return ", ".join(part for part in (listing, f"{ground} background" if ground else "") if part)


def partial_caption(animals: Sequence[str], ground: str, rng: random.Random) -> str:
    """A caption to train on: mostly the whole one, at times with animals or the background left out.

    In fusion a concept's own prompt names that concept and not its neighbours (Concept Weaver, section 3.5). A model
    that has seen captions leave things out keeps the neighbours; one that has not paints them over with background.
    """
    kept = sorted(rng.sample(range(len(animals)), rng.randint(1, len(animals))))
    told = [animals[index] for index in kept]
    draw = rng.random()
    if draw < _BACKGROUND_ONLY:
        return caption_of((), ground)
    if draw < _BACKGROUND_ONLY + _SOME_ANIMALS:
        return caption_of(told, None)
    if draw < _BACKGROUND_ONLY + _SOME_ANIMALS + _SOME_ANIMALS_BEFORE:
        return caption_of(told, ground)
    return caption_of(animals, ground)
