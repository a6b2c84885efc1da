"""What is measured of a picture of the embedded world, without any network: presence, identity, leakage, structure.

Identity is told by the one classifier of the embedded world (`weaver.embedded.identity`), by its nearest drawing of
all: a region that looks like the base model's own cat is no tuxedo cat, and neither is one that looks like a dog.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from weaver.embedded.catalog import card_of
from weaver.embedded.drawings import ANIMALS
from weaver.embedded.identity import identity_of, score, similarities
from weaver.embedded.segmenter import load_segmenter
from weaver.errors import WeaverError
from weaver.masks.components import split_objects, tidy
from weaver.masks.compose import MaskError
from weaver.masks.shapes import connected_components, dilate

__all__ = ["ConceptMeasure", "Measures", "edge_iou", "find_animals", "mask_iou", "measure", "psnr_outside"]

LEAST_PIXELS = 40
"""Of an object, of 64 x 64: about a hundredth of the picture."""
_STRAY_PIXELS = 100  # a third of the smallest animals: what stands out of a mask is no animal of its own
_EDGE = 0.1  # of a step of luminance from black to white
_REST = 2  # pixels around animals that belong to neither side: outlines


@dataclass(frozen=True)
class ConceptMeasure:
    """One concept in one picture.

    Parameters
    ----------
    name : of the concept
    kind : "animal" or "background"
    present : the segmenter, told nothing, sees an animal in at least half of its region; a background always is
    right : it is present, and of all drawings of its kind its region is nearest to its own
    leaked : its identity is nearest in another animal's region, or in an object that stands where none should; None
        for a background, which is looked for in its own region alone
    own, base, others : cosines of its region, see `weaver.embedded.identity.score`; None where it has no region
    """

    name: str
    kind: str
    present: bool
    right: bool
    leaked: bool | None
    own: float | None
    base: float | None
    others: float | None


@dataclass(frozen=True)
class Measures:
    """One picture.

    Parameters
    ----------
    concepts : one a concept of the prompt, the background's last
    background_psnr : dB against the template outside of the dilated masks; None without a template, and where the
        background is a concept
    edge_iou : of the edges of the picture and of the template, 0..1; None without a template
    mask_iou : of what is an animal at all in the picture and in the template, 0..1; None without a template
    """

    concepts: tuple[ConceptMeasure, ...]
    background_psnr: float | None
    edge_iou: float | None
    mask_iou: float | None


def find_animals(image: Image.Image, words: Sequence[str], prompt: str) -> list[np.ndarray | None]:
    """Where each animal of a prompt stands: masks [h, w] bool; None for one that is not found.

    A word that stands k times gets its k largest objects from left to right, or what there is of them.
    """
    labels = list(dict.fromkeys(words))
    sure = load_segmenter().segment(image, labels, prompt)
    which = sure.argmax(0)
    found: dict[str, list] = {}
    for number, label in enumerate(labels):
        mask, count = tidy(torch.from_numpy((sure[number] >= 0.5) & (which == number))), list(words).count(label)
        objects = [mask] if mask.sum() >= LEAST_PIXELS else []
        for parts in range(count, 1, -1):
            try:
                objects = list(split_objects(mask, parts, label)) if objects else []
                break
            except MaskError:
                continue
        found[label] = [part.numpy() for part in objects] + [None] * (count - len(objects))
    return [found[word].pop(0) for word in words]


def psnr_outside(image: Image.Image, template: Image.Image, inside: np.ndarray) -> float | None:
    """dB between two pictures of one size where `inside` [h, w] bool is not set; None where it is set everywhere."""
    outside = ~np.asarray(inside, bool)
    if not outside.any():
        return None
    first, second = (np.asarray(picture.convert("RGB"), np.float64)[outside] / 255 for picture in (image, template))
    error = ((first - second) ** 2).mean()
    return float("inf") if error == 0 else float(-10 * np.log10(error))


def edge_iou(image: Image.Image, other: Image.Image) -> float:
    """Intersection over union of two pictures' edges (Sobel, of luminance), each a pixel wider than it is; 0..1."""
    first, second = (dilate(torch.from_numpy(_edges(picture))[None], 1)[0] for picture in (image, other))
    return mask_iou(first.numpy(), second.numpy())


def mask_iou(first: np.ndarray | None, second: np.ndarray | None) -> float:
    """Intersection over union of masks [h, w] bool; None is an empty one, and two empty ones are alike."""
    if first is None or second is None:
        return float(first is second)
    union = (first | second).sum()
    return float((first & second).sum() / union) if union else 1.0


