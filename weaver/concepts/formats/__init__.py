"""Files that people have: one module a format reads tensors into a `ParsedFile`; `convert` writes some of them."""

from __future__ import annotations

import os
import re
from dataclasses import replace

from weaver.concepts.concept import Concept
from weaver.concepts.concept_file import FORMAT
from weaver.concepts.formats import custom_diffusion, lora, textual_inversion
from weaver.concepts.formats.opening import open_tensors
from weaver.concepts.formats.parsed import BASE_KEY, ParsedFile
from weaver.concepts.formats.refused import refuse_known
from weaver.errors import told

__all__ = ["read_concept_file"]

_FORMATS = (custom_diffusion, lora, textual_inversion)
"""Each has `recognises`, of an `OpenedFile` that is not loaded, and `parse`, of one that is; the first counts."""


def read_concept_file(path: str | os.PathLike) -> ParsedFile | Concept:
    """Read a concept in whichever format its content shows, whatever its name: our own is a `Concept` already.

    No code in a file is run, and no more is read than the file has. Raises `ConceptError`, which names the file and
    what to do, for everything that is no concept.
    """
    opened = open_tensors(path)
    if opened.metadata.get("format") == FORMAT:
        opened.loaded()
        return Concept.load(path)
    refuse_known(opened)
    base_hash = opened.metadata.get(BASE_KEY, "")
    if not re.fullmatch(r"([0-9a-f]{64})?", base_hash):
        raise opened.error(f"the hash of its base model is {told(base_hash)}, expected 64 hex digits: save it again")
    kind = next((module for module in _FORMATS if module.recognises(opened)), None)
    if kind is None:  # before its data is read, of which there may be gigabytes
        names = ", ".join(told(name) for name in opened.names()[:3]) or "none"
        raise opened.error(
            f"its tensors ({names}, ...) are of no format that is known: concepts are our own files, Custom Diffusion, "
            "LoRA and textual inversion"
        )
    return replace(kind.parse(opened.loaded()), base_hash=base_hash)
