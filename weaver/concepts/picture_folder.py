"""A folder of pictures to learn from: which files are pictures, what lies beside each, and what is passed over."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path

from weaver.errors import WeaverError

__all__ = ["PassedOverWarning", "caption_file", "mask_file", "picture_files", "picture_paths", "tell_passed_over"]

_CAPTION, _MASK = ".txt", ".mask.png"
_KINDS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
_OTHER_KINDS = (".heic", ".heif", ".avif", ".jxl", ".jp2", ".psd", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf")
_NAMED = 5  # files of which a warning tells


class PassedOverWarning(UserWarning):
    """Files in a folder of pictures are not used, which were meant to be."""


def picture_files(folder: Path) -> list[Path]:
    """The pictures of a folder in the order of their names; `WeaverError` if there are none."""
    if not folder.is_dir():
        raise WeaverError(f"{folder}: no such folder of pictures")
    paths = sorted(path for path in _visible(folder) if _is_of(path, _KINDS))
    if not paths:
        others = sorted(path.name for path in _visible(folder) if _is_of(path, _OTHER_KINDS))
        found = f"; save {_some(others)} as PNG or JPEG" if others else ""
        raise WeaverError(f"{folder}: no pictures in this folder ({', '.join(_KINDS)}){found}")
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
        beside = {path.with_suffix(suffix) for path in pictures for suffix in (_CAPTION, _MASK)}
        alone = {path for path in _visible(folder) if path.name.endswith((_CAPTION, _MASK))} - beside
        reasons = []
        if others:
            reasons.append(f"{_some(sorted(path.name for path in others))}: save as PNG or JPEG")
        if alone:
            reasons.append(f"{_some(sorted(path.name for path in alone))}: beside no picture of that name")
        if reasons:
            warnings.warn(f"{folder}: not used are {'; '.join(reasons)}", PassedOverWarning, stacklevel=3)


def caption_file(picture: Path) -> Path | None:
    """The caption that lies beside a picture, if one does."""
    beside = picture.with_suffix(_CAPTION)
    return beside if beside.is_file() else None


def mask_file(picture: Path) -> Path | None:
    """The mask that lies beside a picture, if one does."""
    beside = picture.with_suffix(_MASK)
    return beside if beside.is_file() else None


def _visible(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name[0] != "."]


def _is_of(path: Path, kinds: tuple[str, ...]) -> bool:
    return path.suffix.lower() in kinds and not path.name.endswith(_MASK)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
