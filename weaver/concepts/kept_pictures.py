"""Class pictures kept in a folder while a concept is learned: a training that goes on does not make them again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from weaver.errors import WeaverError, differences
from weaver.folder import whole_file
from weaver.pictures import open_rgb

__all__ = ["KeptPictures"]

_INDEX = "made.json"


@dataclass(frozen=True)
class KeptPictures:
    """Pictures in a folder, and what they are of.

    Parameters
    ----------
    folder : made with the first of them
    identity : what they are made from; a folder with those of another is refused
    """

    folder: Path
    identity: Mapping[str, object]

    def load(self) -> tuple[list[Image.Image], int]:
        """Those that are there, and how many were made for them, with what a safety checker left out."""
        index = self.folder / _INDEX
        if not index.exists():
            return [], 0
        try:
            told = json.loads(index.read_text(encoding="utf-8"))
            identity, count, made = dict(told["identity"]), int(told["pictures"]), int(told["made"])
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise WeaverError(f"{index}: can't be read ({error}): remove its folder to make them anew") from error
        if odd := differences(identity, self.identity):
            raise WeaverError(
                f"{self.folder}: class pictures made otherwise ({'; '.join(odd)}): remove it, or name another"
            )
        return [open_rgb(self._file(number)) for number in range(count)], made

    def add(self, images: Sequence[Image.Image], first: int, made: int) -> None:
        """Write pictures from number `first` on; `made` is how many were made for all of them so far."""
        for number, image in enumerate(images, start=first):
            with whole_file(self._file(number)) as partial:
                image.save(partial, format="PNG")
        told = {"identity": dict(self.identity), "pictures": first + len(images), "made": made}
        with whole_file(self.folder / _INDEX) as partial:
            partial.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:05}.png"
