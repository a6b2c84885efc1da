"""From one dense mask a concept to weights that fill the plane (Concept Weaver, section 3.4).

The paper dilates the masks and, where the dilated masks of two concepts overlap, keeps the dense ones. It leaves
open who owns the overlap that lies in no dense mask (here: the background) and where dense masks overlap (here: the
mask named first, or a share each). The background is whatever the final masks leave.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Real

import numpy as np
import torch
import torch.nn.functional as F

from weaver.choices import OVERLAPS
from weaver.errors import WeaverError, told

__all__ = ["MaskError", "as_masks", "check_partition", "compose_masks", "dilate", "mask_pyramid", "partition_reasons"]

# A concept that keeps less than this part of its own mask is as good as not in the picture.
_KEPT = 0.01
_SLACK = 1e-5  # of a sum of float32 weights


class MaskError(WeaverError):
    """Masks that can't be used; names the concept and what to change."""


def compose_masks(
    dense: torch.Tensor | np.ndarray | Sequence,
    *,
    dilation: int = 0,
    overlap: str = "priority",
    names: Sequence[str] | None = None,
) -> torch.Tensor:
    """Turn dense masks into final ones that sum to one in every pixel.

    Parameters
    ----------
    dense : [N, h, w], bool, or float in 0..1 where 0.5 and more is inside; N may be 0.
    dilation : radius in pixels of these masks of the disc that each mask grows by (ours; the paper gives no figure).
    overlap : where dense masks overlap, "priority" gives the pixel to the one that comes first, "share" an equal
        part to each.
    names : what to call the concepts in errors.

    Returns [N + 1, h, w] float32 on the CPU, the background last.
    Raises `MaskError` for masks that are empty, not finite, outside 0..1, or that leave a concept nothing.
    """
    if overlap not in OVERLAPS:
        raise MaskError(f"overlap is {overlap!r}; expected one of {', '.join(OVERLAPS)}")
    if not isinstance(dilation, Real) or not dilation >= 0 or dilation % 1:  # NaN is neither
        raise MaskError(f"dilation is {dilation!r}; expected a whole number of pixels, 0 or more")
    inside = _binary(dense, names)
    names = names or _numbered(len(inside))
    grown = dilate(inside, int(dilation))
    contested = grown.sum(0) > 1
    claims = torch.where(contested, inside, grown)  # [N, h, w]: one claim, or dense masks where dilated ones overlap
    if overlap == "priority":
        claims = claims & (claims.cumsum(0) == 1)
    count = claims.sum(0)
    final = claims / count.clamp(min=1)
    if reasons := _losses(inside, final, names):
        raise MaskError("masks leave a concept nothing: " + "; ".join(reasons))
    return torch.cat([final, (count == 0)[None].to(final)])


def as_masks(masks: torch.Tensor | np.ndarray | Sequence) -> torch.Tensor:
    """Masks [M, h, w] on the CPU, of an array or of a list of arrays [h, w] (or pictures of one bit) of one size.

    Raises `MaskError` for what is neither. Their values and the number of axes are not looked at.
    """
    if not isinstance(masks, torch.Tensor | np.ndarray | list | tuple):
        raise MaskError(
            f"masks: is a {type(masks).__name__}, expected an array [masks, height, width] or a list of [height, width]"
        )
    try:
        if isinstance(masks, torch.Tensor | np.ndarray):
            return torch.as_tensor(masks).cpu()
        parts = [mask.cpu() if isinstance(mask, torch.Tensor) else torch.as_tensor(np.array(mask)) for mask in masks]
    except (TypeError, ValueError):  # text, or objects that are no numbers
        raise MaskError(f"masks: is {told(masks)}, expected numbers from 0 to 1") from None
    if len(shapes := {tuple(mask.shape) for mask in parts}) > 1:
        raise MaskError(f"masks of different sizes: {', '.join(map(str, sorted(shapes)))}; all must have one size")
    return torch.stack(parts) if parts else torch.zeros(0, 1, 1)


