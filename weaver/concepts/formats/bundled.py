"""Textual inversions within a LoRA's file, as Civitai's bundles and AUTOMATIC1111 have them.

Their names are `bundle_emb.<token>.string_to_param.*`, and of SDXL `bundle_emb.<token>.clip_l` and `.clip_g`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from weaver.concepts.formats.opening import OpenedFile
from weaver.concepts.formats.textual_inversion import as_vectors, refuse_large
from weaver.errors import told

__all__ = ["bundled_tokens", "is_bundled"]

_PREFIX = "bundle_emb."
_NAME = re.compile(re.escape(_PREFIX) + r"([^.\s]+)\.(string_to_param\.\*|emb_params|clip_l|clip_g)")


def is_bundled(name: str) -> bool:
    """Whether a tensor of this name is of a textual inversion in a LoRA's file, and no factor."""
    return name.startswith(_PREFIX)


def bundled_tokens(opened: OpenedFile) -> dict[str, dict[str, torch.Tensor]]:
    """``{token: {"text_encoder": [V, C], ...}}`` of all that are in a LoRA's file; {} without any.

    Raises `ConceptError` for names that tell no token, and for vectors that can't be a token's.
    """
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in opened.tensors.items():
        if not is_bundled(name):
            continue
        match = _NAME.fullmatch(name)
        encoder = "text_encoder_2" if name.endswith(".clip_g") else "text_encoder"
        if match is None or encoder in found.get(match[1], {}):
            raise opened.error(
                f"it is a bundle of a LoRA and textual inversions, and {told(name)} is not known among these: fetch "
                "the two as files of their own"
            )
        refuse_large(opened, name, value)
        found.setdefault(match[1], {})[encoder] = as_vectors(opened, match[1], value)
    for token, parts in found.items():
        _check_counts(opened, token, parts)
    return found


def _check_counts(opened: OpenedFile, token: str, parts: Mapping[str, torch.Tensor]) -> None:
    if len(counts := {len(vectors) for vectors in parts.values()}) > 1:
        raise opened.error(f"token {told(token)} has different numbers of vectors, {sorted(counts)}: fetch it again")
