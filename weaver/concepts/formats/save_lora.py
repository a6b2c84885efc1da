"""A concept's changes as a LoRA file, under the names of diffusers or of kohya's scripts; `lora` reads them back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple

import torch

from weaver.concepts.changes import Delta, ranks_of
from weaver.concepts.concept import Concept
from weaver.concepts.concept_checks import OUTPUT_BIAS
from weaver.concepts.decompose import Losses, factors_of
from weaver.concepts.formats.kohya_names import kohya_name
from weaver.concepts.formats.parsed import ParsedFile
from weaver_kernels import LowRank

__all__ = ["LoraFile", "diffusers_lora", "kohya_lora", "lora_changes"]

_NESTED = "text_model."
_NOT_NESTED = ("text_projection",)


class LoraFile(NamedTuple):
    """Tensors and metadata of a safetensors file, and what the rank left out."""

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]
    losses: Losses


def lora_changes(of: Concept | ParsedFile) -> dict[str, Delta]:
    """All that a concept or a file adds to weights, by part and path: "unet.<path>", "text_encoder.<path>"."""
    unet = dict(of.deltas) | dict(of.outside)
    return {f"unet.{path}": change for path, change in unet.items()} | dict(of.text_deltas)


def diffusers_lora(changes: Mapping[str, Delta], rank: int) -> LoraFile:
    """`lora_changes` under diffusers' names; the alpha of each is its rank, since scales are in the factors.

    Factors are kept as they are; matrices become factors of `rank`. Biases are left out, which `losses` counts.
    """
    parts, losses = _parts(changes, rank)
    tensors, config = {}, {}
    for part, factors in parts.items():
        for path, change in factors.items():
            tensors[f"{part}.{path}.lora_A.weight"] = change.down.contiguous()
            tensors[f"{part}.{path}.lora_B.weight"] = change.up.contiguous()
        # PEFT looks for ends of names: without "text_model." they are those of any version of transformers.
        ranks = {path.removeprefix(_NESTED): len(change.down) for path, change in factors.items()}
        usual = max(ranks.values(), key=list(ranks.values()).count)
        other = {path: count for path, count in ranks.items() if count != usual}
        # Without patterns of their own, ranks that differ would be scaled by the ratio of the two.
        entries = {"r": usual, "lora_alpha": usual, "rank_pattern": other, "alpha_pattern": other}
        config |= {f"{part}.{key}": value for key, value in (entries | {"target_modules": sorted(ranks)}).items()}
    return LoraFile(tensors, {"format": "pt", "lora_adapter_metadata": json.dumps(config, sort_keys=True)}, losses)


def kohya_lora(changes: Mapping[str, Delta], rank: int, *, sdxl: bool) -> LoraFile:
    """The same under the names of kohya's scripts, each with its rank as alpha; `sdxl`: of its models."""
    parts, losses = _parts(changes, rank)
    tensors = {}
    for part, factors in parts.items():
        for path, change in factors.items():
            name = kohya_name(part, path, sdxl)
            tensors[f"{name}.lora_down.weight"] = change.down.contiguous()
            tensors[f"{name}.lora_up.weight"] = change.up.contiguous()
            tensors[f"{name}.alpha"] = torch.tensor(float(len(change.down)))
    ranks = ranks_of(change for factors in parts.values() for change in factors.values())
    dim = {"ss_network_dim": str(*ranks)} if len(ranks) == 1 else {}
    return LoraFile(tensors, {"format": "pt"} | dim, losses)


def _parts(changes: Mapping[str, Delta], rank: int) -> tuple[dict[str, dict[str, LowRank]], Losses]:
    """The factors of the U-Net and of each text encoder, by their paths there as diffusers writes them."""
    whole = {key: change for key, change in changes.items() if not key.endswith(OUTPUT_BIAS)}
    matrices = [change.flatten(1) for change in whole.values() if not isinstance(change, LowRank)]
    rank = min(rank, max((min(matrix.shape) for matrix in matrices), default=rank))
    losses, parts = Losses(rank), {}
    for key in changes.keys() - whole.keys():
        losses.note(key, changes[key], None)
    for key, change in whole.items():
        factors = factors_of(change, rank)
        losses.note(key, change, factors)
        part, _, path = key.partition(".")
        if part != "unet" and path not in _NOT_NESTED:
            path = _NESTED + path.removeprefix(_NESTED)
        parts.setdefault(part, {})[path] = factors
    return parts, losses