def dilate(masks: torch.Tensor, radius: int) -> torch.Tensor:
    """Grow boolean masks [N, h, w] by a disc of `radius` pixels."""
    if radius == 0 or not len(masks):
        return masks
    height, width = masks.shape[1:]
    # counts[..., i] is how many cells of the row lie before i: a run holds one where its two ends differ.
    counts = F.pad(F.pad(masks.int(), (radius,) * 4).cumsum(-1, dtype=torch.int32), (1, 0))
    grown = torch.zeros_like(masks)
    for dy in range(-radius, radius + 1):
        half = math.isqrt(radius**2 - dy**2)  # of this row of the disc
        rows = counts[:, radius + dy : radius + dy + height]
        first, last = radius - half, radius + half + 1
        grown |= rows[..., last : last + width] != rows[..., first : first + width]
    return grown


def mask_pyramid(masks: torch.Tensor, sizes: Iterable[tuple[int, int]]) -> dict[tuple[int, int], torch.Tensor]:
    """Reduce masks [M, H, W] that sum to one to every (h, w) of `sizes`, summing to one in every token there.

    Each token takes the mean of the area it covers, parts of pixels by their part, so any size will do. The mean is
    linear, so it keeps the sum; the last mask takes up the rounding.

    Returns ``{(h, w): [M, h, w] float32}`` on the CPU, since not every device has float64. Raises `MaskError` when the
    masks do not sum to one.
    """
    masks = masks.cpu()
    check_partition(masks)
    reduced = {}
    for height, width in sizes:
        rows, columns = _area_matrix(masks.shape[1], height), _area_matrix(masks.shape[2], width)
        small = (rows @ masks.double() @ columns.T).clamp(0, 1).float()
        small[-1] = (1 - small[:-1].sum(0)).clamp(min=0)
        reduced[height, width] = small
    return reduced


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


def _area_matrix(size: int, target: int) -> torch.Tensor:
    """The part of every source cell in every target cell, [target, size] float64; rows sum to one."""
    edges = torch.arange(target + 1, dtype=torch.float64) * (size / target)
    cells = torch.arange(size, dtype=torch.float64)
    low = torch.maximum(edges[:-1, None], cells[None])
    high = torch.minimum(edges[1:, None], cells[None] + 1)
    part = (high - low).clamp(min=0)
    return part / part.sum(1, keepdim=True)


def _binary(dense, names: Sequence[str] | None) -> torch.Tensor:
    masks = as_masks(dense)
    if masks.ndim != 3 or 0 in masks.shape[1:]:
        raise MaskError(f"masks have shape {tuple(masks.shape)}, expected [concepts, height, width]")
    if names is not None and len(names) != len(masks):
        raise MaskError(f"{len(masks)} masks for {len(names)} concepts ({', '.join(names)})")
    reasons = []
    for name, mask in zip(names or _numbered(len(masks)), masks.double(), strict=True):
        if not torch.isfinite(mask).all() or mask.min() < 0 or mask.max() > 1:
            reasons.append(f"the mask of {name} has values outside 0..1 ({mask.min():g} to {mask.max():g})")
        elif not (mask >= 0.5).any():
            reasons.append(f"the mask of {name} is empty")
    if reasons:
        raise MaskError("unusable masks: " + "; ".join(reasons))
    return masks if masks.dtype == torch.bool else masks >= 0.5


def _losses(inside: torch.Tensor, final: torch.Tensor, names: Sequence[str]) -> list[str]:
    reasons = []
    for i, name in enumerate(names):
        for j in range(i):
            if torch.equal(inside[i], inside[j]):
                reasons.append(f"{names[j]} and {name} claim all of each other's mask; give each its own")
        kept = final[i][inside[i]].sum() / inside[i].sum()
        if kept < _KEPT and not any(torch.equal(inside[i], inside[j]) for j in range(i)):
            reasons.append(f"{name} keeps {kept:.1%} of its mask; name it before the concepts that cover it")
    return reasons


def _numbered(count: int) -> list[str]:
    return [f"concept {i + 1}" for i in range(count)]
