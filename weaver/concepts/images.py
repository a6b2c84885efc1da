"""Pictures to learn a concept from, with their captions."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from PIL import Image

from weaver.concepts.framing import Framing
from weaver.concepts.picture_folder import caption_file, mask_file, picture_files, picture_paths, tell_passed_over
from weaver.concepts.prompts import names_token
from weaver.errors import WeaverError
from weaver.pictures import PictureError, open_picture, open_rgb, telling_alpha

__all__ = ["TrainingSet", "caption_of", "load_class_images", "load_images", "mask_of"]

_NAMED = 5  # files that can't be used, of which an error tells what is wrong
T = TypeVar("T")


@dataclass(frozen=True)
class TrainingSet:
    """Pictures (RGB, any size) and as many captions.

    `masks` say where the concept is in each (mode L, the picture's size, 255 inside); None, or no masks at all, where
    it is all of it. What lies outside is left out of the loss. `framings` say what part of a photograph each picture
    is, which SDXL is told; None, or none at all, where it is a whole one. `names` are what errors call the pictures,
    their files; their numbers where there are none.
    """

    images: tuple[Image.Image, ...]
    captions: tuple[str, ...]
    masks: tuple[Image.Image | None, ...] = ()
    framings: tuple[Framing | None, ...] = ()
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.images:
            raise WeaverError("no pictures to learn from")
        if len(self.images) != len(self.captions):
            raise WeaverError(f"{len(self.images)} pictures and {len(self.captions)} captions; give one caption each")
        if self.masks and len(self.masks) != len(self.images):
            raise WeaverError(f"{len(self.images)} pictures and {len(self.masks)} masks; give one mask each, or None")
        if self.framings and len(self.framings) != len(self.images):
            raise WeaverError(
                f"{len(self.images)} pictures and {len(self.framings)} framings; give one framing each, or None"
            )
        if self.names and len(self.names) != len(self.images):
            raise WeaverError(f"{len(self.images)} pictures and {len(self.names)} names; give one name each")
        for number, (image, mask) in enumerate(zip(self.images, self.all_masks(), strict=True)):
            if mask is not None and mask.size != image.size:
                sizes = f"{mask.width} x {mask.height} pixels, its picture {image.width} x {image.height}"
                raise WeaverError(f"{self.called(number)}: its mask has {sizes}: give masks of their size")
            if mask is not None and mask.getbbox() is None:
                raise WeaverError(f"{self.called(number)}: its mask is empty: the concept must be somewhere in it")

    def called(self, number: int) -> str:
        """What errors call a picture: its file, or its number from 1."""
        return self.names[number] if self.names else f"picture {number + 1}"

    def shared_with(self, other: TrainingSet) -> list[str]:
        """Those of the pictures, as errors call them, that another set has too, to the pixel."""
        there = {(image.size, image.tobytes()) for image in other.images}
        return [self.called(n) for n, image in enumerate(self.images) if (image.size, image.tobytes()) in there]

    def all_masks(self) -> tuple[Image.Image | None, ...]:
        """One a picture, None where there is none."""
        return self.masks or (None,) * len(self.images)

    def all_framings(self) -> tuple[Framing, ...]:
        """One a picture, of a whole photograph where there is none."""
        given = self.framings or (None,) * len(self.images)
        return tuple(one or Framing(*image.size[::-1]) for one, image in zip(given, self.images, strict=True))


def load_images(
    source: str | os.PathLike | Iterable[str | os.PathLike], token: str, word: str, *, template: str | None = None
) -> TrainingSet:
    """Read the pictures of a folder, or picture files, as a training set.

    Pictures are turned as their EXIF orientation says; transparency shows white. A picture's caption is the text file
    of the same name beside it (`cat.jpg`, `cat.txt`), otherwise `template`; `{token}` and `{word}` in either are
    filled in. Its mask, white or opaque where the concept is, is the picture `cat.mask.png` (or of
    another kind) beside it, if there is one. Names are compared in lower case.

    Parameters
    ----------
    source : a folder (its pictures in the order of their names), or picture files and folders. A warning tells of files
        in folders that were meant to be used and are not.
    token, word : the concept's modifier token and class word.
    template : None for "a {token} {word}".

    Raises `WeaverError` for a folder without pictures and for captions without the token, `PictureError` where nothing
    is wrong but that files can't be read; both tell of five files, and how many more there are.
    """
    paths = _paths(source)
    found = _of_each(
        paths, lambda path: (caption_of(path, token, word, template=template), mask_of(path), open_rgb(path))
    )
    captions, masks, images = (tuple(one[i] for one in found) for i in range(3))
    return TrainingSet(images, captions, masks if any(masks) else (), names=tuple(map(str, paths)))


def load_class_images(folder: str | os.PathLike, token: str, word: str) -> TrainingSet:
    """Read the pictures of a folder as others of a concept's class, which hold that in place (prior preservation).

    A picture's caption is the text file of the same name beside it, with `{word}` in it filled in, otherwise
    "a <word>"; none may have the concept's token in it. Masks are not used: the loss counts all of such a picture.

    Raises as `load_images` does, and `WeaverError` for captions that are empty or have the token.
    """
    paths = _paths(folder)
    found = _of_each(paths, lambda path: (_class_caption(path, token, word), open_rgb(path)))
    captions, images = (tuple(one[i] for one in found) for i in range(2))
    return TrainingSet(images, captions, names=tuple(map(str, paths)))


def _paths(source: str | os.PathLike | Iterable[str | os.PathLike]) -> list[Path]:
    """Those of a folder, or of several sources; what is not used of them is told."""
    alone = isinstance(source, str | os.PathLike)
    sources = [Path(source)] if alone else [Path(path) for path in source]
    found = picture_files(sources[0]) if alone else picture_paths(sources)
    tell_passed_over(sources)
    return found


def _class_caption(picture: Path, token: str, word: str) -> str:
    if (beside := caption_file(picture)) is None:
        return f"a {word}"
    text = _read_caption(beside)
    if not text:
        raise WeaverError(f"{beside}: the caption is empty: write what the picture shows, or remove the file")
    if "{token}" in text or names_token(text, token):
        raise WeaverError(f"{beside}: caption {text!r} has the token {token!r}, and shows others: write {{word}} alone")
    return text.replace("{word}", word)


def _of_each(paths: Sequence[Path], read: Callable[[Path], T]) -> list[T]:
    """What `read` gives for each picture; one error for all that it refuses."""
    found, errors = [], []
    for path in paths:
        try:
            found.append(read(path))
        except WeaverError as error:
            errors.append(error)
    reasons = list(dict.fromkeys(map(str, errors)))  # a caption of all is one
    if len(reasons) == 1:
        raise errors[0]
    if reasons:
        kind = PictureError if all(isinstance(error, PictureError) for error in errors) else WeaverError
        more = f"; and {len(reasons) - _NAMED} more" if len(reasons) > _NAMED else ""
        raise kind(f"{len(errors)} of {len(paths)} pictures can't be used: {'; '.join(reasons[:_NAMED])}{more}")
    return found


def mask_of(picture: Path) -> Image.Image | None:
    """Where the concept is in a picture, mode L with 255 inside; None without a mask beside it.

    Where a mask's transparency varies, what is opaque is inside, as in a cut-out; otherwise its grey levels say it, and
    one that holds 0 and 1 only is a label map. Raises as `open_picture` does.
    """
    beside = mask_file(picture)
    if beside is None:
        return None
    if (alpha := telling_alpha(open_picture(beside))) is not None:
        return alpha
    grey = open_rgb(beside).convert("L")
    return grey.point(lambda level: 255 * level) if grey.getextrema() == (0, 1) else grey


def caption_of(picture: Path, token: str, word: str, *, template: str | None = None) -> str:
    """The caption of one picture file, which is not opened; everything else as in `load_images`."""
    beside = caption_file(picture)
    text = _read_caption(beside) if beside else template or "a {token} {word}"
    caption = text.replace("{token}", token).replace("{word}", word)
    if not names_token(caption, token):
        origin = f"{beside}: " if beside else ""
        raise WeaverError(f"{origin}caption {text!r} lacks the token {token!r}: write {{token}} where it goes")
    return caption


def _read_caption(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig").strip()  # of editors that mark the encoding, too
    except (OSError, UnicodeDecodeError) as error:
        raise WeaverError(f"{path}: not a readable caption in UTF-8 ({error})") from error
