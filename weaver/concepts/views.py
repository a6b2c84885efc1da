"""More views of a concept's pictures: smaller on a canvas or closer up, with captions that say so.

Custom Diffusion's augmentation (arXiv 2212.04488): what lies around the picture on its canvas is left out of the loss,
so a concept of few pictures is learned at every size and place, and not where its pictures happen to have it.
"""

from __future__ import annotations

import random

from PIL import Image

from weaver.concepts.framing import Framing
from weaver.concepts.images import TrainingSet
from weaver.concepts.prompts import caption_with
from weaver.pictures import fit

__all__ = ["with_views"]

_SMALLER = (0.4, 0.9)  # the picture's side, of the canvas'
_CLOSER = (1.2, 1.4)
_SMALLER_SHARE = 2 / 3  # of the views; the others are closer
_FAR = 0.6  # below this scale captions say that it is far away
_WORDS = {"far": ("far away", "very small"), "close": ("zoomed in", "close up")}
_CANVAS = (127, 127, 127)
_TRIES = 20
_LEAST_PIXELS = 64  # of the concept in a view


def with_views(data: TrainingSet, token: str, size: tuple[int, int], count: int, seed: int = 0) -> TrainingSet:
    """The pictures, and `count` more views of each.

    Parameters
    ----------
    size : (height, width) in pixels, to which all of them are brought
    token : which captions have; the words that tell how large it is stand before it
    """
    rng = random.Random(seed)
    found = [], [], [], []  # images, captions, masks, framings
    for image, caption, mask, framing in zip(
        data.images, data.captions, data.all_masks(), data.all_framings(), strict=True
    ):
        framing = framing.fitted(image.size[::-1], size)
        image = fit(image.convert("RGB"), size)
        mask = None if mask is None else fit(mask, size, Image.Resampling.BOX)
        entry = image, caption, mask, framing
        entries = [entry] + [_showing(entry, token, rng) for _ in range(count)]
        for whole, part in zip(found, zip(*entries, strict=True), strict=True):
            whole += part
    names = tuple(name for name in data.names for _ in range(count + 1))
    return TrainingSet(*map(tuple, found), names=names)


def _showing(entry: tuple, token: str, rng: random.Random) -> tuple:
    """A view in which something of the concept is left; the picture itself where none of several has that."""
    views = (_view(*entry, token, rng) for _ in range(_TRIES))
    return next((view for view in views if view[2].histogram()[255] >= _LEAST_PIXELS), entry)


def _view(
    image: Image.Image, caption: str, mask: Image.Image | None, framing: Framing, token: str, rng: random.Random
) -> tuple[Image.Image, str, Image.Image, Framing]:
    smaller = rng.random() < _SMALLER_SHARE
    scale = rng.uniform(*(_SMALLER if smaller else _CLOSER))
    size = tuple(max(8, round(side * scale)) for side in image.size)
    corner = tuple(rng.randint(*sorted((0, side - own))) for side, own in zip(image.size, size, strict=True))
    canvas, region = Image.new("RGB", image.size, _CANVAS), Image.new("L", image.size, 0)
    canvas.paste(image.resize(size, Image.Resampling.LANCZOS), corner)
    mask = Image.new("L", image.size, 255) if mask is None else mask
    region.paste(mask.resize(size, Image.Resampling.BOX), corner)
    if scale < _FAR or not smaller:
        words = rng.choice(_WORDS["far" if smaller else "close"])
        caption = caption_with(caption, token, f"{words} {token}")
    canvas_size = image.size[::-1]
    framing = framing.smaller(canvas_size, scale) if smaller else framing.closer(canvas_size, scale, corner[::-1])
    return canvas, caption, region, framing
