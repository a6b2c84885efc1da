"""The textual inversion file that `convert` leaves beside a file whose layout has no place for a concept's token.

A LoRA's header names the token, and the hash of its vectors: no other file of that name is taken for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from weaver.concepts.concept import Concept, ConceptError
from weaver.concepts.formats import textual_inversion
from weaver.concepts.formats.opening import OpenedFile, open_tensors
from weaver.errors import told

__all__ = ["TokenBeside", "holds_token", "told_token", "token_beside", "token_path", "vectors_of_file"]

_TOKEN_KEY, _VECTORS_KEY = "concept_weaver_token", "concept_weaver_vectors"
_PARTS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
_SUFFIX = ".safetensors"


class TokenBeside(NamedTuple):
    """What of a token lies beside a file: `embeddings`, `token_files` and `lacks` as in `ParsedFile`."""

    embeddings: Mapping[str, Mapping[str, torch.Tensor]]
    token_files: Mapping[str, str]
    lacks: str = ""


def token_path(name: str, beside: Path) -> Path | None:
    """The token file of a name beside a file; None for a name that no file there can have."""
    path = beside.parent / f"{name}{_SUFFIX}"
    odd = path.name.startswith(".") or path.parent != beside.parent or "\0" in name or path == beside
    return None if odd else path


def vectors_of_file(concept: Concept) -> dict[str, torch.Tensor]:
    """The content of a token's file: diffusers' ``{token: [V, C]}``, of two text encoders clip_l and clip_g."""
    if len(concept.embeddings) == 1:
        return {concept.token: concept.embeddings["text_encoder"].contiguous()}
    return {_PARTS[part]: value.contiguous() for part, value in concept.embeddings.items()}


def told_token(concept: Concept) -> dict[str, str]:
    """The texts of a header by which `token_beside` knows the concept's token file; {} without such a token."""
    if not concept.embeddings:
        return {}
    return {_TOKEN_KEY: concept.token, _VECTORS_KEY: _hash(concept.embeddings)}


def token_beside(opened: OpenedFile) -> TokenBeside:
    """The token that a file's header tells of, from the file beside it; nothing where it tells of none.

    Raises `ConceptError` for a name that is no file's, and for a token file that can't be read.
    """
    token = opened.metadata.get(_TOKEN_KEY)
    if not token:
        return TokenBeside({}, {})
    path = token_path(token, opened.path)
    if path is None:
        raise opened.error(f"its header names a token {told(token)}, which no file beside it can have: save it again")
    instead = "or tell as token the words that prompts are to have in its place"
    if not path.is_file():
        return TokenBeside({}, {}, f"the file of its token ({path.name}) is not beside it: put it there, {instead}")
    vectors = _tokens_in(path).get(token)
    if vectors is None or _hash(vectors) != opened.metadata.get(_VECTORS_KEY):
        lacks = f"{path.name} beside it holds another token than it was saved with: put that there, {instead}"
        return TokenBeside({}, {}, lacks)
    return TokenBeside({token: vectors}, {token: path.name})


def holds_token(path: Path, concept: Concept) -> bool:
    """Whether a file that is there has a concept's token, with the same vectors, and nothing else."""
    try:
        found = _tokens_in(path)
    except ConceptError:
        return False
    return list(found) == [concept.token] and _hash(found[concept.token]) == _hash(concept.embeddings)


def _tokens_in(path: Path) -> Mapping[str, Mapping[str, torch.Tensor]]:
    """The vectors of each token of a textual inversion; none of a file of another kind."""
    opened = open_tensors(path)
    parsed = textual_inversion.parse(opened.loaded()) if textual_inversion.recognises(opened) else None
    return parsed.embeddings if parsed else {}


def _hash(vectors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of a token's vectors by text encoder, 64 hex digits."""
    digest = hashlib.sha256()
    for name, value in sorted(vectors.items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
