"""Repaint flat drawings: their few colours are mapped to other colours of a named palette.

Appearance variety in training is what lets a concept be learned by cross-attention keys and values alone: a base that
has seen cats in one colour only cannot be moved to a black and white one.
"""

from __future__ import annotations

import random
from functools import cache

import numpy as np
from PIL import Image

from weaver.embedded.drawings import load_sprite

__all__ = ["PALETTE", "Colour", "jitter", "repaint_sprite", "shade"]

Colour = tuple[int, int, int]

PALETTE: dict[str, Colour] = {
    "red": (215, 50, 50),
    "orange": (240, 140, 40),
    "yellow": (245, 205, 70),
    "green": (70, 180, 80),
    "blue": (60, 120, 220),
    "purple": (140, 70, 190),
    "pink": (240, 140, 180),
    "black": (45, 45, 55),
    "white": (240, 240, 240),
    "grey": (135, 140, 150),
    "brown": (130, 85, 55),
}
LEVELS = 6  # colours of a flat drawing


def jitter(colour: Colour, rng: random.Random, amount: float) -> Colour:
    """`colour` with every channel moved by at most `amount`."""
    return tuple(int(min(255, max(0, channel + rng.uniform(-amount, amount)))) for channel in colour)


def shade(colour: Colour, amount: float) -> Colour:
    """`colour` moved towards white (`amount` > 0) or black (`amount` < 0); 1 and -1 reach them."""
    target = 255 if amount > 0 else 0
    return tuple(int(channel + (target - channel) * abs(amount)) for channel in colour)


@cache
def _levels(vendor: str, animal: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels' palette index [h, w] (255 outside the drawing), the palette [6, 3] and the indices by area."""
    pixels = np.asarray(load_sprite(vendor, animal))
    inside = pixels[..., 3] > 100
    # The quantiser must see the drawing only, or it spends entries on the transparent ground.
    strip = Image.fromarray(pixels[inside][None, :, :3].copy(), "RGB").quantize(LEVELS, Image.Quantize.MEDIANCUT)
    labels = np.full(inside.shape, 255, np.uint8)
    labels[inside] = np.asarray(strip)[0]
    palette = np.zeros((LEVELS, 3), np.float32)
    entries = np.array(strip.getpalette(), np.float32).reshape(-1, 3)[:LEVELS]
    palette[: len(entries)] = entries
    areas = np.bincount(labels[inside], minlength=LEVELS)[:LEVELS]
    return labels, palette, np.argsort(-areas, kind="stable")


def repaint_sprite(vendor: str, animal: str, rng: random.Random, main: str, second: str | None) -> Image.Image:
    """The drawing with its largest colour turned to `main`, its second largest to `second`, others at times."""
    labels, palette, order = _levels(vendor, animal)
    pixels = np.asarray(load_sprite(vendor, animal)).astype(np.float32)
    targets = {int(order[0]): np.asarray(jitter(PALETTE[main], rng, 18), np.float32)}
    if second is not None:
        targets[int(order[1])] = np.asarray(jitter(PALETTE[second], rng, 18), np.float32)
    for level in map(int, order[1:]):
        if level in targets:
            continue
        if np.abs(palette[level] - palette[order[0]]).sum() < 90:  # a shade of the main colour stays one
            targets[level] = targets[int(order[0])] * rng.uniform(0.75, 1.1)
        elif rng.random() < 0.25:
            targets[level] = np.asarray(jitter(PALETTE[rng.choice(list(PALETTE))], rng, 18), np.float32)
    for level, colour in targets.items():
        mask = labels == level
        pixels[mask, :3] = np.clip(pixels[mask, :3] - palette[level], -40, 40) * 0.6 + colour
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8), "RGBA")
