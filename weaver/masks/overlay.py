"""The masks drawn over the picture, with names, for people to look at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

__all__ = ["concept_colour", "draw_masks"]

# Told apart on light and dark ground, and by people who see red and green alike (Okabe and Ito's colours).
_COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (204, 121, 167), (213, 94, 0), (0, 114, 178))
_SMALLEST = 12  # pixels of a name's letters
_SAME = 1e-3  # part of a pixel by which equal shares may differ


def draw_masks(
    image: Image.Image, masks: torch.Tensor, names: Sequence[str], *, side: int = 512, tint: float = 0.45
) -> Image.Image:
    """Draw masks over a picture: tinted, outlined and named; the background's name, if any, stands at the lower left.

    The outline of a mask goes round all pixels of which no other mask has more, and so round what masks share, too.

    Parameters
    ----------
    masks : [M, h, w] in 0..1, as `compose_masks` returns them (the background last).
    names : of the concepts, in the order of the masks; one more for the background where it is a concept too.
    side : the shorter side of the drawing in pixels at least; small pictures are enlarged by a whole factor, smoothly.
    tint : how much of the colour covers the picture, 0..1.
    """
    factor = max(1, -(-side // min(image.size)))
    canvas = image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.LANCZOS)
    pixels = np.asarray(canvas).astype(np.float32)
    regions = [_enlarge(mask, canvas.size) for mask in masks]
    most = np.max(regions, 0)
    regions = regions[:-1]
    insides = [(region > 0) & (region >= most - _SAME) for region in regions]
    for number, (region, inside) in enumerate(zip(regions, insides, strict=True)):
        colour = concept_colour(number)
        pixels += (region * tint)[..., None] * (np.array(colour, np.float32) - pixels)
        pixels[_outline(inside, max(1, canvas.height // 256))] = colour
    canvas = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    labels = _Labels(canvas)
    for number, (inside, name) in enumerate(zip(insides, names, strict=False)):
        if inside.any():
            labels.add(_middle(inside), name, concept_colour(number))
    if len(names) > len(regions):
        labels.add((0, canvas.height), names[len(regions)], (255, 255, 255))
    return canvas


def concept_colour(number: int) -> tuple[int, int, int]:
    """The colour of the concept with this number, wherever it is drawn."""
    return _COLOURS[number % len(_COLOURS)]


def _enlarge(mask: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    picture = Image.fromarray(mask.detach().cpu().float().numpy())
    return np.asarray(picture.resize(size, Image.Resampling.BILINEAR))


def _outline(inside: np.ndarray, width: int) -> np.ndarray:
    padded = np.pad(inside, width)
    kept = inside.copy()
    height, length = inside.shape
    for dy, dx in ((0, width), (2 * width, width), (width, 0), (width, 2 * width)):
        kept &= padded[dy : dy + height, dx : dx + length]
    return inside & ~kept


def _middle(inside: np.ndarray) -> tuple[int, int]:
    """The pixel of the region nearest to its centre, so that the name stands on it whatever its shape."""
    y, x = np.nonzero(inside)
    nearest = ((y - y.mean()) ** 2 + (x - x.mean()) ** 2).argmin()
    return int(x[nearest]), int(y[nearest])


class _Labels:
    """Names on a drawing: each as near to its place as it can be without leaving the drawing or covering another."""

    def __init__(self, canvas: Image.Image):
        self._size, self._draw = canvas.size, ImageDraw.Draw(canvas)
        self._there: list[tuple[int, int, int, int]] = []

    def add(self, at: tuple[int, int], text: str, colour: tuple[int, int, int]) -> None:
        """Write `text` about the pixel `at`, smaller where it is too long, and shortened where that is not enough."""
        size = max(_SMALLEST, self._size[1] // 24)
        font = ImageFont.load_default(size)
        pad = size // 4
        while (box := self._draw.textbbox((0, 0), text, font=font))[2] - box[0] > self._size[0] - 4 * pad:
            if size > _SMALLEST:
                size -= 1
                font = ImageFont.load_default(size)
            elif len(text) > 2:
                text = text[:-2] + "…"
            else:
                break
        width, height = box[2] - box[0] + 2 * pad, box[3] - box[1] + 2 * pad
        x = _within(at[0] - width // 2, pad, self._size[0] - width - pad)
        wanted = _within(at[1] - height // 2, pad, self._size[1] - height - pad)
        free = [y for y in range(pad, max(pad, self._size[1] - height - pad) + 1) if self._free(x, y, width, height)]
        y = min(free, key=lambda y: abs(y - wanted), default=wanted)
        self._there.append((x, y, x + width, y + height))
        self._draw.rectangle((x, y, x + width, y + height), fill=(20, 20, 20))
        self._draw.text((x + pad - box[0], y + pad - box[1]), text, font=font, fill=colour)

    def _free(self, x: int, y: int, width: int, height: int) -> bool:
        return all(
            x > right or x + width < left or y > low or y + height < top for left, top, right, low in self._there
        )


def _within(value: int, least: int, most: int) -> int:
    return max(min(value, most), least)
