"""From a file to a concept, with what it lacks told by who reads it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from weaver.concepts.concept import Concept, ConceptError
from weaver.concepts.formats import read_concept_file
from weaver.concepts.formats.parsed import ParsedFile
from weaver.concepts.formats.unused import tell_unused

__all__ = ["ConceptReading", "load_concept"]


@dataclass(frozen=True, eq=False)
class ConceptReading:
    """A file that is read, under the names it is used by, before its base model is known.

    Parameters
    ----------
    file : what it says; a concept of this package's own format is whole already
    name, word, token : as in `Concept`; None is what the file says, and its stem for the name
    """

    file: ParsedFile | Concept
    name: str
    word: str
    token: str
    modifier: str

    @classmethod
    def of(
        cls, path: str | os.PathLike, *, name: str | None = None, word: str | None = None, token: str | None = None
    ) -> ConceptReading:
        """Open a file of any known format.

        Raises `ConceptError` for what can't be read, and for what has to be told of it and was not.
        """
        path = Path(path)
        file = read_concept_file(path)
        if isinstance(file, Concept):
            changes = {"name": name, "word": word, "token": token}
            file = replace(file, **{key: value for key, value in changes.items() if value is not None})
            return cls(file, file.name, file.word, file.token, file.modifier)
        if not word:
            raise ConceptError(f"{path}: a {file.format} does not tell its class word, such as 'dog': name it")
        try:
            chosen, embeddings = file.token(token)
        except ConceptError as error:
            raise ConceptError(f"{path}: {error}") from error
        return cls(file, name or path.stem, word, chosen, chosen if embeddings else "")

    @property
    def token_file(self) -> str:
        """The name of the file beside this one that the token was taken from; empty where it is in the file itself."""
        return "" if isinstance(self.file, Concept) else self.file.token_files.get(self.token, "")

    def concept(self, pipe=None) -> Concept:
        """The concept on the base model of `pipe`, None as in `ParsedFile.concept`.

        Raises `ConceptError` where it is of another one.
        """
        if isinstance(self.file, Concept):
            if pipe is not None:
                self.file.check_base(pipe)
            return self.file
        return self.file.concept(pipe, name=self.name, word=self.word, token=self.token or None)


def load_concept(
    path: str | os.PathLike,
    pipe=None,
    *,
    word: str | None = None,
    token: str | None = None,
    name: str | None = None,
    on_unused: str = "warn",
    tell: Callable[[str], object] | None = None,
) -> Concept:
    """Read a concept from a file of any known format, for the base model of `pipe`.

    Known are this package's own files, Custom Diffusion's (adobe's and diffusers'), LoRAs (of diffusers, PEFT and
    kohya's scripts) and textual inversion. The token of one that was converted is in a file beside it (`convert`).

    Parameters
    ----------
    pipe : None as in `ParsedFile.concept`
    word : the class word, such as "dog"; None only for this package's own files, which tell it
    token : which of the file's tokens, None for its only one; of a LoRA the words that it was trained on, if any
    name : what to call it; None is the file's own name
    on_unused : what to do where the file changes what acts in no region, such as the embedding of time, of which fusion
        makes no use: "warn", or "refuse"
    tell : is called with a line of text where the token was taken from a file beside this one

    Raises `ConceptError`, which names the file, for what can't be read or does not fit the model.
    """
    try:
        reading = ConceptReading.of(path, name=name, word=word, token=token)
        concept = reading.concept(pipe)
        if pipe is not None:
            concept.check_outside(pipe)
        tell_unused(concept, on_unused, str(path))
    except ConceptError as error:
        raise error if str(path) in str(error) else ConceptError(f"{path}: {error}") from error
    if tell and reading.token_file:
        tell(f"{path}: its token {reading.token} was taken from {reading.token_file} beside it")
    return concept
