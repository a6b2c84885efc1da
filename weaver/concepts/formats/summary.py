"""What a concept's file holds, in figures."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from weaver.concepts.changes import Delta, norm_of, ranks_of
from weaver.concepts.concept import Concept
from weaver.concepts.formats import read_concept_file
from weaver.concepts.formats.parsed import ParsedFile
from weaver.hashing import file_hash
from weaver.layers import has_region

__all__ = ["summarise"]

# What a weight belongs to by its path, the first that matches.
_KINDS = (
    ("keys and values of cross-attention", r"attn2\.to_[kv]$"),
    ("queries and outputs of cross-attention", r"attn2\."),
    ("self-attention", r"attn1\."),
    ("feed-forward", r"\.ff\."),
    ("time and other embeddings", r"^\w+_embedding\."),
    ("convolutions and projections", r""),
)
_TEXT = "text encoders, for its own prompt"


def summarise(path: str | os.PathLike) -> dict:
    """What a file of any known format holds, as plain JSON values.

    Returns "format", "bytes", "sha256", "tokens" (vectors by token), "token_files" (those beside it that tokens were
    taken from, by token), "lacks" (what of a token is missing, None for nothing), "word" and "base" (None where the
    file does not tell), "parts" (each with "name", "changes", "ranks", "share" of the squared Frobenius norm of all
    changes, so that shares add up to 1, None for weights that take the place of a base model's, and whether a fusion
    has "used" for it) and "settings".
    """
    path = Path(path)
    file = read_concept_file(path)
    whole = isinstance(file, Concept)
    tokens = {file.token: file.embeddings} if whole and file.embeddings else {} if whole else file.embeddings
    return {
        "format": f"concept of this package ({file.name!r})" if whole else file.format,
        "bytes": path.stat().st_size,
        "sha256": file_hash(path),
        "tokens": {token: len(next(iter(vectors.values()))) for token, vectors in tokens.items()},
        "token_files": {} if whole else dict(file.token_files),
        "lacks": None if whole else file.lacks or None,
        "word": file.word if whole else None,
        "base": file.base_hash or None,
        "parts": _parts(file, {} if whole else file.weights),
        "settings": dict(file.settings),
    }


def _parts(file: Concept | ParsedFile, weights: Mapping[str, torch.Tensor]) -> list[dict]:
    """The changes by what they belong to; `weights` are those that take the place of a base model's."""
    groups: dict[tuple[str, bool], list[Delta | None]] = {}
    for key, change in (dict(file.deltas) | dict.fromkeys(weights) | dict(file.outside)).items():
        kind = next(name for name, pattern in _KINDS if re.search(pattern, key))
        groups.setdefault((kind, key not in file.outside or has_region(key)), []).append(change)
    if file.text_deltas:
        groups[_TEXT, True] = list(file.text_deltas.values())
    squares = {group: norm_of(x for x in of if x is not None) ** 2 for group, of in groups.items()}
    total = sum(squares.values())
    return [
        {
            "name": kind,
            "changes": len(changes),
            "ranks": ranks_of(changes),
            "share": round(squares[kind, used] / total, 4) if total and not weights else None,
            "used": used,
        }
        for (kind, used), changes in groups.items()
    ]
