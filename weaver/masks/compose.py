"""From one dense mask a concept to weights that fill the plane (Concept Weaver, section 3.4).

The paper dilates the masks and, where the dilated masks of two concepts overlap, keeps the dense ones. It leaves
open who owns the overlap that lies in no dense mask (here: the background) and where dense masks overlap (here: the
mask named first, or a share each). The background is whatever the final masks leave.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from weaver.choices import OVERLAPS
from weaver.errors import WeaverError, told
from weaver.masks.shapes import connected_components, dilate, drop_specks, fill_holes, soften
from weaver.values import is_number

__all__ = ["MaskError", "as_masks", "compose_masks", "composition_reasons"]

# A concept that keeps less than this part of its own mask is as good as not in the picture.
_KEPT = 0.01


class MaskError(WeaverError):
    """Masks that can't be used; names the concept and what to change."""


def compose_masks(
    dense: torch.Tensor | np.ndarray | Sequence,
    *,
    dilation: float = 0,
    overlap: str = "priority",
    min_area: float = 0,
    fill_holes: bool = False,
    feather: int = 0,
    names: Sequence[str] | None = None,
) -> torch.Tensor:
    """Turn dense masks into final ones that sum to one in every pixel.

    All but the rule for dilated overlap is ours; the paper gives no figures.

    Parameters
    ----------
    dense : [N, h, w], bool, or float in 0..1 where 0.5 and more is inside; N may be 0.
    dilation : radius of the disc that each mask grows by: whole pixels of these masks, or below 1 the part of the
        object's size (the root of its area), so that small objects grow less than large ones.
    overlap : where dense masks overlap, "priority" gives the pixel to the one that comes first, "share" an equal
        part to each.
    min_area : parts of a dense mask that are smaller are dropped: whole pixels, or below 1 a part of the mask's area.
    fill_holes : give each dense mask what it encloses, but for what another dense mask claims.
    feather : width in pixels of the final masks' edges, half of it on either side; 0 and 1 leave them hard.
    names : what to call the concepts in errors.

    Returns [N + 1, h, w] float32 on the CPU, the background last.
    Raises `MaskError` for masks that are empty, not finite, outside 0..1, or that leave a concept nothing.
    """
    if reasons := composition_reasons(dilation, overlap, min_area, fill_holes, feather):
        raise MaskError("; ".join(reasons))
    inside = _binary(dense, names)
    names = names or _numbered(len(inside))
    inside = _cleaned(inside, names, min_area, fill_holes)
    grown = _grown(inside, dilation)
    contested = grown.sum(0) > 1
    claims = torch.where(contested, inside, grown)  # [N, h, w]: one claim, or dense masks where dilated ones overlap
    if overlap == "priority":
        claims = claims & (claims.cumsum(0) == 1)
    count = claims.sum(0)
    final = claims / count.clamp(min=1)
    if reasons := _losses(inside, final, names):
        raise MaskError("masks leave a concept nothing: " + "; ".join(reasons))
    final = torch.cat([final, (count == 0)[None].to(final)])
    return soften(final, int(feather)) if feather else final


def composition_reasons(dilation: float, overlap: str, min_area: float, fill_holes: bool, feather: int) -> list[str]:
    """What is wrong with the settings of `compose_masks`; empty when nothing is."""
    reasons = []
    for name, value, of in (("dilation", dilation, "size"), ("min_area", min_area, "area")):
        if not is_number(value) or value < 0 or (value > 1 and value % 1):
            reasons.append(f"{name} is {told(value)}; expected whole pixels, 0 or more, or a part of the object's {of}")
    if overlap not in OVERLAPS:
        reasons.append(f"overlap is {told(overlap)}; expected one of {', '.join(OVERLAPS)}")
    if not isinstance(fill_holes, bool):
        reasons.append(f"fill_holes is {told(fill_holes)}; expected True or False")
    if not is_number(feather) or feather < 0 or feather % 1:
        reasons.append(f"feather is {told(feather)}; expected a whole number of pixels, 0 or more")
    return reasons


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


def _cleaned(inside: torch.Tensor, names: Sequence[str], min_area: float, fill: bool) -> torch.Tensor:
    """Dense masks [N, h, w] bool without their specks, and with what they enclose."""
    if min_area:
        least = [min_area * int(mask.sum()) if min_area < 1 else min_area for mask in inside]
        kept = [drop_specks(mask, amount) for mask, amount in zip(inside, least, strict=True)]
        reasons = [
            f"{name} has no part of {amount:g} pixels, its largest has "
            f"{np.bincount(connected_components(mask).ravel())[1:].max()}; make min_area smaller"
            for name, mask, left, amount in zip(names, inside, kept, least, strict=True)
            if not left.any()
        ]
        if reasons:
            raise MaskError("unusable masks: " + "; ".join(reasons))
        inside = torch.stack(kept) if kept else inside
    if fill:
        free = ~inside.any(0)
        inside = torch.stack([mask | (fill_holes(mask) & free) for mask in inside]) if len(inside) else inside
    return inside


def _grown(inside: torch.Tensor, dilation: float) -> torch.Tensor:
    """Dense masks [N, h, w] bool, each grown by so many pixels or by so large a part of its own size."""
    if dilation == 0 or dilation >= 1 or not len(inside):
        return dilate(inside, int(dilation))
    return torch.cat([dilate(mask[None], round(dilation * math.sqrt(mask.sum()))) for mask in inside])


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
