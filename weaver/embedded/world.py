"""The embedded world: scenes of one to four animals before a background, with captions and true masks.

Everything is drawn from a seeded :class:`random.Random`; the same seed gives the same scene. The world is what the
embedded model is trained on, what its helpers learn their truth from, and what the demonstration's pictures come from.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from weaver.embedded.backgrounds import BACKGROUNDS, HELD_OUT_BACKGROUNDS, draw_background
from weaver.embedded.captions import caption_of, partial_caption
from weaver.embedded.drawings import ANIMALS, TRAINING_VENDORS, load_sprite, vendors_of
from weaver.embedded.repaint import PALETTE, repaint_sprite

__all__ = ["IMAGE_SIZE", "Scene", "SceneObject", "draw_scene"]

IMAGE_SIZE = 64
_CANVAS = 128  # drawn at twice the size, then averaged

# Where an object stands: (centre x, centre y, size) as fractions of the picture, each with (least, most).
Spot = tuple[tuple[float, float], tuple[float, float], tuple[float, float]]

# The spots of n objects.
_LAYOUTS: dict[int, list[Spot]] = {
    1: [((0.24, 0.76), (0.5, 0.7), (0.4, 0.64))],
    2: [((0.23, 0.31), (0.52, 0.7), (0.40, 0.54)), ((0.69, 0.77), (0.52, 0.7), (0.40, 0.54))],
    3: [
        ((0.19, 0.25), (0.58, 0.76), (0.36, 0.42)),
        ((0.45, 0.55), (0.34, 0.6), (0.36, 0.42)),
        ((0.75, 0.81), (0.58, 0.76), (0.36, 0.42)),
    ],
    4: [
        ((0.22, 0.3), (0.26, 0.34), (0.36, 0.42)),
        ((0.7, 0.78), (0.26, 0.34), (0.36, 0.42)),
        ((0.22, 0.3), (0.7, 0.78), (0.36, 0.42)),
        ((0.7, 0.78), (0.7, 0.78), (0.36, 0.42)),
    ],
}
_LEAST_VISIBLE = 0.7  # share of an object that others may not cover


@dataclass(frozen=True)
class SceneObject:
    """One animal of a scene: its word, the colour its caption tells (or None), whose drawing it is, if repainted."""

    word: str
    colour: str | None
    vendor: str
    repainted: bool

    @property
    def phrase(self) -> str:
        """Its words in a caption: "a dog", "an orange cat"."""
        if self.colour is None:
            return f"a {self.word}"
        return f"{'an' if self.colour[0] in 'aeiou' else 'a'} {self.colour} {self.word}"


@dataclass(frozen=True)
class Scene:
    """A picture [64, 64] RGB, its labels [64, 64] (0 background, i the i-th object), and what it shows."""

    image: Image.Image
    labels: np.ndarray
    objects: tuple[SceneObject, ...]
    background: str
    background_words: str
    background_repainted: bool

    @property
    def caption(self) -> str:
        """All that the scene shows: "a dog and an orange cat, beach background"."""
        return caption_of([animal.phrase for animal in self.objects], self.background_words)

    def training_caption(self, rng: random.Random) -> str:
        """A caption that at times leaves animals or the background out, see `captions.partial_caption`."""
        return partial_caption([animal.phrase for animal in self.objects], self.background_words, rng)

    def mask(self, index: int) -> np.ndarray:
        """The true mask [64, 64] bool of object `index` (0-based)."""
        return self.labels == index + 1


def _draw_animal(word: str, vendor: str, rng: random.Random, varied: bool) -> tuple[Image.Image, SceneObject]:
    """The sprite of one animal, repainted at times, and what the scene says of it."""
    if not varied or rng.random() > 0.5:
        return load_sprite(vendor, word), SceneObject(word, None, vendor, repainted=False)
    main = rng.choice(list(PALETTE))
    second = rng.choice(list(PALETTE)) if rng.random() < 0.6 else None
    told = main if rng.random() < 0.9 else None
    return repaint_sprite(vendor, word, rng, main, second), SceneObject(word, told, vendor, repainted=True)


def _draw_ground(kind: str, rng: random.Random, varied: bool) -> tuple[Image.Image, str, bool]:
    """The background's picture, its words in the caption (always told), and whether it is repainted."""
    word = HELD_OUT_BACKGROUNDS[kind][0] if kind in HELD_OUT_BACKGROUNDS else kind
    if not varied or rng.random() > 0.2:
        return draw_background(kind, rng, _CANVAS), word, False
    colour, sky, ground = (rng.choice(list(PALETTE)) for _ in range(3))
    repainted = (PALETTE[sky], PALETTE[ground]) if rng.random() < 0.5 else None
    image = draw_background(kind, rng, _CANVAS, feature=PALETTE[colour], repainted=repainted)
    return image, f"{colour} {word}", True


