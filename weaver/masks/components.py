"""Several objects of one class word: one mask cut into its objects."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import torch

from weaver.masks.assign import Found, Wish
from weaver.masks.compose import MaskError
from weaver.masks.shapes import connected_components, dilate, drop_specks, fill_holes

__all__ = ["found_in", "split_objects", "tidy"]

# Of the objects that are cut apart, the smallest has at least this part of the largest's area: an ear is no animal.
_ALIKE = 0.25
# Where a mask is cut into objects it is no wider than the narrowest of them: one animal has no such neck. Nine tenths
# of the drawings that touch have one, and a third of those of which one covers a third of the other.
_NECK = 1.0


def found_in(masks: torch.Tensor, words: Sequence[str], wishes: Sequence[Wish]) -> list[Found]:
    """The objects that may be meant, when masks were found by word and not by object.

    Of a word that a single wish has, and does not choose of, all that was found is one object.

    Parameters
    ----------
    masks : [K, h, w] bool, one for each of the K different `words`; an empty one is no object
    wishes : what is asked for, to be served by `weaver.masks.assign`; each has one of the words
    """
    found = []
    for word, mask in zip(words, masks, strict=True):
        own = [wish for wish in wishes if wish.word == word]
        count = max(len(own), *(wish.order or 1 for wish in own))
        parts = _objects_in(mask, count) if len(own) > 1 or own[0].chosen else [mask]
        found += [Found.of_mask(word, part) for part in parts if part.any()]
    return found


def _objects_in(mask: torch.Tensor, count: int) -> list[torch.Tensor]:
    """The objects of mask [h, w] from left to right, [h, w] bool each.

    They are its parts, where it has `count` or more that are alike in size, else what `split_objects` cuts at necks;
    where it can't be cut so often, the parts that there are.
    """
    parts = connected_components(tidy(mask))
    objects = [torch.from_numpy(parts == number) for number in range(1, parts.max(initial=0) + 1)]
    if len(objects) < count:
        with suppress(MaskError):
            return list(split_objects(mask, count, widest_neck=_NECK))
    return sorted(objects, key=_middle)


def split_objects(
    mask: torch.Tensor, count: int, what: str = "object", *, widest_neck: float = math.inf
) -> torch.Tensor:
    """Cut mask [h, w] into its `count` largest objects [count, h, w], ordered from left to right by their centres.

    Objects that touch are cut apart at their thinnest place: the mask is worn down until it falls apart, and the
    parts grow back into it. Whatever is not of the `count` largest belongs to none of them. Raises `MaskError` where it
    does not fall into so many, or only at a place that is wider than `widest_neck` times the narrowest object.
    """
    worn = mask = mask.bool()
    step, wear = max(1, min(mask.shape) // 128), 0
    while True:
        parts = connected_components(worn)
        areas = np.sort(np.bincount(parts[parts > 0], minlength=count + 1)[1:])[::-1]
        if len(areas) >= count and areas[count - 1] >= max(1, _ALIKE * areas[0]):
            break
        worn, wear = _worn(worn, step), wear + 1
        if not worn.any():
            raise _one_piece(mask, count, what)
    order = np.argsort(-np.bincount(parts.ravel())[1:], kind="stable")[:count] + 1
    seeds = torch.stack([torch.from_numpy(parts == label) for label in order])
    objects = _grow_back(seeds, mask)
    if wear > widest_neck * min(_thickness(part, step) for part in objects):
        raise _one_piece(mask, count, what)
    return torch.stack(sorted(objects, key=_middle))


def _worn(mask: torch.Tensor, step: int) -> torch.Tensor:
    """A mask [h, w] without its outermost `step` pixels."""
    return ~dilate(~mask[None], step)[0]


def _thickness(mask: torch.Tensor, step: int) -> int:
    """How often `step` pixels can be worn from a mask [h, w] before nothing is left."""
    times = 0
    while mask.any():
        mask, times = _worn(mask, step), times + 1
    return times


def _one_piece(mask: torch.Tensor, count: int, what: str) -> MaskError:
    alone = len(np.unique(connected_components(mask))) - 1
    return MaskError(
        f"{count} {what!r} asked for, but the mask of {what!r} holds {alone} objects that could be one: "
        "give these concepts a box or a mask file each"
    )


def tidy(mask: torch.Tensor) -> torch.Tensor:
    """Drop the specks of mask [h, w], parts much smaller than its largest, and fill its holes."""
    areas = np.bincount(connected_components(mask).ravel())[1:]
    return fill_holes(drop_specks(mask, _ALIKE * areas.max(initial=1)))


def _middle(part: torch.Tensor) -> float:
    """The mean x of the pixels of a part [h, w]."""
    return torch.nonzero(part)[:, 1].float().mean().item()


def _grow_back(seeds: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Let seeds [K, h, w] take turns in growing by one pixel inside mask [h, w] until none can."""
    seeds = seeds.clone()
    while True:
        before = seeds.sum()
        for k in range(len(seeds)):
            free = mask & ~seeds.any(0)
            seeds[k] |= dilate(seeds[k][None], 1)[0] & free
        if seeds.sum() == before:
            return seeds
