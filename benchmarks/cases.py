"""One picture to fuse: random concepts as Custom Diffusion makes them, blobs for masks, a template of noise."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from benchmarks.shapes import blob_masks
from weaver.concepts.concept import Concept, attn2_hash, attn2_projections
from weaver.conditioning import text_encoders
from weaver.features import Features, collect_features
from weaver.fusion import ConceptUse, FusionPlan
from weaver.inversion import Inversion, invert
from weaver.layers import sites_for

__all__ = ["SUPPRESSION", "Case", "make_case", "make_concept", "with_concepts"]

WORDS = ("cat", "dog", "fox", "panda", "pig", "frog", "cat", "dog")  # each a token of the embedded model's
SUPPRESSION = 0.2  # above 0 every token attends to two contexts: the dearer case
CHANGE = 0.1  # of a concept's weights, as a part of the base's


@dataclass(frozen=True)
class Case:
    """A pipeline, a template's inversion and features, and a plan over them.

    uses : N concepts and, where N is not 0, the background as a concept; `masks` [N + 1, side, side] sum to one
    """

    pipe: object
    inversion: Inversion
    features: Features
    uses: tuple[ConceptUse, ...]
    masks: torch.Tensor
    plan: FusionPlan

    @property
    def n_concepts(self) -> int:
        return len(self.masks) - 1

    @property
    def z(self) -> torch.Tensor:
        """The noise [1, C, h, w] that everything starts from."""
        return self.features.z_T

    def make_plan(self, **changed) -> FusionPlan:
        """The plan, with other `uses` or `masks` if they are given."""
        return _plan(replace(self, **changed))


def make_case(pipe, n_concepts: int, steps: int, latents: torch.Tensor | None = None) -> Case:
    """N concepts on a background that is one too, over a template that is noise inverted in `steps`.

    `latents` are those of an inversion [steps + 1, C, h, w] that is taken as it is.
    """
    side = pipe.unet.config.sample_size
    z = torch.randn(1, pipe.unet.config.in_channels, side, side, generator=torch.Generator().manual_seed(0))
    inversion = invert(pipe, z, "a picture", steps)
    if latents is not None:
        inversion = replace(inversion, latents=latents.to(inversion.latents))
    features = collect_features(pipe, inversion, sites_for(pipe.unet), reconstruct=False)
    empty = Case(pipe, inversion, features, (), torch.ones(1, side, side), None)
    return with_concepts(empty, n_concepts)


def with_concepts(case: Case, n_concepts: int, seed: int = 0) -> Case:
    """The same template with N concepts of this seed."""
    words = [*WORDS[:n_concepts], "mountain"] if n_concepts else []
    base_hash = attn2_hash(case.pipe.unet)
    uses = tuple(ConceptUse(make_concept(case.pipe, i, word, seed, base_hash)) for i, word in enumerate(words))
    side = case.pipe.unet.config.sample_size
    masks = blob_masks(n_concepts, side) if n_concepts else torch.ones(1, side, side)
    case = replace(case, uses=uses, masks=masks)
    return replace(case, plan=_plan(case))


def make_concept(pipe, number: int, word: str, seed: int = 0, base_hash: str | None = None) -> Concept:
    """A token of its own, and a change of every cross-attention's key and value weights, all at random."""
    rng = torch.Generator().manual_seed(100 * seed + number)

    def like(weight: torch.Tensor, part: float = 1.0) -> torch.Tensor:
        drawn = torch.randn(weight.shape, generator=rng)
        return (part * weight.detach().float().std().cpu() * drawn).to(weight.device, weight.dtype)

    encoders = text_encoders(pipe).items()
    return Concept(
        name=f"concept {number}",
        token=f"<v{number}>",
        word=word,
        base_hash=base_hash or attn2_hash(pipe.unet),
        embeddings={name: like(encoder.get_input_embeddings().weight[:1]) for name, encoder in encoders},
        deltas={name: like(linear.weight, CHANGE) for name, linear in attn2_projections(pipe.unet).items()},
    )


def _plan(case: Case) -> FusionPlan:
    *concepts, background = case.uses or [None]
    words = [use.concept.word for use in concepts]
    return FusionPlan.build(
        case.pipe,
        concepts,
        case.masks,
        prompt=", ".join([*(f"a {word}" for word in words), "mountain background"]),
        negative_prompt="ugly",
        background=background,
        suppression=SUPPRESSION,
        features=case.features,
    )
