"""Masks from a segmenter that is asked by words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from weaver.masks.components import assign_objects, tidy
from weaver.masks.compose import MaskError

__all__ = ["Segmenter", "segmenter_masks", "segmenter_reasons"]


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


def segmenter_masks(
    image: Image.Image,
    words: Sequence[str],
    prompt: str | None = None,
    *,
    segmenter: Segmenter | None = None,
    threshold: float = 0.5,
) -> torch.Tensor:
    """Find the object of every class word in a picture.

    A pixel belongs to the word that the segmenter is surest of there, if it is at least `threshold` sure. A word that
    stands k times in `words` is cut into k objects, left to right. Specks are dropped and holes filled.

    Parameters
    ----------
    prompt : what the picture shows, for segmenters that know what to do with it; None seeks every word by itself.
    segmenter : None for the embedded one, which knows the words of the embedded world.

    Returns [N, height, width] bool, one for each of `words`. Raises `MaskError` when a word is not found, or holds
    too few objects.
    """
    if segmenter is None:
        from weaver.embedded.segmenter import load_segmenter

        segmenter = load_segmenter()
    labels = list(dict.fromkeys(words))
    sure = torch.from_numpy(np.asarray(segmenter.segment(image, labels, prompt)))
    masks = (sure >= threshold) & (sure.argmax(0)[None] == torch.arange(len(labels))[:, None, None])
    if absent := [repr(label) for label, mask in zip(labels, masks, strict=True) if not mask.any()]:
        raise MaskError(
            f"no {' and no '.join(absent)} was found in the template: use another template seed or prompt, "
            "or give a box or a mask file"
        )
    return assign_objects(torch.stack([tidy(mask) for mask in masks]), words, labels)
