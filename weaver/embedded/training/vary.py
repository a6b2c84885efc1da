"""Drawings painted, bent and marked: a segmenter must know an animal by its shape, not by the vendors it has seen."""

from __future__ import annotations

import random

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from weaver.embedded.drawings import HELPER_VENDORS, LINE_DRAWINGS, load_sprite, vendors_of
from weaver.embedded.repaint import PALETTE, jitter, shade
from weaver.embedded.world import SceneObject

__all__ = ["vary_drawing"]

# Colours an animal may have.
_FURS = {
    "dog": ("brown", "orange", "white", "grey", "black", "yellow"),
    "cat": ("orange", "grey", "black", "white", "brown", "yellow"),
    "fox": ("orange", "red", "white", "grey"),
    "panda": ("white", "white", "grey", "brown"),
    "frog": ("green", "green", "brown", "yellow", "blue"),
    "pig": ("pink", "pink", "white", "brown"),
}
_NEAR = 110  # sum over channels within which a pixel counts as the fur's colour
# Markings as ellipses in a square of [-1, 1]: (centre x, centre y, half width, half height), each with (least, most).
_MARKINGS = {
    "muzzle": [((-0.1, 0.1), (0.3, 0.6), (0.25, 0.6), (0.2, 0.5))],
    "chin": [((-0.1, 0.1), (0.9, 1.2), (0.9, 1.4), (0.5, 1.0))],
    "cap": [((-0.1, 0.1), (-1.3, -0.9), (0.9, 1.5), (0.5, 1.1))],
    "blaze": [((-0.08, 0.08), (-0.3, 0.1), (0.1, 0.25), (0.5, 1.0))],
    "ears": [((-0.9, -0.6), (-0.8, -0.2), (0.2, 0.4), (0.3, 0.5)), ((0.6, 0.9), (-0.8, -0.2), (0.2, 0.4), (0.3, 0.5))],
    "eyes": [
        ((-0.5, -0.3), (-0.2, 0.1), (0.15, 0.35), (0.2, 0.4)),
        ((0.3, 0.5), (-0.2, 0.1), (0.15, 0.35), (0.2, 0.4)),
    ],
    "patch": [((-0.8, 0.8), (-0.8, 0.8), (0.2, 0.5), (0.2, 0.5))],
}


def _fur(pixels: np.ndarray) -> np.ndarray:
    """Where a drawing [h, w, 4] has its most frequent colour, [h, w] bool: its eyes, nose and mouth stay out."""
    inside = pixels[..., 3] > 127
    coarse = pixels[..., :3].astype(np.int32) // 32
    keys = (coarse[..., 0] * 8 + coarse[..., 1]) * 8 + coarse[..., 2]
    commonest = np.bincount(keys[inside]).argmax()
    colour = pixels[inside & (keys == commonest), :3].mean(0)
    return inside & (np.abs(pixels[..., :3] - colour).sum(-1) < _NEAR)


def _mark(pixels: np.ndarray, rng: random.Random) -> np.ndarray:
    """One to three markings in other colours on the fur of a drawing [h, w, 4]."""
    height, width = pixels.shape[:2]
    fur = _fur(pixels)
    y = np.linspace(-1, 1, height)[:, None]
    x = np.linspace(-1, 1, width)[None]
    result = pixels.copy()
    for kind in rng.sample(list(_MARKINGS), rng.randint(1, 3)):
        colour = jitter(PALETTE[rng.choice(list(PALETTE))], rng, 18)
        for limits in _MARKINGS[kind]:
            centre_x, centre_y, half_width, half_height = (rng.uniform(*pair) for pair in limits)
            inside = ((x - centre_x) / half_width) ** 2 + ((y - centre_y) / half_height) ** 2 < 1
            result[inside & fur, :3] = colour
    return result


