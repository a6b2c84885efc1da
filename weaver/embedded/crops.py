"""Regions of a picture as the helper networks see them: the masked object on grey, scaled to a fixed square."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

__all__ = ["CROP_SIZE", "crop_region"]

CROP_SIZE = 40
_GREY = 128


def crop_region(image: Image.Image, mask: np.ndarray, *, whole: bool = False) -> torch.Tensor:
    """The part of `image` inside `mask`, everything else grey.

    Parameters
    ----------
    image : RGB picture of h x w pixels.
    mask : [h, w] bool, or a soft mask that is taken above one half; where none of it is above, as in a region shared
        with another, above 0.
    whole : keep the whole frame instead of the mask's bounding box (backgrounds).

    Returns
    -------
    torch.Tensor
        [3, 40, 40] in [-1, 1].

    Raises
    ------
    ValueError
        If the mask is empty or has another size than the picture.
    """
    mask = np.asarray(mask, np.float32)
    mask = mask > (0.5 if (mask > 0.5).any() else 0)
    if mask.shape != (image.height, image.width):
        raise ValueError(f"the mask is {mask.shape}, the picture {(image.height, image.width)}: give both one size")
    if not mask.any():
        raise ValueError("the mask is empty: there is nothing to crop")
    pixels = np.where(mask[..., None], np.asarray(image.convert("RGB")), _GREY).astype(np.uint8)
    if not whole:
        ys, xs = np.nonzero(mask)
        pixels = pixels[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    height, width = pixels.shape[:2]
    square = Image.new("RGB", (max(height, width),) * 2, (_GREY,) * 3)
    square.paste(Image.fromarray(pixels), ((square.width - width) // 2, (square.height - height) // 2))
    square = square.resize((CROP_SIZE, CROP_SIZE), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).float().div(127.5).sub(1)
