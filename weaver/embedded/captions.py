"""Captions of the embedded world's scenes: what a scene shows, and what a person might say of it."""

from __future__ import annotations

import random
from collections.abc import Sequence

__all__ = ["caption_of", "partial_caption"]

# How often a training caption leaves all animals, some of several animals, or the background out.
_NO_ANIMALS = 0.05
_NOT_ALL_ANIMALS = 0.35
_NO_BACKGROUND = 0.15


def caption_of(animals: Sequence[str], ground: str | None) -> str:
    """The caption that names `animals` ("a dog", "a red cat") from left to right, and the background's words."""
    listing = ", ".join(animals[:-1]) + " and " + animals[-1] if len(animals) > 1 else "".join(animals)
    return ", ".join(part for part in (listing, f"{ground} background" if ground else "") if part)


def partial_caption(animals: Sequence[str], ground: str, rng: random.Random) -> str:
    """A caption to train on: the whole one, or one with animals or the background left out.

    In fusion a concept's own prompt names that concept and not its neighbours (Concept Weaver, section 3.5). A model
    that has seen captions leave things out keeps the neighbours; one that has not paints them over with background.
    """
    if rng.random() < _NO_ANIMALS:
        return caption_of((), ground)
    told = list(animals)
    if len(animals) > 1 and rng.random() < _NOT_ALL_ANIMALS:
        kept = rng.sample(range(len(animals)), rng.randint(1, len(animals) - 1))
        told = [animals[index] for index in sorted(kept)]
    return caption_of(told, None if rng.random() < _NO_BACKGROUND else ground)
