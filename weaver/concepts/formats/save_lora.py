"""A concept's changes as a LoRA file, under the names of diffusers or of kohya's scripts; `lora` reads them back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple

import torch

from weaver.concepts.changes import ranks_of
from weaver.concepts.concept import Concept, ConceptError
from weaver.concepts.concept_checks import OUTPUT_BIAS
from weaver.concepts.decompose import Losses, factors_of
from weaver.concepts.formats.kohya_names import is_of_sdxl, kohya_name
from weaver_kernels import LowRank

__all__ = ["LoraFile", "diffusers_lora", "kohya_lora"]

_NESTED = "text_model."


class LoraFile(NamedTuple):
    """Tensors and metadata of a safetensors file, and what the rank left out."""

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]
    losses: Losses


def diffusers_lora(concept: Concept, rank: int) -> LoraFile:
    """All changes under diffusers' names; the alpha of each is its rank, since scales are in the factors.

    Factors that the concept has are kept as they are; matrices become factors of `rank`.
    """
    parts, losses = _parts(concept, rank)
    tensors, config = {}, {}
    for part, changes in parts.items():
        for path, change in changes.items():
            tensors[f"{part}.{path}.lora_A.weight"] = change.down.contiguous()
            tensors[f"{part}.{path}.lora_B.weight"] = change.up.contiguous()
        # PEFT looks for ends of names: without "text_model." they are those of any version of transformers.
        ranks = {path.removeprefix(_NESTED): len(change.down) for path, change in changes.items()}
        usual = max(ranks.values(), key=list(ranks.values()).count)
        other = {path: count for path, count in ranks.items() if count != usual}
        # Without patterns of their own, ranks that differ would be scaled by the ratio of the two.
        entries = {"r": usual, "lora_alpha": usual, "rank_pattern": other, "alpha_pattern": other}
        config |= {f"{part}.{key}": value for key, value in (entries | {"target_modules": sorted(ranks)}).items()}
    return LoraFile(tensors, {"format": "pt", "lora_adapter_metadata": json.dumps(config, sort_keys=True)}, losses)


def kohya_lora(concept: Concept, rank: int) -> LoraFile:
    """All changes under the names of kohya's scripts, each with its rank as alpha."""
    parts, losses = _parts(concept, rank)
    sdxl, tensors = is_of_sdxl(concept), {}
    for part, changes in parts.items():
        for path, change in changes.items():
            name = kohya_name(part, path, sdxl)
            tensors[f"{name}.lora_down.weight"] = change.down.contiguous()
            tensors[f"{name}.lora_up.weight"] = change.up.contiguous()
            tensors[f"{name}.alpha"] = torch.tensor(float(len(change.down)))
    ranks = ranks_of(change for changes in parts.values() for change in changes.values())
    dim = {"ss_network_dim": str(*ranks)} if len(ranks) == 1 else {}
    return LoraFile(tensors, {"format": "pt"} | dim, losses)


def _parts(concept: Concept, rank: int) -> tuple[dict[str, dict[str, LowRank]], Losses]:
    """The factors of the U-Net and of each text encoder, by their paths there as diffusers writes them."""
    changes: dict[str, Mapping] = {
        f"unet.{path}": x for path, x in (dict(concept.deltas) | dict(concept.outside)).items()
    }
    changes |= concept.text_deltas
    if not changes:
        raise ConceptError(f"concept {concept.name!r} changes no weights, it is a token alone: a LoRA has none")
    parts: dict[str, dict[str, LowRank]] = {}
    biases = {key: changes.pop(key) for key in list(changes) if key.endswith(OUTPUT_BIAS)}
    if not changes:
        raise ConceptError(f"concept {concept.name!r} changes biases alone: a LoRA has no place for them")
    matrices = [change.flatten(1) for change in changes.values() if not isinstance(change, LowRank)]
    rank = min(rank, max((min(matrix.shape) for matrix in matrices), default=rank))
    losses = Losses(rank)
    for key, change in biases.items():
        losses.note(key, change, None)
    for key, change in changes.items():
        factors = factors_of(change, rank)
        losses.note(key, change, factors)
        part, _, path = key.partition(".")
        if part != "unet":
            path = _NESTED + path.removeprefix(_NESTED)
        parts.setdefault(part, {})[path] = factors
    return parts, losses
