"""Concepts, texts and masks of the shapes that a job's would have, without their files."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from weaver.concepts.bank import read_concept, training_settings
from weaver.concepts.changes import Delta, parts_of
from weaver.concepts.concept import Concept, attn2_projections
from weaver.concepts.concept_checks import parted
from weaver.conditioning import text_encoders
from weaver.fusion.contexts import ConceptUse
from weaver.job import BackgroundSpec, Job
from weaver.layers import transformer_linears
from weaver_kernels import LowRank

__all__ = ["BASE_HASH", "PROMPT", "WORD", "delta_bytes", "masks_for", "uses_for"]

WORD = "picture"
PROMPT = f"a {WORD}"  # texts are padded to one length, whatever they say
BASE_HASH = "0" * 64
_DTYPE = torch.float16  # of the deltas in a concept's file


def uses_for(job: Job, pipe) -> tuple[list[ConceptUse], ConceptUse | None]:
    """A use for each concept of a job, and for the background where that is one.

    Keys and values are changed by whole matrices, the most that a concept has of them; what a LoRA changes besides is
    as its file has it.
    """
    uses = [_use(number, spec, pipe) for number, spec in enumerate(job.everyone)]
    return (uses[:-1], uses[-1]) if job.background else (uses, None)


def delta_bytes(uses: Iterable[ConceptUse]) -> int:
    """Bytes that the weights of concepts take."""
    changes = [delta for use in uses for group in (use.concept.deltas, use.concept.outside) for delta in group.values()]
    return sum(part.numel() for delta in changes for part in parts_of(delta).values()) * _DTYPE.itemsize


def masks_for(job: Job) -> torch.Tensor:
    """Masks [N + 1, height, width] as `compose_masks` returns them: stripes side by side, the background last."""
    masks = torch.zeros(len(job.concepts) + 1, *job.size)
    for mask, columns in zip(masks, torch.arange(job.size[1]).chunk(len(masks)), strict=True):
        mask[:, columns] = 1
    return masks


def _use(number: int, spec: BackgroundSpec, pipe) -> ConceptUse:
    token, nothing = f"<{number}>", torch.zeros(1)
    deltas = {
        path: nothing.to(_DTYPE).expand(linear.weight.shape) for path, linear in attn2_projections(pipe.unet).items()
    }
    inside, outside = parted({} if spec.parts == "cross-attention" else _factors(spec, pipe))
    widths = {name: part.get_input_embeddings().weight.shape[1] for name, part in text_encoders(pipe).items()}
    concept = Concept(
        name=str(number),
        token=token,
        word=WORD,
        base_hash=BASE_HASH,
        embeddings={name: nothing.expand(1, width) for name, width in widths.items()},
        deltas=inside | deltas,
        outside=outside,
    )
    settings = {name: getattr(spec, name) for name in ("strength", "window", "scale", "negative_prompt", "parts")}
    return ConceptUse(concept, f"a {token} {WORD}", **settings)


def _factors(spec: BackgroundSpec, pipe) -> dict[str, Delta]:
    """What a LoRA changes by factors, without its numbers: of a file, or of what is to be trained."""
    if spec.file is not None:
        file = read_concept(spec).file
        found = dict(file.deltas) | dict(file.outside)
        shapes = {path: [part.shape for part in x] for path, x in found.items() if isinstance(x, LowRank)}
    else:
        settings = training_settings(spec.train, pipe)
        linears = transformer_linears(pipe.unet) if settings.layers == "all" else {}
        sides = {path: tuple(linear.weight.shape) for path, linear in linears.items()}
        shapes = {path: [(settings.rank, c), (o, settings.rank)] for path, (o, c) in sides.items()}
    nothing = torch.zeros(1, dtype=_DTYPE)
    return {path: LowRank(*(nothing.expand(shape) for shape in pair)) for path, pair in shapes.items()}
