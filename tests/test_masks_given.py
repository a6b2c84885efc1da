"""Masks from boxes, polygons and JSON files of outlines."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from weaver.masks.compose import MaskError
from weaver.masks.files import load_mask
from weaver.masks.given import box_mask, polygon_mask, read_shapes


def test_boxes_in_pixels_and_in_parts():
    expected = torch.zeros(6, 8, dtype=torch.bool)
    expected[1:4, 2:7] = True
    assert torch.equal(box_mask((2, 1, 7, 4), (6, 8)), expected)
    assert torch.equal(box_mask((2 / 8, 1 / 6, 7 / 8, 4 / 6), (6, 8)), expected)
    assert box_mask((0, 0, 1, 1), (6, 8)).all()
    assert box_mask([0, 0, 8, 6], (6, 8)).all()


def test_a_box_takes_pixels_whose_centres_it_holds():
    assert box_mask((1.5, 0, 3.5, 6), (6, 8))[0].tolist() == [False, True, True, False, False, False, False, False]


def test_neighbouring_boxes_share_no_pixel():
    left, right = box_mask((0, 0, 0.37, 1), (5, 31)), box_mask((0.37, 0, 1, 1), (5, 31))
    assert not (left & right).any() and (left | right).all()


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((5, 1, 2, 4), "left < right <= 8"),
        ((0, 0, 9, 6), "left < right <= 8"),
        ((-1, 0, 4, 6), "left < right"),
        ((2, 2, 2, 5), "left < right"),
        ((1, 2, 3), "not four numbers"),
        ((0, 0, float("nan"), 1), "not four numbers"),
        ((0.51, 0.51, 0.52, 0.52), "covers no pixel of the 8x6 template"),
    ],
)
def test_impossible_boxes(box, message):
    with pytest.raises(MaskError, match=message):
        box_mask(box, (6, 8))


def test_a_polygon_of_a_box_is_the_box():
    corners = [(2, 1), (7, 1), (7, 4), (2, 4)]
    assert torch.equal(polygon_mask(corners, (6, 8)), box_mask((2, 1, 7, 4), (6, 8)))
    assert torch.equal(polygon_mask(corners[::-1], (6, 8)), box_mask((2, 1, 7, 4), (6, 8)))
    parts = [(x / 8, y / 6) for x, y in corners]
    assert torch.equal(polygon_mask(parts, (6, 8)), box_mask((2, 1, 7, 4), (6, 8)))


def test_a_polygon_with_many_corners_is_a_disc():
    corners = [(40 + 25 * math.cos(a), 30 + 25 * math.sin(a)) for a in np.linspace(0, 2 * math.pi, 720)[:-1]]
    y, x = np.mgrid[:60, :70] + 0.5
    distance = np.hypot(x - 40, y - 30)
    mask = polygon_mask(corners, (60, 70)).numpy()
    assert mask[distance < 24.99].all() and not mask[distance > 25].any()


def test_polygons_that_share_an_edge_share_no_pixel():
    left, right = [(0, 0), (31, 0), (0, 20)], [(31, 0), (31, 20), (0, 20)]
    left, right = polygon_mask(left, (20, 31)), polygon_mask(right, (20, 31))
    assert not (left & right).any() and (left | right).all()


def test_where_an_outline_goes_round_twice_is_outside():
    star = [(50 + 48 * math.sin(a), 50 - 48 * math.cos(a)) for a in (4 * math.pi * k / 5 for k in range(5))]
    mask = polygon_mask(star, (100, 100))
    assert not mask[50, 50] and mask[10, 50]


@pytest.mark.parametrize(
    ("polygon", "message"),
    [
        ([(0, 0), (5, 5)], "is not three or more corners"),
        ([(0, 0), (5, 5), (1, 2, 3)], "is not three or more corners"),
        ([(0, 0), (5, 5), (1, float("nan"))], "is not three or more corners"),
        ([(20, 20), (30, 20), (30, 30)], "covers no pixel of the 8x6 template"),
        ([(1, 1), (5, 1), (3, 1)], "covers no pixel of the 8x6 template"),
    ],
)
def test_impossible_polygons(polygon, message):
    with pytest.raises(MaskError, match=message):
        polygon_mask(polygon, (6, 8))


SHAPES = [
    {"label": "rex", "box": [2, 1, 7, 4]},
    {"label": "tom", "points": [[7, 4], [2, 1]], "shape_type": "rectangle"},
    {"label": "mia", "points": [[0, 0], [8, 0], [8, 6], [0, 6]], "shape_type": "polygon"},
    {"label": "rex", "polygon": [[0, 5], [8, 5], [8, 6], [0, 6]]},
]


def written(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_outlines_are_read_by_their_labels(tmp_path):
    path = written(tmp_path / "shapes.json", {"shapes": SHAPES})
    assert torch.equal(load_mask(path, (6, 8), label="tom"), box_mask((2, 1, 7, 4), (6, 8)))
    assert load_mask(path, (6, 8), label="mia").all() and load_mask(path, (6, 8)).all()
    rex = box_mask((2, 1, 7, 4), (6, 8)) | box_mask((0, 5, 8, 6), (6, 8))
    assert torch.equal(load_mask(path, (6, 8), label="rex"), rex)


def test_outlines_of_a_file_with_a_size_are_scaled(tmp_path):
    path = written(tmp_path / "shapes.json", {"imageWidth": 8, "imageHeight": 6, "shapes": SHAPES})
    assert torch.equal(load_mask(path, (60, 80), label="tom"), box_mask((20, 10, 70, 40), (60, 80)))
    with pytest.raises(MaskError, match="the mask is 8x6, expected the template's 64x64, or its"):
        load_mask(path, (64, 64), label="tom")


@pytest.mark.parametrize(
    ("outline", "expected"),
    [
        ({"box": [0, 0, 10, 10]}, (0, 0, 1, 1)),  # pixels of the file's picture, not parts of the template
        ({"box": [0, 0.2, 0.5, 1]}, (0, 12.8, 32, 64)),
        ({"polygon": [[0, 0], [10, 0], [10, 10], [0, 10]]}, (0, 0, 1, 1)),
        ({"points": [[-0.4, 0], [640.3, 320]], "shape_type": "rectangle"}, (0, 0, 64, 32)),
    ],
    ids=["pixels", "parts", "polygon", "a fraction outside"],
)
def test_numbers_are_of_the_file_s_own_picture(tmp_path, outline, expected):
    shapes = [{"label": "rex"} | outline]
    path = written(tmp_path / "shapes.json", {"imageWidth": 640, "imageHeight": 640, "shapes": shapes})
    assert torch.equal(
        load_mask(path, (64, 64), label="rex"), box_mask(expected, (64, 64)) if expected[2] > 1 else one_pixel()
    )


def one_pixel():
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[0, 0] = True
    return mask


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ([], 'holds no shapes, expected {"shapes"'),
        ({"shapes": [3]}, r"shapes\[0\]: is 3, expected a label with a box or a polygon"),
        ({"shapes": [{"label": "a"}]}, r"shapes\[0\]: expected one of box, polygon and points, found none"),
        ({"shapes": [{"points": [[1, 1]], "shape_type": "circle"}]}, "shape_type is 'circle', expected 'polygon'"),
        ({"shapes": [{"points": [[1, 1]], "shape_type": "rectangle"}]}, "a rectangle has two corners"),
        ({"shapes": [{"box": [1, 2, 3]}]}, r"box \[1, 2, 3\] is not four numbers"),
        ({"shapes": SHAPES[:1], "imageWidth": 8}, "expected both in pixels, or neither"),
    ],
)
def test_files_of_outlines_that_are_wrong(tmp_path, content, message):
    with pytest.raises(MaskError, match=message):
        read_shapes(written(tmp_path / "shapes.json", content))


def test_labels_and_outlines_that_are_not_there(tmp_path):
    path = written(tmp_path / "shapes.json", {"shapes": SHAPES})
    with pytest.raises(MaskError, match=r"label 'max' is nowhere in it; it holds 'rex', 'tom', 'mia'"):
        load_mask(path, (6, 8), label="max")
    with pytest.raises(MaskError, match=r"shapes\.json: box \[2, 1, 7, 4\] must be left < right <= 4"):
        load_mask(path, (6, 4), label="rex")
    with pytest.raises(MaskError, match="can't be read"):
        load_mask(tmp_path / "none.json", (6, 8))


def test_only_the_shapes_of_the_label_are_judged(tmp_path):
    """labelme's files hold points, lines and circles beside what is asked for."""
    others = [{"label": "eye", "points": [[1, 1]], "shape_type": "point"}, {"label": "edge", "points": 3}, 7]
    path = written(tmp_path / "shapes.json", {"shapes": [*others, {"label": "rex", "box": [2, 1, 7, 4]}]})
    assert torch.equal(load_mask(path, (6, 8), label="rex"), box_mask((2, 1, 7, 4), (6, 8)))
    with pytest.raises(MaskError, match=r"shapes\[0\]: shape_type is 'point'.*shapes\[2\]: is 7"):
        load_mask(path, (6, 8))
    with pytest.raises(MaskError, match=r"label 'tom' is nowhere in it; it holds 'eye', 'edge', None, 'rex'"):
        read_shapes(path, "tom")
