"""Masks from picture files and from boxes."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from weaver.masks.compose import MaskError
from weaver.pictures import fit, open_picture

__all__ = ["box_mask", "load_mask"]

_SHOWN = 12  # labels in a message


def load_mask(
    path: str | os.PathLike,
    size: tuple[int, int],
    *,
    source_size: tuple[int, int] | None = None,
    label: int | None = None,
) -> torch.Tensor:
    """Read one mask from a picture file. White, opaque or labelled is inside.

    Inside is, by the kind of picture: where transparency varies, alpha of a half and more; a palette with colours
    (a label map), every colour but black; grey or colour, the brightest channel at half of full scale and more; a
    grey picture that holds 0 and 1 only, 1. `label` instead picks the pixels of one palette index or grey level.

    A mask has `size` (height, width), or `source_size`, the template file's own: then it is cut about its centre as the
    template is, averaged over areas, and half or more is inside.

    Returns [height, width] bool. Raises `MaskError` for another size, an empty mask or a label that is not in it,
    `PictureError` for a file that can't be read.
    """
    image = open_picture(path)
    values = _inside(image, path, label)
    if values.shape != tuple(size):
        wanted = dict.fromkeys(map(tuple, [size] if source_size is None else [size, source_size]))
        if values.shape not in wanted:
            sizes = " or ".join(f"{w}x{h}" for h, w in wanted)
            raise MaskError(
                f"{path}: the mask is {image.width}x{image.height}, expected the template's {sizes}; draw it on the "
                "template"
            )
        picture = Image.fromarray(values.astype(np.float32))
        values = np.asarray(fit(picture, size, Image.Resampling.BOX)) >= 0.5
    if not values.any():
        raise MaskError(f"{path}: the mask is empty")
    return torch.from_numpy(np.array(values))


def box_mask(box: Sequence[float], size: tuple[int, int]) -> torch.Tensor:
    """Make a mask [height, width] bool of the pixels whose centres are in a box (left, top, right, bottom).

    The box is in pixels of `size` (height, width), or in parts of it when all four numbers lie in 0..1.
    Raises `MaskError` when the box is empty, turned round or outside.
    """
    height, width = size
    numbers = [float(value) for value in box]
    if len(numbers) != 4 or not np.isfinite(numbers).all():
        raise MaskError(f"box {list(box)} is not four numbers (left, top, right, bottom)")
    if all(0 <= value <= 1 for value in numbers):
        numbers = [value * side for value, side in zip(numbers, (width, height) * 2, strict=True)]
    left, top, right, bottom = numbers
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise MaskError(
            f"box {list(box)} must be left < right <= {width} and top < bottom <= {height}, in pixels or in parts of 1"
        )
    x, y = np.arange(width) + 0.5, np.arange(height) + 0.5
    mask = ((top <= y) & (y < bottom))[:, None] & ((left <= x) & (x < right))[None]
    if not mask.any():
        raise MaskError(f"box {list(box)} covers no pixel of the {width}x{height} template")
    return torch.from_numpy(mask)


def _inside(image: Image.Image, path, label: int | None) -> np.ndarray:
    if label is not None:
        if image.mode not in ("P", "L", "1", "I", "I;16"):
            raise MaskError(f"{path}: label {label} needs a palette or grey picture, this one is {image.mode}")
        levels = np.asarray(image)
        if not (levels == label).any():
            there = ", ".join(str(int(level)) for level in np.unique(levels)[:_SHOWN])
            raise MaskError(f"{path}: label {label} is nowhere in it; it holds {there}")
        return levels == label
    if image.has_transparency_data:
        alpha = np.asarray(image.convert("RGBA").getchannel("A"))
        if alpha.min() != alpha.max():
            return alpha >= 128
    if image.mode == "P":
        colours = np.asarray(image.convert("RGB"))
        if (colours != colours[..., :1]).any():
            return colours.any(-1)
        image = image.convert("L")
    if image.mode in ("1", "L", "I", "I;16", "F"):
        values = np.asarray(image)
        full = {"1": 1, "L": 255, "F": 1}.get(image.mode, 65535)
        return values >= (1 if values.max() <= 1 else full / 2)
    return np.asarray(image.convert("RGB")).max(-1) >= 128