def _bend(pixels: np.ndarray, rng: random.Random) -> np.ndarray:
    """A drawing [h, w, 4] moved by a smooth random field of up to a tenth of its size."""
    amount = rng.uniform(0.03, 0.2)
    field = torch.tensor([rng.uniform(-amount, amount) for _ in range(32)]).view(1, 2, 4, 4)
    field = F.interpolate(field, pixels.shape[:2], mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    level = torch.eye(2, 3)[None] * rng.uniform(1.0, 1.15)  # room at the border for what moves outwards
    grid = F.affine_grid(level, (1, 4, *pixels.shape[:2]), align_corners=True) + field
    image = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None]
    image[:, :3] *= image[:, 3:] / 255  # transparent pixels must not darken the edge
    moved = F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=True)[0]
    moved[:3] /= (moved[3:] / 255).clamp(min=1e-3)
    return moved.permute(1, 2, 0).clamp(0, 255).byte().numpy()


def _paint_lines(pixels: np.ndarray, word: str, rng: random.Random) -> np.ndarray:
    """A line drawing [h, w, 4] in the colours of an animal: fields alike or in a second colour, lines dark."""
    fur = jitter(PALETTE[rng.choice(_FURS[word] if rng.random() < 0.8 else tuple(PALETTE))], rng, 18)
    second = jitter(PALETTE[rng.choice(("white", "black", "brown", "grey", "pink"))], rng, 18)
    colours = np.zeros((256, 3), np.uint8)
    colours[0] = shade(fur, -rng.uniform(0.2, 0.7)) if rng.random() < 0.6 else (35, 35, 40)
    for white in range(128, 256):
        main = white == 255 or rng.random() < 0.6
        colours[white] = fur if main else second
    result = pixels.copy()
    result[..., :3] = colours[pixels[..., 0]]
    return result


def _coloured(vendor: str, word: str, rng: random.Random) -> np.ndarray:
    """A vendor's drawing [h, w, 4], painted if it is a line drawing."""
    pixels = np.asarray(load_sprite(vendor, word))
    return _paint_lines(pixels, word, rng) if vendor in LINE_DRAWINGS else pixels


def _mix(pixels: np.ndarray, other: np.ndarray, rng: random.Random) -> np.ndarray:
    """A drawing [h, w, 4] that turns into another of the same animal along a random direction."""
    height, width = pixels.shape[:2]
    other = np.asarray(Image.fromarray(other, "RGBA").resize((width, height), Image.Resampling.BILINEAR))
    angle, reach = rng.uniform(0, 2 * np.pi), rng.uniform(0.05, 0.6)
    along = np.linspace(-1, 1, height)[:, None] * np.sin(angle) + np.linspace(-1, 1, width)[None] * np.cos(angle)
    share = 1 / (1 + np.exp(-(along - rng.uniform(-0.5, 0.5)) / reach))[..., None]
    first, second = (1 - share) * pixels[..., 3:], share * other[..., 3:]
    alpha = first + second
    colour = (first * pixels[..., :3] + second * other[..., :3]) / np.maximum(alpha, 1)
    return np.concatenate([colour, alpha], -1).clip(0, 255).astype(np.uint8)


def vary_drawing(sprite: Image.Image, animal: SceneObject, rng: random.Random) -> Image.Image:
    """An RGBA drawing, half the time mixed with another vendor's of the same animal, then at times marked and bent.

    Line drawings that are not repainted yet are painted first.
    """
    if animal.vendor in LINE_DRAWINGS and not animal.repainted:
        sprite = Image.fromarray(_paint_lines(np.asarray(sprite), animal.word, rng), "RGBA")
    if rng.random() < 0.5:
        vendor = rng.choice(vendors_of(animal.word, (*HELPER_VENDORS, *LINE_DRAWINGS)))
        sprite = Image.fromarray(_mix(np.asarray(sprite), _coloured(vendor, animal.word, rng), rng), "RGBA")
    if rng.random() < 0.6:
        return sprite
    pixels = np.asarray(sprite)
    if rng.random() < 0.6:
        pixels = _mark(pixels, rng)
    if rng.random() < 0.7:
        pixels = _bend(pixels, rng)
    return Image.fromarray(pixels, "RGBA")
