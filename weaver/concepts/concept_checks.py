"""What the values of a concept must be like to be used."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from weaver.concepts.changes import Delta, parts_of
from weaver.layers import has_region
from weaver_kernels import LowRank

if TYPE_CHECKING:
    from weaver.concepts.concept import Concept

__all__ = ["CHANGED", "GROUPS", "OUTPUT_BIAS", "concept_reasons", "parted"]

CHANGED = ("to_k", "to_v", "to_q", "to_out.0")
"""The projections of a cross-attention that a concept can change."""

OUTPUT_BIAS = "to_out.0.bias"
"""The only bias that Stable Diffusion's cross-attention has."""

GROUPS = ("embeddings", "deltas", "text_deltas", "outside")
"""The tensors of a concept, by field."""

_PARTNERS = {"to_k": "to_v", "to_v": "to_k"}
_OF_CROSS_ATTENTION = re.compile(rf"(^|\.)attn2\.({'|'.join(map(re.escape, CHANGED))})$")


def parted(changes: Mapping[str, Delta]) -> tuple[dict[str, Delta], dict[str, Delta]]:
    """Changes of a U-Net by path, as a `Concept` keeps them: its `deltas`, and what is `outside`."""
    inside = {path: change for path, change in changes.items() if _OF_CROSS_ATTENTION.search(path)}
    return inside, {path: change for path, change in changes.items() if path not in inside}


def concept_reasons(concept: Concept) -> list[str]:
    """Why a concept's values can't be used; empty when they can."""
    reasons = [f"{key} is empty" for key in ("name", "word") if not getattr(concept, key)]
    if concept.embeddings and not concept.token:
        reasons.append("token is empty, and there are embeddings for it")
    if concept.embeddings and any(c.isspace() for c in concept.token):
        reasons.append(f"token {concept.token!r} has white space in it")
    if not (concept.embeddings or concept.deltas or concept.text_deltas or any(map(has_region, concept.outside))):
        kept = f": its {len(concept.outside)} changes act in no region"
        reasons.append("there is nothing in it to fuse" + kept * bool(concept.outside))
    reasons += [
        f"{key} is not a JSON object"
        for key in ("settings", "versions")
        if not isinstance(getattr(concept, key), Mapping)
    ]
    counts = {value.shape[0] for value in concept.embeddings.values() if value.ndim == 2}
    if len(counts) > 1:
        reasons.append(f"its text encoders disagree on the number of vectors: {sorted(counts)}")
    for group in GROUPS:
        for key, value in getattr(concept, group).items():
            axes = (2, 4) if group == "outside" else (1,) if group == "deltas" and key.endswith(".bias") else (2,)
            reasons += [f"{group}/{key} {reason}" for reason in _change_reasons(value, axes)]
    for key, delta in concept.deltas.items():
        head, found, kind = key.rpartition("attn2.")
        if kind not in (*CHANGED, OUTPUT_BIAS) or not (not head or head.endswith(".")):
            reasons.append(f"deltas/{key} is no cross-attention projection (....attn2. and {', '.join(CHANGED)})")
        elif isinstance(delta, LowRank):
            continue
        elif kind in _PARTNERS and f"{head}{found}{_PARTNERS[kind]}" not in concept.deltas:
            reasons.append(f"deltas/{key} has no partner for the other of to_k and to_v")
    return reasons


def _change_reasons(value: Delta, axes: tuple[int, ...]) -> list[str]:
    """What is wrong with one change, or with one token's vectors."""
    for name, part in parts_of(value).items():
        name = f" ({name})" if name else ""
        if part.ndim not in axes or 0 in part.shape:
            expected = " or ".join({1: "one", 2: "two", 4: "four"}[count] for count in axes)
            return [f"has shape {tuple(part.shape)}{name}, expected {expected} ax{'is' if axes == (1,) else 'es'}"]
        if not part.is_floating_point():
            return [f"has dtype {part.dtype}{name}, expected floating point"]
        if not torch.isfinite(part).all():
            return [f"has NaN or infinite values{name}"]
    if isinstance(value, LowRank) and value.up.shape[1] != len(value.down):
        return [f"has factors of ranks {len(value.down)} (down) and {value.up.shape[1]} (up)"]
    return []
