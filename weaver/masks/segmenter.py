"""Masks from a segmenter that is asked by words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from weaver.masks.assign import Found, Wish, assigned_masks
from weaver.masks.components import found_in, tidy

__all__ = ["Segmenter", "segmenter_masks", "segmenter_objects", "segmenter_reasons"]


class Segmenter(Protocol):
    """Anything that finds words in a picture."""

    def segment(self, image: Image.Image, words: Sequence[str], prompt: str | None = None) -> np.ndarray:
        """How sure it is, per word and pixel: [K, height, width] float in 0..1. `prompt` tells what the image shows."""
        ...


def segmenter_reasons(words: Sequence[str]) -> list[str]:
    """Which words the embedded segmenter can't find in any picture; empty when it knows them all."""
    from weaver.embedded.drawings import ANIMALS

    unknown = [repr(word) for word in words if word not in ANIMALS]
    if not unknown:
        return []
    known = ", ".join(ANIMALS)
    return [f"the segmenter does not know {', '.join(unknown)} (only {known}): give a mask file, a box or another word"]


def segmenter_masks(image: Image.Image, words: Sequence[str], prompt: str | None = None, **options) -> torch.Tensor:
    """Find the object of every class word in a picture.

    A word that stands k times in `words` gets k objects, left to right; they are found as `segmenter_objects` says,
    whose `options` are segmenter and threshold.

    Returns [N, height, width] bool, one for each of `words`. Raises `MaskError`, which shows what was found, when a
    word is not found, or holds too few objects.
    """
    wishes = [Wish(word) for word in words]
    return assigned_masks(segmenter_objects(image, wishes, prompt, **options), wishes)


def segmenter_objects(
    image: Image.Image,
    wishes: Sequence[Wish],
    prompt: str | None = None,
    *,
    segmenter: Segmenter | None = None,
    threshold: float = 0.5,
) -> list[Found]:
    """Find every object in a picture that wishes may mean; `weaver.masks.assign` tells which is whose.

    A pixel belongs to the word that the segmenter is surest of there, if it is at least `threshold` sure. Specks are
    dropped, holes filled, and a mask is cut into objects where several are asked for (`found_in`).

    Parameters
    ----------
    wishes : each with a word
    prompt : what the picture shows, for segmenters that know what to do with it; None seeks every word by itself.
    segmenter : None for the embedded one, which knows the words of the embedded world.
    threshold : 0..1
    """
    if segmenter is None:
        from weaver.embedded.segmenter import load_segmenter

        segmenter = load_segmenter()
    words = list(dict.fromkeys(wish.word for wish in wishes))
    sure = torch.from_numpy(np.asarray(segmenter.segment(image, words, prompt)))
    masks = (sure >= threshold) & (sure.argmax(0)[None] == torch.arange(len(words))[:, None, None])
    return found_in(torch.stack([tidy(mask) for mask in masks]), words, wishes)
