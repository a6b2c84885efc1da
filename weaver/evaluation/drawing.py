"""A case's template, and its picture by any arm."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from PIL import Image

from weaver.concepts.concept import Concept
from weaver.concepts.prompts import derive_prompt
from weaver.defaults import embedded_defaults
from weaver.embedded.catalog import CONCEPTS
from weaver.embedded.identity import classify_animal
from weaver.embedded.world import Spot, draw_scene
from weaver.evaluation.measures import find_animals
from weaver.evaluation.merging import merge, with_tokens
from weaver.evaluation.mixing import sample_score_mix
from weaver.evaluation.prompts import Case
from weaver.evaluation.settings import Settings
from weaver.features import collect_features
from weaver.fusion.contexts import ConceptUse
from weaver.fusion.plan import FusionPlan
from weaver.fusion.sampler import sample_fusion
from weaver.inversion import Inversion, invert
from weaver.job.choose import SEED_STRIDE
from weaver.latents import decode_latents, tensor_to_images
from weaver.layers import EMBEDDED
from weaver.masks import compose_masks
from weaver.schedule import ddim_scheduler

__all__ = ["STEPS", "Drawer", "Template"]

STEPS = 24
"""Of template, inversion and picture: so few that the whole suite takes seventy minutes of two cores."""
TRIES = 3
"""Seeds of a template that the model makes, before one that is drawn stands in for it."""
_OTHER_NOISE = 7_919  # added to the seed for the noise that fusion draws anew

# (centre x, centre y, size) of two animals, see `weaver.embedded.world`.
_SPOTS: dict[str, list[Spot]] = {
    "touching": [((0.28, 0.3), (0.56, 0.64), (0.44, 0.46)), ((0.7, 0.72), (0.56, 0.64), (0.44, 0.46))],
    "overlapping": [((0.33, 0.35), (0.5, 0.56), (0.46, 0.48)), ((0.64, 0.66), (0.6, 0.66), (0.46, 0.48))],
}


@dataclass(frozen=True, eq=False)
class Template:
    """The picture whose composition is kept.

    Parameters
    ----------
    picture : 64 x 64 pixels
    masks : one dense mask [h, w] bool an animal of the prompt
    source : "made", by the model; or "drawn", by the world, where it was to be or the model did not draw every animal
    """

    picture: Image.Image
    masks: tuple[np.ndarray, ...]
    source: str


@dataclass(eq=False)
class Drawer:
    """Draws one case, with what its arms share made once.

    Parameters
    ----------
    pipe : the embedded model
    concepts : those of the prompt by name
    steps : of every picture, and of the inversion
    """

    pipe: object
    case: Case
    concepts: Mapping[str, Concept]
    steps: int = STEPS
    _plain: dict = field(default_factory=dict)
    _merged: dict = field(default_factory=dict)
    _features: dict = field(default_factory=dict)

    @cached_property
    def template(self) -> Template:
        """The first picture of the model that shows every animal as what it is; or one that the world draws."""
        prompt = self.case.prompt
        if prompt.layout == "made":
            for extra in range(TRIES):
                picture = self._of_prompt(self.case.seed + extra * SEED_STRIDE, embedded_defaults().template_guidance)
                masks = find_animals(picture, prompt.words, prompt.text)
                if all(
                    mask is not None and classify_animal(picture, mask) == word
                    for mask, word in zip(masks, prompt.words, strict=True)
                ):
                    return Template(picture, tuple(masks), "made")
        rng = random.Random(f"{prompt.name}-{self.case.seed}")
        options = {"animals": list(prompt.words), "background": prompt.ground_word, "varied": False}
        scene = draw_scene(rng, spots=_SPOTS.get(prompt.layout), **options)
        masks = tuple(scene.mask(index) for index in range(len(prompt.animals)))
        return Template(scene.image, masks, "drawn")

    def draw(self, settings: Settings) -> Image.Image:
        """The picture by one arm's settings."""
        if settings.kind == "prompt":
            return self._of_prompt(self.case.seed, settings.guidance)
        if settings.kind == "merged":
            return self._of_merged(settings)
        latents = self._mixed(settings) if settings.kind == "mixed" else self._fused(settings)
        return tensor_to_images(decode_latents(self.pipe.vae, latents))[0]

    def _of_prompt(self, seed: int, guidance: float) -> Image.Image:
        if (seed, guidance) not in self._plain:
            self._plain[seed, guidance] = self._call(self.pipe, self.case.prompt.text, guidance, seed)
        return self._plain[seed, guidance]

    def _of_merged(self, settings: Settings) -> Image.Image:
        if settings.merge not in self._merged:
            uses = {use.concept.name: use for use in self._all_uses("whole")}  # one that stands twice once
            prompts = {name: use.prompt for name, use in uses.items()}
            found = [use.concept for use in uses.values()]
            self._merged[settings.merge] = merge(self.pipe, prompts, found, settings.merge)
        pipe = self._merged[settings.merge]
        return self._call(pipe, self.case.prompt.text_with_tokens, settings.guidance, self.case.seed)

    def _call(self, pipe, text: str, guidance: float, seed: int) -> Image.Image:
        generator = torch.Generator().manual_seed(seed)
        return pipe(text, num_inference_steps=self.steps, guidance_scale=guidance, generator=generator).images[0]

    @cached_property
    def _inversion(self) -> Inversion:
        return invert(self.pipe, self.template.picture, self.case.prompt.text, self.steps)

    def _collected(self, settings: Settings):
        windows = settings.resnet_window or 0.0, settings.attention_window or 0.0
        if windows not in self._features:
            self._features.clear()
            sites = replace(EMBEDDED, resnet_window=windows[0], attention_window=windows[1])
            self._features[windows] = collect_features(self.pipe, self._inversion, sites, reconstruct=False)
        return self._features[windows]

    def _masks(self, dilation: int) -> torch.Tensor:
        """[N + 1, h, w] of the concepts; the base model's own animals are background."""
        own = [m for m, name in zip(self.template.masks, self.case.prompt.animals, strict=True) if name in CONCEPTS]
        return compose_masks(np.stack(own), dilation=dilation)

    def _all_uses(self, parts: str) -> list[ConceptUse]:
        """The animals' uses, and the background's last; each prompt names one concept at its own place."""
        prompt, uses, seen = self.case.prompt, [], {}
        for name, word in zip(prompt.animals, prompt.words, strict=True):
            place = seen[word] = seen.get(word, -1) + 1
            if name in CONCEPTS:
                concept, others = self.concepts[name], [other for other in prompt.words if other != word]
                text = derive_prompt(prompt.text, concept, occurrence=place, without=others)
                uses.append(ConceptUse(concept, prompt=text, parts=parts))
        if prompt.background:
            concept = self.concepts[prompt.background]
            uses.append(ConceptUse(concept, prompt=derive_prompt(prompt.text, concept), parts=parts))
        return uses

    def _mixed(self, settings: Settings) -> torch.Tensor:
        uses = self._all_uses("whole")
        ground = uses.pop() if self.case.prompt.background else None
        return sample_score_mix(
            self.pipe,
            uses,
            self._masks(settings.dilation),
            self._collected(settings),
            prompt=self.case.prompt.text,
            background=ground,
            guidance=settings.guidance,
            eta=settings.eta,
            generator=self._noise(),
        )

    def _fused(self, settings: Settings) -> torch.Tensor:
        uses, pipe = self._all_uses(settings.parts), self.pipe
        if settings.shared_prompt:
            pipe = with_tokens(self.pipe, list(self.concepts.values()))  # its own prompt is checked to name one token
            uses = [replace(use, concept=_known(use.concept), prompt=self.case.prompt.text_with_tokens) for use in uses]
        ground = uses.pop() if self.case.prompt.background else None
        features = self._collected(settings) if settings.injected else None
        plan = FusionPlan.build(
            pipe,
            uses,
            self._masks(settings.dilation),
            prompt=self.case.prompt.text,
            background=ground,
            suppression=settings.suppression,
            guidance=settings.guidance,
            features=features,
            steps=self.steps,
        )
        scheduler = ddim_scheduler(self.pipe.scheduler)
        noise = {"eta": settings.eta, "generator": self._noise()}
        return sample_fusion(self.pipe.unet, self._inversion.z_T, scheduler, plan, **noise)

    def _noise(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.case.seed + _OTHER_NOISE)


def _known(concept: Concept) -> Concept:
    """The concept whose token the text encoder knows as a word of its own."""
    return replace(concept, embeddings={})
