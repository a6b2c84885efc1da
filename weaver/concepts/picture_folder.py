"""A folder of pictures to learn from: which files are pictures, what lies beside each, and what is passed over."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path

from weaver.errors import WeaverError

__all__ = ["PassedOverWarning", "caption_file", "mask_file", "picture_files", "picture_paths", "tell_passed_over"]

_CAPTION, _MASK = ".txt", ".mask"
_KINDS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
_OTHER_KINDS = (".heic", ".heif", ".avif", ".jxl", ".jp2", ".psd", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf")
_LIKE_A_MASK = re.compile(r"(.+)[ _-]mask", re.IGNORECASE)
_NAMED = 5  # files of which a warning tells


class PassedOverWarning(UserWarning):
    """Files in a folder of pictures are not used, which were meant to be."""


def picture_files(folder: Path) -> list[Path]:
    """The pictures of a folder in the order of their names.

    Raises `WeaverError` if there are none, and for one that is called after another as masks are in other programs
    (`cat_mask.png` beside `cat.jpg`): it would be learned from.
    """
    if not folder.is_dir():
        raise WeaverError(f"{folder}: no such folder of pictures")
    paths = sorted(path for path in _visible(folder) if _is_of(path, _KINDS))
    if not paths:
        others = sorted(path.name for path in _visible(folder) if _is_of(path, _OTHER_KINDS))
        found = f"; save {_some(others)} as PNG or JPEG" if others else ""
        raise WeaverError(f"{folder}: no pictures in this folder ({', '.join(_KINDS)}){found}")
    stems = {_stem(path) for path in paths}
    for path in paths:
        if (named := _LIKE_A_MASK.fullmatch(path.stem)) and named[1].lower() in stems:
            raise WeaverError(
                f"{path}: a picture to learn from, or the mask of {named[1]!r}? Call a mask {named[1]}{_MASK}"
                f"{path.suffix}, and a picture otherwise"
            )
    return paths


def picture_paths(sources: Iterable[Path]) -> list[Path]:
    """The picture files that sources name, each a file or a folder of them; `WeaverError` for a folder without any."""
    return [path for source in sources for path in (picture_files(source) if source.is_dir() else [source])]


def tell_passed_over(sources: Iterable[Path]) -> None:
    """Warn of what is in folders among the sources and not used: pictures of kinds that are not read (HEIC and other),
    and captions and masks that lie beside no picture."""
    for folder in (source for source in sources if source.is_dir()):
        others = {path for path in _visible(folder) if _is_of(path, _OTHER_KINDS)}
        pictures = others.union(path for path in _visible(folder) if _is_of(path, _KINDS))
        stems = {_stem(path) for path in pictures}
        beside = {path for path in _visible(folder) if _is_mask(path) or path.suffix.lower() == _CAPTION}
        alone = {path for path in beside if _stem(path) not in stems}
        reasons = []
        if others:
            reasons.append(f"{_some(sorted(path.name for path in others))}: save as PNG or JPEG")
        if alone:
            reasons.append(f"{_some(sorted(path.name for path in alone))}: beside no picture of that name")
        if reasons:
            warnings.warn(f"{folder}: not used are {'; '.join(reasons)}", PassedOverWarning, stacklevel=3)


def caption_file(picture: Path) -> Path | None:
    """The caption that lies beside a picture, if one does: `cat.txt`, in letters of either case."""
    return _beside(picture, (_CAPTION,))


def mask_file(picture: Path) -> Path | None:
    """The mask that lies beside a picture, if one does: `cat.mask.png`, or of another kind of picture."""
    return _beside(picture, tuple(_MASK + kind for kind in _KINDS))


def _beside(picture: Path, endings: tuple[str, ...]) -> Path | None:
    """The first file beside a picture that is called after it, with one of the endings."""
    wanted = {f"{picture.stem.lower()}{ending}" for ending in endings}
    names = sorted(os.listdir(picture.parent)) if picture.parent.is_dir() else []
    found = (picture.parent / name for name in names if name.lower() in wanted)
    return next((path for path in found if path.is_file()), None)


def _stem(path: Path) -> str:
    """What files of one picture have in common."""
    return path.stem.lower().removesuffix(_MASK) if _is_mask(path) else path.stem.lower()


def _is_mask(path: Path) -> bool:
    return path.suffix.lower() in _KINDS and path.stem.lower().endswith(_MASK)


def _visible(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name[0] != "."]


def _is_of(path: Path, kinds: tuple[str, ...]) -> bool:
    return path.suffix.lower() in kinds and not _is_mask(path)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
