"""A concept written for other programs; what their layout has no place for is refused or told."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from weaver.choices import LAYOUTS
from weaver.concepts.concept import Concept, ConceptError
from weaver.concepts.concept_checks import OUTPUT_BIAS
from weaver.concepts.decompose import Losses
from weaver.concepts.formats.kohya_names import is_of_sdxl
from weaver.concepts.formats.parsed import BASE_KEY
from weaver.concepts.formats.save_custom_diffusion import custom_diffusion_weights
from weaver.concepts.formats.save_lora import LoraFile, diffusers_lora, kohya_lora, lora_changes
from weaver.concepts.formats.token_file import holds_token, token_path, told_token, vectors_of_file
from weaver.errors import told
from weaver.folder import all_or_nothing
from weaver_kernels import LowRank

__all__ = ["RANK", "Converted", "convert"]

RANK = 16
_CUSTOM = "custom-diffusion"
Writer = Callable[[Path], object]


class Converted(NamedTuple):
    """The files that were written, and what is to be known of them, a line each."""

    files: list[Path]
    notes: list[str]


def convert(
    concept: Concept,
    to: str,
    out: str | os.PathLike,
    *,
    rank: int = RANK,
    pipe=None,
    replace: bool = False,
) -> Converted:
    """Write a concept in the layout `to`, one of `LAYOUTS`, all its files or none.

    Parameters
    ----------
    out : the file, ".safetensors"; of Custom Diffusion ".bin" too, the only kind that diffusers' own loader reads whole
    rank : of the factors that matrices become in a LoRA
    pipe : the base model, for "custom-diffusion"
    replace : whether files that are there may be replaced; a token's file that has the same vectors stays as it is

    Raises `ConceptError` for what has no place in the layout, and for an `out` that can't be.
    """
    out, reasons = Path(out), []
    suffixes = (".safetensors", ".bin") if to == _CUSTOM else (".safetensors",)
    if to not in LAYOUTS:
        reasons.append(f"to: {told(to)} is not one of {', '.join(LAYOUTS)}")
    if out.suffix not in suffixes:
        reasons.append(f"out: {out} must end in {' or '.join(suffixes)}")
    if rank < 1:
        reasons.append(f"rank: is {rank}, expected 1 or more")
    if to == _CUSTOM and pipe is None:
        reasons.append("model: Custom Diffusion's files hold whole weights, tell the base model with --model")
    if reasons:
        raise ConceptError("; ".join(reasons))
    if to == "weaver":
        write, notes, beside = concept.save, [], {}
    else:
        write, notes = _weights(concept, to, out, rank, pipe)
        beside = _token_file(concept, to, out)
        notes += [f"{path}: the token {concept.token}, to be loaded as textual inversion" for path in beside]
    writers = {out: write} | {path: save for path, save in beside.items() if not holds_token(path, concept)}
    there = [path for path in writers if path.exists()]
    if there and not replace:
        how = "; give --replace, or another --out"
        if there[0] in beside:
            how = f" with other vectors; give another folder, another --token than {concept.token!r}, or --replace"
        raise ConceptError(f"out: {there[0]} is there already{how}")
    notes += [f"{path}: held other vectors, which were replaced" for path in there if path in beside]
    with all_or_nothing(out.parent) as scratch:
        for path, write in writers.items():
            write(scratch / path.name)
    return Converted([out, *beside], notes)


def _weights(concept: Concept, to: str, out: Path, rank: int, pipe) -> tuple[Writer, list[str]]:
    """What writes a concept's changes in another layout than our own, and what is to be known of that."""
    notes, base = [], {BASE_KEY: concept.base_hash} if concept.base_hash else {}
    if to != _CUSTOM:
        file = _lora(concept, to, rank)
        metadata = file.metadata | base | told_token(concept)
        write, notes = partial(save_file, file.tensors, metadata=metadata), _losses(concept, file.losses)
        alphas = {(name.split("_")[1], x.item()) for name, x in file.tensors.items() if name.endswith(".alpha")}
        if len(alphas) > len({part for part, _ in alphas}):
            notes.append("its ranks differ, and so its alphas: diffusers takes one for all, give it a diffusers-lora")
    else:
        weights = custom_diffusion_weights(concept, pipe)
        write = partial(save_file, weights, metadata={"format": "pt"} | base)
        if out.suffix == ".bin":
            # diffusers' loader wants an entry for every attention, and safetensors holds no empty ones.
            others = [name for name in pipe.unet.attn_processors if not any(key.startswith(name) for key in weights)]
            write = partial(torch.save, weights | {name: {} for name in others})
        else:
            notes.append("diffusers' own loader reads this layout from a .bin alone: give --out such a name for it")
    untold = ["name", f"class word {concept.word!r}", "training settings"]
    if concept.base_hash and out.suffix == ".bin":
        untold.append(f"base model (hash {concept.base_hash[:12]})")
    if concept.token and not concept.embeddings:
        untold.append(f"words {concept.token!r} that prompts need")
    return write, [*notes, f"not told in this layout: {', '.join(untold)}"]


def _lora(concept: Concept, to: str, rank: int) -> LoraFile:
    """Raises `ConceptError` for a concept that has nothing that a LoRA has a place for."""
    changes = lora_changes(concept)
    if not changes:
        raise ConceptError(f"concept {concept.name!r} changes no weights, it is a token alone: a LoRA has none")
    if all(key.endswith(OUTPUT_BIAS) for key in changes):
        raise ConceptError(f"concept {concept.name!r} changes biases alone: a LoRA has no place for them")
    return kohya_lora(changes, rank, sdxl=is_of_sdxl(concept)) if to == "kohya-lora" else diffusers_lora(changes, rank)


def _losses(concept: Concept, losses: Losses) -> list[str]:
    groups = (concept.deltas, concept.outside, concept.text_deltas)
    biases = sum(key.endswith(OUTPUT_BIAS) for key in concept.deltas)
    matrices = sum(not isinstance(change, LowRank) for group in groups for change in group.values()) - biases
    kept = len(losses.by_change) - matrices - biases
    notes = [f"{kept} changes are factors already, which are kept as they are"] if kept else []
    if biases:
        notes.append(f"{biases} changes of biases are left out, for which a LoRA has no place: the error counts them")
    if matrices or biases:
        worst, most = losses.worst
        notes.append(
            f"{matrices} matrices become factors of rank {losses.rank}: relative error {losses.overall:.4g} (Frobenius "
            f"norm of what is lost, of all changes), at worst {most:.4g} in {worst}"
        )
    return notes


def _token_file(concept: Concept, to: str, out: Path) -> dict[Path, Writer]:
    """The file of a token's vectors, named after it as in diffusers' example; {} for words that the base knows."""
    if not concept.embeddings:
        return {}
    token = concept.token
    bracketed = token.startswith("<") and token.endswith(">")
    # By its brackets the reader of Custom Diffusion's files finds the token's.
    name = f"<{token}>" if to == _CUSTOM and not bracketed else token
    path = token_path(name, out)
    if path is None:
        raise ConceptError(f"token {token!r} gives no name for a file beside {out.name}: give another, --token '<v1>'")
    return {path: partial(save_file, vectors_of_file(concept), metadata={"format": "pt"})}
