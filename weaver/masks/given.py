"""Masks from outlines: boxes and polygons, written out or in a JSON file as annotation tools leave it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from weaver.errors import told
from weaver.masks.compose import MaskError
from weaver.values import is_number

__all__ = ["box_mask", "in_pixels", "is_shapes_file", "polygon_mask", "read_shapes", "shapes_mask"]


def in_pixels(numbers: Sequence[float], size: tuple[int, int]) -> list[float]:
    """Coordinates x, y, x, y, ... in pixels of `size` (height, width): they are, or all are parts of it in 0..1."""
    height, width = size
    if all(0 <= value <= 1 for value in numbers):
        return [value * (height if place % 2 else width) for place, value in enumerate(numbers)]
    return [float(value) for value in numbers]


def box_mask(box: Sequence[float], size: tuple[int, int]) -> torch.Tensor:
    """Make a mask [height, width] bool of the pixels whose centres are in a box (left, top, right, bottom).

    The box is in pixels of `size` (height, width), or in parts of it when all four numbers lie in 0..1.
    Raises `MaskError` when the box is empty, turned round or outside.
    """
    numbers = [float(value) for value in box]
    if len(numbers) != 4 or not np.isfinite(numbers).all():
        raise MaskError(f"box {list(box)} is not four numbers (left, top, right, bottom)")
    return _in_box(in_pixels(numbers, size), size, box)


def _in_box(numbers: Sequence[float], size: tuple[int, int], box: Sequence[float]) -> torch.Tensor:
    """`box_mask` of numbers in pixels; `box` is what was given."""
    (height, width), (left, top, right, bottom) = size, numbers
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise MaskError(
            f"box {list(box)} must be left < right <= {width} and top < bottom <= {height}, in pixels or in parts of 1"
        )
    x, y = np.arange(width) + 0.5, np.arange(height) + 0.5
    mask = ((top <= y) & (y < bottom))[:, None] & ((left <= x) & (x < right))[None]
    if not mask.any():
        raise MaskError(f"box {list(box)} covers no pixel of the {width}x{height} template")
    return torch.from_numpy(mask)


def polygon_mask(polygon: Sequence[Sequence[float]], size: tuple[int, int]) -> torch.Tensor:
    """Make a mask [height, width] bool of the pixels whose centres are in a polygon [(x, y), ...], closed by itself.

    Corners are in pixels of `size` (height, width), or in parts of it when all of them lie in 0..1; they may lie
    outside. Where the outline crosses itself, what it goes round an even number of times is outside.

    Raises `MaskError` for less than three corners and for a polygon that covers no pixel.
    """
    rows = _corners(polygon)
    return _in_polygon(in_pixels([value for row in rows for value in row], size), size, rows)


def _in_polygon(numbers: Sequence[float], size: tuple[int, int], rows: Sequence) -> torch.Tensor:
    """`polygon_mask` of numbers x, y, x, y, ... in pixels; `rows` are what was given."""
    (height, width), corners = size, np.reshape(numbers, (-1, 2))
    ends = np.roll(corners, -1, 0)
    mask = np.zeros((height, width), dtype=bool)
    centres = np.arange(width) + 0.5
    for row in range(height):
        y = row + 0.5
        crossed = (corners[:, 1] <= y) != (ends[:, 1] <= y)
        (x0, y0), (x1, y1) = corners[crossed].T, ends[crossed].T
        crossings = np.sort(x0 + (y - y0) * (x1 - x0) / (y1 - y0))
        mask[row] = np.searchsorted(crossings, centres, side="right") % 2 == 1
    if not mask.any():
        raise MaskError(f"polygon {told(rows)} covers no pixel of the {width}x{height} template")
    return torch.from_numpy(mask)


def _corners(polygon: Sequence[Sequence[float]]) -> list[list[float]]:
    rows = [list(corner) if isinstance(corner, Sequence | np.ndarray) else [corner] for corner in polygon]
    if len(rows) < 3 or any(len(row) != 2 or not all(map(is_number, row)) for row in rows):
        raise MaskError(f"polygon {told(rows)} is not three or more corners [x, y]")
    return rows


def is_shapes_file(path: str | os.PathLike) -> bool:
    """Whether a mask's file is one of outlines, and no picture."""
    return Path(path).suffix.lower() == ".json"


