"""Procedural backgrounds of the embedded world: four the base model learns, two held out to be learned as concepts.

A background is a sky, one feature (mountains, sea, trees, moon and stars) and a ground. Training scenes repaint the
three parts with palette colours (:mod:`weaver.embedded.repaint`); that variety is what lets cross-attention weights
alone learn a new background.
"""

from __future__ import annotations

import random

import numpy as np
from PIL import Image, ImageDraw

from weaver.embedded.repaint import Colour, jitter, shade

__all__ = ["BACKGROUNDS", "HELD_OUT_BACKGROUNDS", "draw_background"]

# kind -> (sky top, sky bottom, feature, ground top, ground bottom)
BACKGROUNDS: dict[str, tuple[Colour, ...]] = {
    "mountain": ((135, 190, 240), (215, 235, 250), (112, 112, 138), (112, 180, 84), (80, 145, 64)),
    "beach": ((120, 200, 250), (205, 240, 255), (40, 140, 205), (246, 224, 164), (232, 202, 132)),
    "forest": ((170, 215, 235), (215, 238, 225), (38, 112, 62), (92, 150, 66), (66, 118, 54)),
    "night": ((16, 16, 58), (52, 46, 110), (246, 240, 200), (36, 52, 66), (22, 32, 44)),
}
# name -> (class word, palette): drawn by the class's own painter, in colours no caption of training tells.
HELD_OUT_BACKGROUNDS: dict[str, tuple[str, tuple[Colour, ...]]] = {
    "sunset-mountain": ("mountain", ((250, 120, 90), (255, 215, 130), (96, 48, 110), (150, 84, 96), (104, 52, 78))),
    "autumn-forest": ("forest", ((250, 226, 178), (255, 242, 214), (216, 106, 34), (190, 142, 74), (150, 98, 50))),
}


def _gradient(pixels: np.ndarray, top: int, bottom: int, first: Colour, last: Colour) -> None:
    ramp = np.linspace(0.0, 1.0, max(bottom - top, 1))[:, None]
    rows = np.asarray(first) * (1 - ramp) + np.asarray(last) * ramp
    pixels[top:bottom] = rows[: max(bottom - top, 0), None, :]


def _mountains(draw: ImageDraw.ImageDraw, rng: random.Random, size: int, horizon: int, colour: Colour) -> None:
    for _ in range(3):
        x, height = rng.uniform(0, size), rng.uniform(0.26, 0.44) * size
        width = height * rng.uniform(0.95, 1.3)
        draw.polygon([(x - width, horizon), (x, horizon - height), (x + width, horizon)], fill=jitter(colour, rng, 10))
        cap = [(x - width * 0.28, horizon - height * 0.72), (x, horizon - height)]
        draw.polygon([*cap, (x + width * 0.28, horizon - height * 0.72)], fill=shade(colour, 0.85))


def _sea(draw: ImageDraw.ImageDraw, rng: random.Random, size: int, horizon: int, colour: Colour) -> None:
    shore = horizon - size // 6
    draw.rectangle([0, shore, size, horizon], fill=colour)
    draw.rectangle([0, horizon - size // 24, size, horizon], fill=shade(colour, 0.45))
    x, radius = rng.uniform(0.12, 0.88) * size, 0.07 * size
    draw.ellipse([x - radius, 0.07 * size, x + radius, 0.07 * size + 2 * radius], fill=(255, 226, 90))


def _trees(draw: ImageDraw.ImageDraw, rng: random.Random, size: int, horizon: int, colour: Colour) -> None:
    for index in range(6):
        x, height = size * (index + rng.uniform(0.2, 0.8)) / 6, rng.uniform(0.34, 0.5) * size
        crown = jitter(colour, rng, 16)
        draw.rectangle([x - 3, horizon - height * 0.3, x + 3, horizon + 4], fill=(104, 74, 48))
        draw.ellipse([x - 0.1 * size, horizon - height, x + 0.1 * size, horizon - height * 0.22], fill=crown)


def _moon(draw: ImageDraw.ImageDraw, rng: random.Random, size: int, horizon: int, colour: Colour) -> None:
    for _ in range(9):
        x, y = rng.uniform(0, size), rng.uniform(0, horizon)
        draw.ellipse([x - 1.6, y - 1.6, x + 1.6, y + 1.6], fill=colour)
    x, radius = rng.uniform(0.12, 0.88) * size, 0.085 * size
    draw.ellipse([x - radius, 0.06 * size, x + radius, 0.06 * size + 2 * radius], fill=colour)


_PAINTERS = {"mountain": _mountains, "beach": _sea, "forest": _trees, "night": _moon}


def draw_background(
    kind: str,
    rng: random.Random,
    size: int,
    feature: Colour | None = None,
    repainted: tuple[Colour, Colour] | None = None,
) -> Image.Image:
    """Draw one background.

    Parameters
    ----------
    kind : a key of ``BACKGROUNDS`` or ``HELD_OUT_BACKGROUNDS``.
    rng : source of the arrangement and of small colour changes.
    size : side of the square picture, pixels.
    feature : colour of mountains, sea, trees or moon instead of the usual one.
    repainted : colours of the sky and of the ground instead of the usual ones.
    """
    word, palette = HELD_OUT_BACKGROUNDS.get(kind) or (kind, BACKGROUNDS[kind])
    sky_top, sky_bottom, usual, ground_top, ground_bottom = (jitter(colour, rng, 8) for colour in palette)
    if repainted is not None:
        sky, ground = repainted
        sky_top, sky_bottom, ground_top, ground_bottom = sky, shade(sky, 0.5), ground, shade(ground, -0.25)
    horizon = int(size * rng.uniform(0.5, 0.64))
    pixels = np.empty((size, size, 3), np.float32)
    _gradient(pixels, 0, horizon, sky_top, sky_bottom)
    _gradient(pixels, horizon, size, ground_top, ground_bottom)
    image = Image.fromarray(pixels.astype(np.uint8), "RGB")
    _PAINTERS[word](ImageDraw.Draw(image), rng, size, horizon, feature or usual)
    return image
