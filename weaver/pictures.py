"""Picture files: opened the way they were meant to be seen, cut and resized by one stated rule."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from weaver.errors import WeaverError

__all__ = ["PictureError", "fit", "grid", "open_picture", "open_rgb"]


class PictureError(WeaverError):
    """A picture file that can't be read; names it."""


def open_picture(path: str | os.PathLike) -> Image.Image:
    """Read a picture whole, turned as its EXIF orientation says, in the mode of the file."""
    path = Path(path)
    if not path.is_file():
        raise PictureError(f"{path}: no such picture file")
    try:
        with Image.open(path) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise PictureError(f"{path}: not a readable picture ({error})") from error


def open_rgb(path: str | os.PathLike) -> Image.Image:
    """Read a picture as 8-bit RGB; what is transparent shows white."""
    image = open_picture(path)
    if image.mode.startswith("I") or image.mode == "F":
        raise PictureError(f"{path}: has mode {image.mode} (more than 8 bits a channel); save it with 8 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def fit(image: Image.Image, size: tuple[int, int], resample=Image.Resampling.LANCZOS) -> Image.Image:
    """Cut a picture about its centre to the shape of `size` (height, width) and resize it, by default by Lanczos."""
    height, width = size
    return image if image.size == (width, height) else ImageOps.fit(image, (width, height), method=resample)


def grid(rows: Sequence[Sequence[Image.Image]], side: int | None = None) -> Image.Image:
    """Pictures of one size in rows, without gaps; with `side` each is resized to a square of so many pixels."""
    width, height = (side, side) if side else rows[0][0].size
    sheet = Image.new("RGB", (width * max(map(len, rows)), height * len(rows)), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            if picture.size != (width, height):
                picture = picture.resize((width, height), Image.Resampling.BICUBIC)
            sheet.paste(picture, (x * width, y * height))
    return sheet