def measure(
    image: Image.Image,
    animals: Sequence[str],
    prompt: str,
    *,
    background: str | None = None,
    template: Image.Image | None = None,
    masks: Sequence[np.ndarray] | None = None,
    dilation: int = 1,
) -> Measures:
    """Measure one picture of the embedded world.

    Parameters
    ----------
    image : the picture, of 64 x 64 pixels
    animals : what stands in it, names of concepts that ship or class words for the base model's own
    prompt : p_base, which tells the segmenter what there is
    background : name of the background's concept
    template, masks : the picture whose composition was to be kept, and one dense mask [h, w] an animal in it; without
        them the animals are found in the picture itself, and whichever of them shows a concept is taken for it: where
        it was to stand, nobody said
    dilation : pixels around the masks that count as theirs

    Raises `WeaverError` where one of `template` and `masks` is missing, or there are not as many masks as animals.
    """
    if (template is None) != (masks is None) or (masks is not None and len(masks) != len(animals)):
        count = "no" if masks is None else len(masks)
        raise WeaverError(f"{count} masks for {len(animals)} animals: give a template with one mask each, or neither")
    cards = [card_of(name) if name not in ANIMALS else None for name in animals]
    words = [card.word if card else name for card, name in zip(cards, animals, strict=True)]
    regions = find_animals(image, words, prompt) if masks is None else [np.asarray(mask, bool) for mask in masks]
    nearest = [None if region is None else _nearest(image, region) for region in regions]
    if masks is None:
        _suit(cards, regions, nearest)
    anything = load_segmenter().segment(image, ANIMALS).sum(0) >= 0.5
    present = [region is not None and bool(anything[region].mean() >= 0.5) for region in regions]
    inside = _union(regions, image)
    strays = [_nearest(image, mask) for mask in _strays(anything, inside)]
    concepts = []
    for i, card in enumerate(cards):
        if card is None:
            continue
        own = identity_of(card)
        elsewhere = [*strays, *(near for near, other in zip(nearest, cards, strict=True) if other is not card)]
        scores, right = _scores(image, regions[i], card.name), present[i] and nearest[i] == own
        concepts.append(ConceptMeasure(card.name, card.kind, present[i], right, own in elsewhere, **scores))
    wider = dilate(torch.from_numpy(inside)[None], dilation)[0].numpy()
    if background is not None:
        card, outside = card_of(background), None if wider.all() else ~wider
        right = outside is not None and _nearest(image, outside, background=True) == identity_of(card)
        scores = _scores(image, outside, background)
        concepts.append(ConceptMeasure(card.name, card.kind, outside is not None, right, None, **scores))
    if template is None:
        return Measures(tuple(concepts), None, None, None)
    psnr = psnr_outside(image, template, wider) if background is None else None
    return Measures(tuple(concepts), psnr, edge_iou(image, template), mask_iou(anything, inside))


def _nearest(image: Image.Image, region: np.ndarray, *, background: bool = False) -> tuple[str, str]:
    found = similarities(image, region, background=background)
    return max(found, key=found.get)


def _scores(image: Image.Image, region: np.ndarray | None, name: str) -> dict[str, float | None]:
    return dict.fromkeys(("own", "base", "others")) if region is None else score(image, region, name)


def _suit(cards: list, regions: list, nearest: list) -> None:
    """Let a concept trade its region for one that shows it and not its owner; in place."""
    own = [card and identity_of(card) for card in cards]
    for i in range(len(cards)):
        for j in range(len(cards)):
            if own[i] and nearest[i] != own[i] and nearest[j] == own[i] != own[j]:
                for of_each in (regions, nearest):
                    of_each[i], of_each[j] = of_each[j], of_each[i]
                break


def _union(regions: Sequence[np.ndarray | None], image: Image.Image) -> np.ndarray:
    known = [region for region in regions if region is not None]
    return np.any(known, 0) if known else np.zeros((image.height, image.width), bool)


def _strays(anything: np.ndarray, inside: np.ndarray) -> list[np.ndarray]:
    """The parts of the mask `anything` that lie where no animal should and are as large as one."""
    around = dilate(torch.from_numpy(inside)[None], _REST)[0].numpy()
    parts = connected_components(anything & ~around)
    objects = [parts == number for number in range(1, parts.max() + 1)]
    return [mask for mask in objects if mask.sum() >= _STRAY_PIXELS]


def _edges(image: Image.Image) -> np.ndarray:
    """[h, w] bool, where luminance (Rec. 601) changes."""
    light = np.pad(np.asarray(image.convert("L"), np.float64) / 255, 1, mode="edge")
    across = light[:, 2:] - light[:, :-2]
    along = light[2:] - light[:-2]
    x = (across[:-2] + 2 * across[1:-1] + across[2:]) / 8
    y = (along[:, :-2] + 2 * along[:, 1:-1] + along[:, 2:]) / 8
    return np.hypot(x, y) > _EDGE
