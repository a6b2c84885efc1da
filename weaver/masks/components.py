"""Several objects of one class word: cut one mask into its objects and hand them out from left to right."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from weaver.masks.compose import MaskError
from weaver.masks.shapes import connected_components, dilate, drop_specks, fill_holes

__all__ = ["assign_objects", "objects_in", "split_objects", "tidy"]

# Of the objects that are cut apart, the smallest has at least this part of the largest's area: an ear is no animal.
_ALIKE = 0.25


def assign_objects(masks: torch.Tensor, words: Sequence[str], labels: Sequence[str]) -> torch.Tensor:
    """Give every concept a mask, when masks were found per class word.

    Parameters
    ----------
    masks : [K, h, w] bool, one for each of `labels`.
    words : the class words of the N concepts in their order; a word that stands k times gets k objects, left to right.
    labels : the K different words that the masks belong to.

    Returns [N, h, w] bool. Raises `MaskError` when a mask holds fewer objects than there are concepts of its word.
    """
    found = {}
    for label, mask in zip(labels, masks, strict=True):
        count = list(words).count(label)
        found[label] = iter(split_objects(mask, count, label) if count > 1 else mask.bool()[None])
    return torch.stack([next(found[word]) for word in words])


def objects_in(mask: torch.Tensor, count: int, what: str = "object") -> torch.Tensor:
    """The objects of mask [h, w] from left to right, [K, h, w] with K `count` at least: its parts, where it has enough
    that are alike in size, else as `split_objects` cuts them."""
    parts = connected_components(tidy(mask))
    if parts.max(initial=0) < count:
        return split_objects(mask, count, what)
    objects = [torch.from_numpy(parts == number) for number in range(1, parts.max() + 1)]
    return torch.stack(sorted(objects, key=_middle))


def split_objects(mask: torch.Tensor, count: int, what: str = "object") -> torch.Tensor:
    """Cut mask [h, w] into its `count` largest objects [count, h, w], ordered from left to right by their centres.

    Objects that touch are cut apart at their thinnest place: the mask is worn down until it falls apart, and the
    parts grow back into it. Whatever is not of the `count` largest belongs to none of them.
    """
    worn = mask = mask.bool()
    step = max(1, min(mask.shape) // 128)
    while True:
        parts = connected_components(worn)
        areas = np.sort(np.bincount(parts[parts > 0], minlength=count + 1)[1:])[::-1]
        if len(areas) >= count and areas[count - 1] >= max(1, _ALIKE * areas[0]):
            break
        worn = ~dilate(~worn[None], step)[0]
        if not worn.any():
            alone = len(np.unique(connected_components(mask))) - 1
            raise MaskError(
                f"{count} {what!r} asked for, but the mask of {what!r} holds {alone} objects that could be one: "
                "give these concepts a box or a mask file each"
            )
    order = np.argsort(-np.bincount(parts.ravel())[1:], kind="stable")[:count] + 1
    seeds = torch.stack([torch.from_numpy(parts == label) for label in order])
    objects = _grow_back(seeds, mask)
    return torch.stack(sorted(objects, key=_middle))


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
