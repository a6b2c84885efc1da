"""Concepts, texts and masks of the shapes that a job's would have, without their files."""

from __future__ import annotations

import torch

from weaver.concepts.concept import Concept, attn2_projections
from weaver.conditioning import text_encoders
from weaver.fusion.contexts import ConceptUse
from weaver.job import BackgroundSpec, Job

__all__ = ["BASE_HASH", "PROMPT", "WORD", "delta_bytes", "masks_for", "uses_for"]

WORD = "picture"
PROMPT = f"a {WORD}"  # texts are padded to one length, whatever they say
BASE_HASH = "0" * 64
_DTYPE = torch.float16  # of the deltas in a concept's file


def uses_for(job: Job, pipe) -> tuple[list[ConceptUse], ConceptUse | None]:
    """A use for each concept of a job, and for the background where that is one."""
    uses = [_use(number, spec, pipe) for number, spec in enumerate(job.everyone)]
    return (uses[:-1], uses[-1]) if job.background else (uses, None)


def delta_bytes(pipe) -> int:
    """Bytes that the weights of one concept take."""
    return sum(linear.weight.numel() for linear in attn2_projections(pipe.unet).values()) * _DTYPE.itemsize


def masks_for(job: Job) -> torch.Tensor:
    """Masks [N + 1, height, width] as `compose_masks` returns them: stripes side by side, the background last."""
    masks = torch.zeros(len(job.concepts) + 1, *job.size)
    for mask, columns in zip(masks, torch.arange(job.size[1]).chunk(len(masks)), strict=True):
        mask[:, columns] = 1
    return masks


def _use(number: int, spec: BackgroundSpec, pipe) -> ConceptUse:
    token, nothing = f"<{number}>", torch.zeros(1)
    widths = {name: part.get_input_embeddings().weight.shape[1] for name, part in text_encoders(pipe).items()}
    concept = Concept(
        name=str(number),
        token=token,
        word=WORD,
        base_hash=BASE_HASH,
        embeddings={name: nothing.expand(1, width) for name, width in widths.items()},
        deltas={
            path: nothing.to(_DTYPE).expand(linear.weight.shape)
            for path, linear in attn2_projections(pipe.unet).items()
        },
    )
    settings = {name: getattr(spec, name) for name in ("strength", "window", "scale", "negative_prompt")}
    return ConceptUse(concept, f"a {token} {WORD}", **settings)
