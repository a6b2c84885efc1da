"""The drawing of masks for people."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from weaver.masks.compose import compose_masks
from weaver.masks.overlay import concept_colour, draw_masks


@pytest.fixture
def masks():
    dense = torch.zeros(2, 64, 64)
    dense[0, 20:50, 4:28] = 1
    dense[1, 10:50, 36:60] = 1
    return compose_masks(dense)


def test_regions_are_tinted_apart_and_the_background_is_not(masks):
    image = Image.new("RGB", (64, 64), (100, 100, 100))
    drawing = draw_masks(image, masks, ["cat", "panda"])
    assert drawing.size == (512, 512)
    pixels = np.asarray(drawing)
    assert (pixels[4, 4] == 100).all()
    first, second = pixels[24 * 8, 8 * 8], pixels[14 * 8, 40 * 8]
    assert (first != 100).any() and (second != 100).any() and (first != second).any()


def test_names_are_written(masks):
    image = Image.new("RGB", (64, 64), (100, 100, 100))
    with_names = np.asarray(draw_masks(image, masks, ["cat", "panda", "beach"]))
    without = np.asarray(draw_masks(image, masks, []))
    rows, columns = np.nonzero((with_names != without).any(-1))
    assert columns.min() < 64 and rows.max() > 480  # the background's name, at the lower left
    assert (with_names == without)[: 8 * 10].all()


def test_input_is_untouched_and_large_pictures_keep_their_size(masks):
    image = Image.new("RGB", (64, 64), (1, 2, 3))
    draw_masks(image, masks, ["a", "b"])
    assert image.getcolors() == [(64 * 64, (1, 2, 3))]
    large = Image.new("L", (640, 512))
    assert draw_masks(large, masks, ["a", "b"]).size == (640, 512)


def test_empty_and_thin_regions_and_long_names(masks):
    thin = torch.zeros(3, 64, 64)
    thin[0, 0] = 1
    thin[2, 1:] = 1
    drawing = draw_masks(Image.new("RGB", (64, 64)), thin, ["a name longer than the picture is wide" * 3, "none"])
    assert drawing.size == (512, 512)


def test_what_masks_share_is_outlined_and_named():
    """The second lies in the first, and has no pixel alone."""
    dense = torch.zeros(2, 64, 64)
    dense[0, 8:56, 8:56], dense[1, 24:40, 24:40] = 1, 1
    shared = compose_masks(dense, overlap="share")
    image = Image.new("RGB", (64, 64), (100, 100, 100))
    drawing = np.asarray(draw_masks(image, shared, []))
    colours = [tuple(drawing[row, 32 * 8]) for row in range(24 * 8 - 8, 24 * 8 + 8)]
    assert concept_colour(1) in colours
    named, other = (np.asarray(draw_masks(image, shared, ["", name])) for name in ("cat", "panda"))
    assert (named != other)[24 * 8 : 40 * 8, 16 * 8 : 48 * 8].any()


def test_names_do_not_cover_each_other_and_keep_their_beginning(monkeypatch):
    """Two masks about one centre, one of them with a name that is too long at any size."""
    boxes, letters = [], []
    rectangle, text = ImageDraw.ImageDraw.rectangle, ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw, "rectangle", lambda draw, box, **kw: boxes.append(box) or rectangle(draw, box, **kw)
    )
    monkeypatch.setattr(
        ImageDraw.ImageDraw, "text", lambda draw, at, told, **kw: letters.append(told) or text(draw, at, told, **kw)
    )
    both = torch.zeros(3, 64, 64)
    both[0, 20:44, 20:32] = both[1, 20:44, 32:44] = 1
    both[2] = 1 - both[:2].sum(0)
    draw_masks(Image.new("RGB", (64, 64)), both, ["long " * 40, "short", "ground"])
    assert letters[0].startswith("long long") and letters[0].endswith("…") and letters[1:] == ["short", "ground"]
    assert all(0 <= left < right <= 512 and 0 <= top < low <= 512 for left, top, right, low in boxes)
    for (left, top, right, low), (x0, y0, x1, y1) in itertools.combinations(boxes, 2):
        assert left > x1 or right < x0 or top > y1 or low < y0
