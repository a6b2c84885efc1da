"""Masks that fill the plane, reduced to the tokens of every map of a U-Net and still filling it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import torch

from weaver.choices import DOWNSAMPLINGS
from weaver.errors import told
from weaver.masks.compose import MaskError

__all__ = ["VanishedMaskWarning", "check_partition", "downsampling_reasons", "mask_pyramid", "partition_reasons"]

_SLACK = 1e-5  # of a sum of float32 weights


class VanishedMaskWarning(UserWarning):
    """A mask is nowhere in a coarse map; names it and the map."""


def mask_pyramid(
    masks: torch.Tensor,
    sizes: Iterable[tuple[int, int]],
    *,
    downsampling: str = "area",
    names: Sequence[str] | None = None,
) -> dict[tuple[int, int], torch.Tensor]:
    """Reduce masks [M, H, W] that sum to one to every (h, w) of `sizes`, summing to one in every token there.

    Parameters
    ----------
    downsampling : "area" takes the mean of what a token covers, parts of pixels by their part, so any size will do. The
        mean is linear, so it keeps the sum (the last mask takes up the rounding), and no mask vanishes; edges become
        soft. "nearest" takes the pixel at a token's centre: hard masks stay hard, with the fewest contexts in each
        token. A mask that holds no centre gets the token that it fills most, if another mask can spare one; else a
        `VanishedMaskWarning` says so.
    names : what to call the masks there, the background's too or not.

    Returns ``{(h, w): [M, h, w] float32}`` on the CPU, since not every device has float64. Raises `MaskError` when the
    masks do not sum to one.
    """
    if reasons := downsampling_reasons(downsampling):
        raise MaskError("; ".join(reasons))
    masks = masks.cpu()
    check_partition(masks)
    names = [*(names or [f"concept {i + 1}" for i in range(len(masks) - 1)]), "the background"]
    reduced = {}
    for height, width in sizes:
        small = _area(masks, height, width)
        reduced[height, width] = small if downsampling == "area" else _nearest(masks, small, names)
    return reduced


def downsampling_reasons(downsampling: str) -> list[str]:
    """What is wrong with the way in which masks are to be reduced; empty when nothing is."""
    if downsampling in DOWNSAMPLINGS:
        return []
    return [f"downsampling is {told(downsampling)}; expected one of {', '.join(DOWNSAMPLINGS)}"]


def check_partition(masks: torch.Tensor) -> None:
    """Raise `MaskError` unless masks [M, h, w] lie in 0..1 and sum to one in every pixel."""
    if masks.ndim != 3 or 0 in masks.shape:
        raise MaskError(f"masks have shape {tuple(masks.shape)}, expected [masks, height, width] and none of them 0")
    masks = masks.cpu()
    total = masks.double().sum(0)
    if not torch.isfinite(total).all() or masks.min() < 0 or (total - 1).abs().max() > _SLACK:
        low, high = total.min().item(), total.max().item()
        raise MaskError(f"masks must be 0 or more and sum to one; they sum to {low:.4g}..{high:.4g}: use compose_masks")


def partition_reasons(masks: torch.Tensor, names: Sequence[str]) -> list[str]:
    """Why masks of the concepts `names` can't be weights as they are; empty when they can.

    Parameters
    ----------
    masks : [N, h, w], which leave the rest to the background, or [N + 1, h, w], which sum to one; 0..1, on the CPU
    """
    reasons = []
    for name, mask in zip(names, masks, strict=False):
        if not torch.isfinite(mask).all() or mask.min() < 0 or mask.max() > 1:
            reasons.append(f"the mask of {name} has values outside 0..1 ({mask.min():g} to {mask.max():g})")
        elif not mask.any():
            reasons.append(f"the mask of {name} is empty")
    if reasons:
        return reasons
    own = masks[: len(names)]
    crowded = own.double().sum(0) > 1 + _SLACK
    for i, name in enumerate(names):
        for j in range(i):
            if count := int((crowded & (own[i] > 0) & (own[j] > 0)).sum()):
                reasons.append(f"the masks of {names[j]} and {name} overlap in {count} pixels: use compose_masks")
    if not reasons and len(masks) > len(names):
        try:
            check_partition(masks)
        except MaskError as error:
            reasons.append(str(error))
    return reasons


def _area(masks: torch.Tensor, height: int, width: int) -> torch.Tensor:
    rows, columns = _area_matrix(masks.shape[1], height), _area_matrix(masks.shape[2], width)
    small = (rows @ masks.double() @ columns.T).clamp(0, 1).float()
    small[-1] = (1 - small[:-1].sum(0)).clamp(min=0)
    return small


def _nearest(masks: torch.Tensor, area: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
    """Masks [M, H, W] at the centres of the tokens, of which `area` [M, h, w] tells what part each mask covers."""
    rows, columns = (
        ((torch.arange(new) + 0.5) * (old / new)).long()
        for new, old in zip(area.shape[1:], masks.shape[1:], strict=True)
    )
    small = masks.float()[:, rows][:, :, columns].flatten(1)
    area = area.flatten(1)
    for number, name in enumerate(names[: len(masks)]):
        if small[number].any() or not masks[number].any():
            continue
        present = small[:-1] > 0
        spared = ~present[present.sum(1) == 1].any(0)  # no concept's only token
        part = torch.where(spared, area[number], 0)
        if not part.any():
            size = f"{len(columns)} x {len(rows)}"
            warnings.warn(
                f"on maps of {size} tokens the mask of {name} holds no token; masks.downsampling: area keeps a part",
                VanishedMaskWarning,
                stacklevel=4,
            )
            continue
        small[:, part.argmax()] = 0
        small[number, part.argmax()] = 1
    return small.unflatten(1, (len(rows), len(columns)))


def _area_matrix(size: int, target: int) -> torch.Tensor:
    """The part of every source cell in every target cell, [target, size] float64; rows sum to one."""
    edges = torch.arange(target + 1, dtype=torch.float64) * (size / target)
    cells = torch.arange(size, dtype=torch.float64)
    low = torch.maximum(edges[:-1, None], cells[None])
    high = torch.minimum(edges[1:, None], cells[None] + 1)
    part = (high - low).clamp(min=0)
    return part / part.sum(1, keepdim=True)