def read_shapes(
    path: str | os.PathLike, label: int | str | None = None
) -> tuple[list[tuple[str | None, str, list]], tuple[int, int] | None]:
    """Read the outlines of a JSON file: of labelme, or written by hand in the same layout.

    ``{"imageWidth": 640, "imageHeight": 480, "shapes": [{"label": "rex", "polygon": [[x, y], ...]}, {"label": "tom",
    "box": [left, top, right, bottom]}]}``, or labelme's `points` and `shape_type` ("polygon" or "rectangle"). Without
    a size, outlines are in pixels of the template's file, or in parts of 1.

    Returns (label, "box" or "polygon", numbers) of every shape, with `label` of those that have it, and (height, width)
    or None. Raises `MaskError` with every entry among them that is wrong, or with the labels there are.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise MaskError(f"{path}: can't be read ({error.strerror})") from error
    except ValueError as error:
        raise MaskError(f"{path}: not valid JSON ({error})") from error
    entries = content.get("shapes") if isinstance(content, Mapping) else None
    if not isinstance(entries, list) or not entries:
        raise MaskError(f'{path}: holds no shapes, expected {{"shapes": [{{"label": "rex", "box": [...]}}, ...]}}')
    shapes, reasons = [], []
    label, labels = _text(label), [_label(entry) for entry in entries]
    if label is not None and label not in labels:
        there = ", ".join(dict.fromkeys(map(repr, labels)))
        raise MaskError(f"{path}: label {label!r} is nowhere in it; it holds {there}")
    for number, entry in enumerate(entries):
        if label is not None and labels[number] != label:
            continue
        try:
            shapes.append(_shape(entry))
        except MaskError as error:
            reasons.append(f"shapes[{number}]: {error}")
    sides = [content.get("imageHeight"), content.get("imageWidth")]
    given = [side for side in sides if side is not None]
    if len(given) == 1 or not all(is_number(side) and side >= 1 for side in given):
        reasons.append(f"imageHeight and imageWidth are {sides}, expected both in pixels, or neither")
    if reasons:
        raise MaskError(f"{path}: " + "; ".join(reasons))
    return shapes, (int(sides[0]), int(sides[1])) if given else None


def same_shape(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes (height, width) are of one shape, to within a pixel of the smaller."""
    (h, w), (height, width) = sorted((tuple(size), tuple(other)))
    return abs(w - width * h / height) < 1 or abs(h - height * w / width) < 1


def shapes_mask(path: str | os.PathLike, size: tuple[int, int], label: str | int | None) -> torch.Tensor:
    """A mask [height, width] bool of the shapes of a JSON file with one label, all of them together without a label.

    It has `size` (height, width), to which outlines are scaled, or where the file says that its picture has another
    shape, that picture's size. A box that is outside by a pixel at most, as tools leave it, ends at the edge. Raises
    `MaskError`.
    """
    shapes, own = read_shapes(path, label)
    drawn_at = size if own is None or same_shape(own, size) else own
    try:
        drawn = [_drawn(kind, numbers, own or size, drawn_at) for _, kind, numbers in shapes]
    except MaskError as error:
        raise MaskError(f"{path}: {error}") from error
    return torch.stack(drawn).any(0)


def _drawn(kind: str, given: list, own: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
    """A mask of `size` of an outline in pixels of a picture of the size `own`, or in parts of it."""
    flat = given if kind == "box" else [value for corner in given for value in corner]
    scale = size[1] / own[1], size[0] / own[0]
    numbers = [value * scale[place % 2] for place, value in enumerate(in_pixels(flat, own))]
    if kind == "polygon":
        return _in_polygon(numbers, size, given)
    for place, value in enumerate(numbers):
        inside = min(max(value, 0.0), float(size[1 - place % 2]))
        numbers[place] = inside if abs(inside - value) <= scale[place % 2] else value
    return _in_box(numbers, size, given)


def _label(entry: object) -> str | None:
    return _text(entry.get("label")) if isinstance(entry, Mapping) else None


def _text(label: object) -> str | None:
    return None if label is None else str(label)


def _shape(entry: object) -> tuple[str | None, str, list]:
    """(label, kind, numbers) of one entry, labelme's or ours."""
    if not isinstance(entry, Mapping):
        raise MaskError(f"is {told(entry)}, expected a label with a box or a polygon")
    kinds = [kind for kind in ("box", "polygon", "points") if isinstance(entry.get(kind), list)]
    if len(kinds) != 1:
        raise MaskError(f"expected one of box, polygon and points, found {' and '.join(kinds) or 'none'}")
    kind, numbers = kinds[0], entry[kinds[0]]
    if kind == "points":
        kind = {"polygon": "polygon", "rectangle": "box"}.get(str(entry.get("shape_type", "polygon")))
        if kind is None:
            raise MaskError(f"shape_type is {told(entry['shape_type'])}, expected 'polygon' or 'rectangle'")
        if kind == "box":
            try:
                (x0, y0), (x1, y1) = numbers
                numbers = [min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)]
            except (TypeError, ValueError) as error:
                raise MaskError(f"a rectangle has two corners [x, y], found {told(numbers)}") from error
    if kind == "box" and (len(numbers) != 4 or not all(map(is_number, numbers))):
        raise MaskError(f"box {told(numbers)} is not four numbers (left, top, right, bottom)")
    if kind == "polygon":
        _corners(numbers)
    return _label(entry), kind, numbers
