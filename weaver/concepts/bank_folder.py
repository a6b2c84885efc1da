"""A bank: a folder of concepts in this package's format, each with its card and previews beside it.

A concept's file comes before its card and goes after it, each by one rename, and writers take turns: whenever one is
killed, readers find whole files, and `BankFolder.entries` tells which of them lacks its partner.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from os.path import isfile
from pathlib import Path

from PIL import Image

from weaver.concepts.card import CARD_SUFFIX, ConceptCard
from weaver.concepts.concept import Concept, ConceptError
from weaver.errors import WeaverError, told
from weaver.folder import PARTIAL, home_folder, writing_alone, written_through
from weaver.pictures import open_rgb

__all__ = ["BankEntry", "BankFolder", "Kept", "checked_name"]

_FILE_SUFFIX = ".safetensors"
_NAME = re.compile(r"\w[\w. -]{0,99}")
_WAIT = 60.0  # seconds for other writers
_FAULTS = (OSError, NotImplementedError)  # of a disk, and of a file system that has no locks


@dataclass(frozen=True, eq=False)
class Kept:
    """One concept to be kept, and pictures of it."""

    concept: Concept
    previews: Sequence[Image.Image] = ()


@dataclass(frozen=True)
class BankEntry:
    """One name of a bank: its card, or why there is none (`fault`)."""

    name: str
    card: ConceptCard | None
    fault: str = ""


class BankFolder:
    """Concepts by name, safe for several processes at once.

    Parameters
    ----------
    folder : where; None is `$WEAVER_BANK`, or `~/.local/share/concept-weaver/bank`. Made when something is first kept
    """

    def __init__(self, folder: str | os.PathLike | None = None):
        default = ".local/share/concept-weaver/bank"
        self.folder = Path(folder).expanduser() if folder else home_folder("WEAVER_BANK", default)

    def names(self) -> list[str]:
        """The names of all concepts, those among them that lack their file or their card."""
        try:
            found = [path for path in self.folder.iterdir() if path.suffix in (_FILE_SUFFIX, CARD_SUFFIX)]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise WeaverError(f"the bank {self.folder} can't be read ({error.strerror})") from error
        return sorted({path.stem for path in found if _NAME.fullmatch(path.stem)})

    def path(self, name: str) -> Path:
        """The file of a concept; raises `ConceptError`, which names what is like it, where there is none."""
        path = self._file(checked_name(name))
        if not isfile(path):
            raise ConceptError(f"the bank {self.folder}: {name!r} {self._absence(name)}")
        return path

    def entries(self) -> list[BankEntry]:
        """All concepts by name; of what is broken, why."""
        return [self._entry(name) for name in self.names()]

    def card(self, name: str) -> ConceptCard:
        """The card of a concept; raises `ConceptError` where there is none, or it is not whole."""
        if not self._card(checked_name(name)).is_file():
            raise ConceptError("has no card: a writer was killed, or the file was copied here; add it with --replace")
        return ConceptCard.load(self._card(name))

    def add(self, kept: Sequence[Kept], replace: bool = False) -> list[ConceptCard]:
        """Keep concepts under their names, all or, where a name is taken, none; returns their cards.

        Raises `ConceptError` for a name that is no file's or, unless `replace`, there already, and `WeaverError` where
        the folder can't be written.
        """
        names = [item.concept.name for item in kept]
        try:
            for name in names:
                checked_name(name)
        except ConceptError as error:
            raise ConceptError(f"{error}; give another with --name") from error
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConceptError(f"two of the files have the name {twice[0]!r}: add them one by one, with --name")
        with self._writing():
            taken = set(self.names()) & set(names)
            if taken and not replace:
                raise ConceptError(
                    f"the bank {self.folder} has {', '.join(map(repr, sorted(taken)))} already: give --replace, or "
                    "another --name"
                )
            with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=self.folder) as scratch:
                cards = [self._write(item, Path(scratch)) for item in kept]
                for card in cards:
                    self._move_in(card, Path(scratch))
        return cards

    def remove(self, names: Sequence[str]) -> None:
        """Throw concepts away, all or, where a name is not there, none."""
        for name in names:
            if checked_name(name) not in self.names():
                self.path(name)
        with self._writing():
            for name in names:
                self._card(name).unlink(missing_ok=True)
                self._file(name).unlink(missing_ok=True)
                self._drop_previews(name)

    def faults(self, name: str, pipe=None) -> list[str]:
        """What is wrong with a concept: its file, its card, its previews and, with a `pipe`, whether it fits that."""
        if not (path := self._file(checked_name(name))).is_file():
            return [self._absence(name)]
        reasons, concept = [], None
        try:
            concept = Concept.load(path)
            if pipe is not None:
                concept.check_base(pipe)
                concept.check_outside(pipe)
        except ConceptError as error:
            reasons.append(str(error))
        try:
            card = self.card(name)
        except ConceptError as error:
            return [*reasons, str(error)]
        if card.name != name:
            reasons.append(f"has the card of {card.name!r}")
        reasons += card.reasons(path, concept)
        for preview in card.previews:
            try:
                open_rgb(self.folder / preview)
            except WeaverError as error:
                reasons.append(f"a preview can't be opened: {error}")
        return reasons

    def _entry(self, name: str) -> BankEntry:
        if not self._file(name).is_file():
            return BankEntry(name, None, self._absence(name))
        try:
            return BankEntry(name, self.card(name))
        except ConceptError as error:
            return BankEntry(name, None, str(error))

    def _absence(self, name: str) -> str:
        """How a concept without a file is told of."""
        names = self.names()
        if name in names:
            return "has a card and no file: add it again with --replace, or remove it"
        close = get_close_matches(name, names, n=3)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "`weaver bank list` shows what there is"
        return f"is not there; {hint}"

    def _write(self, item: Kept, scratch: Path) -> ConceptCard:
        name = item.concept.name
        path = item.concept.save(scratch / f"{name}{_FILE_SUFFIX}")
        previews = [f"{name}.preview-{number}.png" for number in range(len(item.previews))]
        for preview, picture in zip(previews, item.previews, strict=True):
            picture.save(scratch / preview)
        card = ConceptCard.of(item.concept, path, previews)
        card.save(scratch / f"{name}{CARD_SUFFIX}")
        for file in (path, *(scratch / preview for preview in previews), scratch / f"{name}{CARD_SUFFIX}"):
            written_through(file)
        return card

    def _move_in(self, card: ConceptCard, scratch: Path) -> None:
        self._card(card.name).unlink(missing_ok=True)  # which would tell of the file that was there before
        os.replace(scratch / f"{card.name}{_FILE_SUFFIX}", self._file(card.name))
        self._drop_previews(card.name)
        for preview in card.previews:
            os.replace(scratch / preview, self.folder / preview)
        os.replace(scratch / f"{card.name}{CARD_SUFFIX}", self._card(card.name))

    def _drop_previews(self, name: str) -> None:
        for path in self.folder.iterdir():
            if re.fullmatch(rf"{re.escape(name)}\.preview-\d+\.png", path.name):
                path.unlink()

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}{_FILE_SUFFIX}"

    def _card(self, name: str) -> Path:
        return self.folder / f"{name}{CARD_SUFFIX}"

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with writing_alone(self.folder, _WAIT):
                yield
        except _FAULTS as error:
            raise WeaverError(f"the bank {self.folder} can't be changed ({error})") from error


def checked_name(name: str) -> str:
    """A name that is a safe file name, unchanged; raises `ConceptError` for any other."""
    if not _NAME.fullmatch(name) or name != name.rstrip(". "):
        raise ConceptError(
            f"{told(name)} is no name in a bank: letters, digits, '_', '-', '.' and spaces, the first a letter or "
            "digit, at most 100"
        )
    return name