def _place(sprite: Image.Image, spot: Spot, rng: random.Random) -> tuple[Image.Image, tuple[int, int]]:
    """Scale, stretch, tilt and mirror a sprite, and choose its top left corner inside the canvas."""
    centre_x, centre_y, side = (rng.uniform(*limits) * _CANVAS for limits in spot)
    scale = side / max(sprite.size)
    width = max(1, round(sprite.width * scale * rng.uniform(0.9, 1.1)))
    sprite = sprite.resize((width, max(1, round(sprite.height * scale))), Image.Resampling.BILINEAR)
    if rng.random() < 0.5:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.5:
        sprite = sprite.rotate(rng.uniform(-10, 10), Image.Resampling.BICUBIC, expand=True)
    left = min(max(round(centre_x - sprite.width / 2), 0), max(_CANVAS - sprite.width, 0))
    top = min(max(round(centre_y - sprite.height / 2), 0), max(_CANVAS - sprite.height, 0))
    return sprite, (left, top)


def _compose(sprites: list[Image.Image], spots: Sequence[Spot], rng: random.Random) -> tuple[list, np.ndarray]:
    """Place all sprites so that each stays visible; returns the placements and the label map at canvas size."""
    while True:
        placed, areas = [], []
        labels = Image.new("L", (_CANVAS, _CANVAS), 0)
        for number, (sprite, spot) in enumerate(zip(sprites, spots, strict=True), start=1):
            drawn, corner = _place(sprite, spot, rng)
            solid = drawn.getchannel("A").point(lambda alpha: 255 if alpha > 127 else 0)
            labels.paste(number, corner, solid)
            areas.append(int((np.asarray(solid) > 0).sum()))
            placed.append((drawn, corner))
        label_map = np.asarray(labels)
        if all((label_map == i + 1).sum() >= _LEAST_VISIBLE * area for i, area in enumerate(areas)):
            return placed, label_map


def draw_scene(
    rng: random.Random,
    *,
    animals: list[str] | None = None,
    count: int | None = None,
    background: str | None = None,
    spots: Sequence[Spot] | None = None,
    vendors: tuple[str, ...] = TRAINING_VENDORS,
    varied: bool = True,
    alter: Callable[[Image.Image, SceneObject, random.Random], Image.Image] | None = None,
) -> Scene:
    """Draw one scene.

    Parameters
    ----------
    rng : source of every choice.
    animals : the animals from left to right, top to bottom (default: `count` drawn at random, repeats allowed).
    count : number of animals, 1 to 4 (default: mostly one or two).
    background : a key of ``BACKGROUNDS`` or ``HELD_OUT_BACKGROUNDS`` (default: one of the learned ones).
    spots : where the animals stand (default: all over the picture, as their number allows).
    vendors : whose drawings to take.
    varied : repaint drawings and backgrounds. Captions tell it, but for a tenth of the animals: what a word alone
        means stays the usual drawing, and guidance does not drift to odd colours.
    alter : changes every RGBA drawing before it is placed, told what it is.
    """
    kind = background or rng.choice(list(BACKGROUNDS))
    if animals is None:
        count = count or rng.choices((1, 2, 3, 4), (0.36, 0.44, 0.12, 0.08))[0]
        animals = [rng.choice(ANIMALS) for _ in range(count)]
    ground, ground_words, ground_repainted = _draw_ground(kind, rng, varied)
    sprites, objects = [], []
    for word in animals:
        vendor = rng.choice(vendors_of(word, vendors))
        sprite, animal = _draw_animal(word, vendor, rng, varied)
        sprites.append(sprite if alter is None else alter(sprite, animal, rng))
        objects.append(animal)
    placed, labels = _compose(sprites, spots or _LAYOUTS[len(sprites)], rng)
    for sprite, corner in placed:
        ground.paste(sprite, corner, sprite)
    size = (IMAGE_SIZE, IMAGE_SIZE)
    labels = np.asarray(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))
    return Scene(
        image=ground.resize(size, Image.Resampling.BOX),
        labels=labels,
        objects=tuple(objects),
        background=kind,
        background_words=ground_words,
        background_repainted=ground_repainted,
    )
