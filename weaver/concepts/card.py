"""The card beside a concept of a bank: what the file holds, told without opening it, and the hash it had then."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from weaver.concepts.changes import ranks_of
from weaver.concepts.concept import Concept, ConceptError
from weaver.hashing import file_hash

__all__ = ["CARD_SUFFIX", "ConceptCard"]

CARD_SUFFIX = ".json"
_FORMAT = "concept-weaver/card"
_TYPES = {"int": int, "list": list, "Mapping": Mapping}


@dataclass(frozen=True)
class ConceptCard:
    """What a bank tells of one of its concepts.

    Parameters
    ----------
    name, token, word, settings : as in `Concept`
    base : its `base_hash`; empty for a concept of whichever model it fits
    method : the format it came from, "diffusers LoRA"
    ranks : those of its factors; empty where all its changes are matrices
    bytes, sha256 : of its file
    previews : names of the pictures beside it
    """

    name: str
    token: str
    word: str
    base: str
    method: str
    ranks: list
    settings: Mapping[str, object]
    bytes: int
    sha256: str
    previews: list

    @classmethod
    def of(cls, concept: Concept, path: Path, previews: list[str]) -> ConceptCard:
        """The card of a concept whose file is at `path`."""
        groups = (concept.deltas, concept.text_deltas, concept.outside)
        return cls(
            name=concept.name,
            token=concept.token,
            word=concept.word,
            base=concept.base_hash,
            method=_method(concept.settings),
            ranks=ranks_of(change for group in groups for change in group.values()),
            settings=dict(concept.settings),
            bytes=path.stat().st_size,
            sha256=file_hash(path),
            previews=previews,
        )

    def save(self, path: Path) -> None:
        """Write the card as JSON."""
        text = json.dumps({"format": _FORMAT} | asdict(self), indent=2, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> ConceptCard:
        """Read a card; raises `ConceptError` for what is none, or lacks something."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            json.dumps(content, ensure_ascii=False).encode()  # as it is written
        except (OSError, ValueError, RecursionError) as error:
            raise ConceptError(f"has a card that can't be read ({error})") from error
        if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
            raise ConceptError(f"has a file {path.name} that is no card")
        odd = [f.name for f in fields(cls) if not isinstance(content.get(f.name), _TYPES.get(_kind(f), str))]
        odd += [name for name in content if name not in {f.name for f in fields(cls)}]
        if odd:
            raise ConceptError(f"has a card that is not whole: {', '.join(odd)}")
        if not all(isinstance(name, str) and Path(name).name == name for name in content["previews"]):
            raise ConceptError("has a card that names previews elsewhere")
        return cls(**content)

    def reasons(self, path: Path, concept: Concept | None) -> list[str]:
        """What the file at `path` has otherwise than the card says, and the concept in it where that can be read."""
        if (found := file_hash(path)) != self.sha256:
            return [f"is not what was added: its file has SHA-256 {found[:12]}..., its card says {self.sha256[:12]}..."]
        other = self if concept is None else ConceptCard.of(concept, path, self.previews)
        odd = [f.name for f in fields(self) if getattr(self, f.name) != getattr(other, f.name)]
        return [f"has a card that says otherwise than its file: {', '.join(odd)}"] if odd else []


def _method(settings: Mapping[str, object]) -> str:
    """The layout of a file from elsewhere, or how the concept was learned here."""
    if "format" in settings or "rank" not in settings:
        return str(settings.get("format", "Concept Weaver"))
    everywhere = " of all layers" * (settings.get("layers") == "all")
    return f"LoRA{everywhere}, rank {settings['rank']}" if settings["rank"] else "Custom Diffusion"


def _kind(field) -> str:
    return str(field.type).partition("[")[0]
