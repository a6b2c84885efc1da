"""Masks from files: pictures of every common kind, and outlines in JSON."""

from __future__ import annotations

import os

import numpy as np
import torch
from PIL import Image, ImageColor

from weaver.masks.compose import MaskError
from weaver.masks.given import is_shapes_file, same_shape, shapes_mask
from weaver.pictures import fit, open_picture, telling_alpha

__all__ = ["load_mask"]

_SHOWN = 12  # labels in a message
_EVEN = 1 / 16  # of full scale, that the pixels of one colour differ by at most, as in a JPEG


def load_mask(
    path: str | os.PathLike,
    size: tuple[int, int],
    *,
    source_size: tuple[int, int] | None = None,
    label: int | str | None = None,
) -> torch.Tensor:
    """Read one mask from a picture file, white, opaque or labelled inside, or from a JSON file of outlines.

    Inside is, by the kind of picture: where transparency varies, alpha of a half and more; a palette with colours
    (a label map), every colour but black; grey or colour, the brightest channel at half of full scale and more; a
    grey picture that holds 0 and 1 only, 1. Alpha that is the same everywhere says nothing, so that a picture without
    any transparent pixel is read as if it had no alpha; where it has no dark pixel either, but several colours, it is
    refused, as one that was saved without its transparency. `label` instead picks the pixels of one palette index or
    grey level, of one colour ("#e69f00"), or the outlines of one name (`weaver.masks.given`).

    A mask has the shape of `size` (height, width), at any size, or that of `source_size`, the template file's own:
    then it is cut about its centre as the template is. What is larger is averaged over areas, what is smaller enlarged
    smoothly, and half or more is inside.

    Returns [height, width] bool. Raises `MaskError` for another shape, an empty mask, one that has no outside though it
    has several colours, or a label that is not in it, `PictureError` for a picture that can't be read.
    """
    if is_shapes_file(path):
        values = shapes_mask(path, source_size or size, label).numpy()
    else:
        values = _inside(open_picture(path), path, label)
    held = values.any()
    if values.shape != tuple(size):
        wanted = dict.fromkeys(map(tuple, [size] if source_size is None else [size, source_size]))
        if not any(same_shape(values.shape, shape) for shape in wanted):
            sizes = " or ".join(f"{w}x{h}" for h, w in wanted)
            height, width = values.shape
            raise MaskError(
                f"{path}: the mask is {width}x{height}, expected the template's {sizes}, or its shape at another size; "
                "draw it on the template"
            )
        picture = Image.fromarray(values.astype(np.float32))
        shrinks = values.shape[0] > size[0]
        way = Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR
        values = np.asarray(fit(picture, size, way)) >= 0.5
    if not values.any():
        hint = ": what is inside is cut off, or too small at the template's size" if held else _hint(path)
        raise MaskError(f"{path}: the mask is empty{hint}")
    return torch.from_numpy(np.array(values))


def _hint(path: str | os.PathLike) -> str:
    """What a picture without anything inside may have been meant to be."""
    if is_shapes_file(path):
        return ""
    image = open_picture(path)
    if telling_alpha(image) is not None:
        return ": none of it is opaque by a half; paint it solid"
    levels = np.unique(np.asarray(image)) if image.mode in ("L", "P") else ()
    if 1 < len(levels) <= _SHOWN:
        return f", nothing in it is bright; pick one of its levels {', '.join(map(str, levels))} by label"
    return ": nothing in it is as bright as half of white"


def _inside(image: Image.Image, path, label: int | str | None) -> np.ndarray:
    if isinstance(label, str):
        return _of_colour(image, path, label)
    if label is not None:
        if image.mode not in ("P", "L", "1", "I") and not image.mode.startswith("I;16"):
            raise MaskError(f"{path}: label {label} needs a palette or grey picture, this one is {image.mode}")
        levels = np.asarray(image)
        if not (levels == label).any():
            there = ", ".join(str(int(level)) for level in np.unique(levels)[:_SHOWN])
            raise MaskError(f"{path}: label {label} is nowhere in it; it holds {there}")
        return levels == label
    if (alpha := telling_alpha(image)) is not None:
        return np.asarray(alpha) >= 128
    values, inside = _opaque(image)
    if inside.all() and np.ptp(values, axis=(0, 1)).max() > _EVEN:
        raise MaskError(
            f"{path}: no pixel is transparent or dark, so that all of it would be inside, though it has several "
            "colours: save it with its transparency, paint black what is outside, or pick one colour by label"
        )
    return inside


def _opaque(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """The values of a picture without transparency, [height, width, channels] in 0..1, and what of it is inside."""
    if image.mode == "P":
        colours = np.asarray(image.convert("RGB"))
        if (colours != colours[..., :1]).any():
            return colours / 255, colours.any(-1)
        image = image.convert("L")
    if image.mode in ("1", "L", "I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image)
        full = {"1": 1, "L": 255, "F": 1}.get(image.mode, 65535)
        return values[..., None] / full, values >= (1 if values.max() <= 1 else full / 2)
    values = np.asarray(image.convert("RGB"))
    return values / 255, values.max(-1) >= 128


def _of_colour(image: Image.Image, path, label: str) -> np.ndarray:
    """The pixels of one colour, "#e69f00"."""
    try:
        colour = ImageColor.getrgb(label)[:3]
    except ValueError:
        raise MaskError(
            f"{path}: label {label!r} is neither a number (of a palette or grey level) nor a colour such as '#e69f00'"
        ) from None
    colours = np.asarray(image.convert("RGB"))
    inside = (colours == colour).all(-1)
    if not inside.any():
        kinds, counts = np.unique(colours.reshape(-1, 3), axis=0, return_counts=True)
        there = ", ".join("#{:02x}{:02x}{:02x}".format(*kinds[i]) for i in np.argsort(-counts)[:_SHOWN])
        raise MaskError(f"{path}: no pixel has the colour {label}; it holds {there}")
    return inside
