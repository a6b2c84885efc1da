"""Picture files: opened the way they were meant to be seen, cut and resized by one stated rule."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from weaver.errors import WeaverError

__all__ = ["PictureError", "as_rgb", "fit", "grid", "open_picture", "open_rgb", "telling_alpha"]


class PictureError(WeaverError):
    """A picture file that can't be read; names it."""


def open_picture(path: str | os.PathLike) -> Image.Image:
    """Read a picture whole, turned as its EXIF orientation says, in the mode of the file; of an animation the first."""
    path = Path(path)
    if not path.is_file():
        raise PictureError(f"{path}: no such picture file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # of half of what is refused
            with Image.open(path) as image:
                image.load()
                return ImageOps.exif_transpose(image)
    except Image.DecompressionBombError as error:
        most = 2 * Image.MAX_IMAGE_PIXELS // 10**6
        raise PictureError(f"{path}: has more than {most} million pixels; save it smaller") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, RuntimeError) as error:  # the last of AVIF
        raise PictureError(f"{path}: not a readable picture ({error})") from error


def open_rgb(path: str | os.PathLike) -> Image.Image:
    """Read a picture as `as_rgb` shows it; raises `PictureError` for a file that can't be read, too."""
    return as_rgb(open_picture(path), str(path))


def as_rgb(image: Image.Image, name: str) -> Image.Image:
    """An upright picture in 8-bit sRGB, by its colour profile where it has one; what is transparent shows white.

    Raises `PictureError` with its `name` for 32-bit pictures, which do not tell what white is.
    """
    if image.mode in ("I", "F"):
        raise PictureError(f"{name}: has 32 bits a channel, and does not tell what white is; save it with 8 or 16 bits")
    if image.mode.startswith("I;16"):
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    image = _to_srgb(image)
    if alpha is not None:
        image = Image.composite(image, Image.new("RGB", image.size, "white"), alpha)
    return image


def telling_alpha(image: Image.Image) -> Image.Image | None:
    """A picture's alpha (mode L) where it tells inside from outside: it varies, or all of it is transparent."""
    if not image.has_transparency_data:
        return None
    alpha = image.convert("RGBA").getchannel("A")
    least, most = alpha.getextrema()
    return alpha if least != most or most == 0 else None


# What the colours of pictures with alpha or a palette are, which profiles are not applied to as they are.
_WITHOUT_ALPHA = {"RGBA": "RGB", "RGBX": "RGB", "P": "RGB", "PA": "RGB", "LA": "L"}


def _to_srgb(image: Image.Image) -> Image.Image:
    """RGB as a screen shows it: by the profile that a camera or printer left, if it left one that can be read."""
    profile = image.info.get("icc_profile")
    if profile and image.mode in _WITHOUT_ALPHA:
        image = image.convert(_WITHOUT_ALPHA[image.mode])
    if profile and image.mode in ("RGB", "CMYK", "L"):
        try:
            return ImageCms.profileToProfile(
                image, ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
        except (ImageCms.PyCMSError, OSError):
            pass  # a broken profile, or one of another mode: viewers show such files without it, too
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
