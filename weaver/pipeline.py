"""The stages in order: template, masks, inversion and features, fusion. The bank is filled before, by `weaver.bank`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from weaver.concepts.concept import Concept
from weaver.concepts.own_prompts import own_prompts, token_reasons
from weaver.defaults import default_dilation, defaults_for, model_size, setting_reasons
from weaver.errors import WeaverError, raise_if
from weaver.features import collect_features, reconstruction_psnr
from weaver.fusion.contexts import ConceptUse, encode_contexts, use_reasons
from weaver.fusion.plan import FusionPlan
from weaver.fusion.sampler import sample_fusion
from weaver.inversion import ddim_scheduler, invert
from weaver.job import MaskSpec
from weaver.latents import decode_latents, tensor_to_images
from weaver.layers import InjectionSites
from weaver.masks import compose_masks
from weaver.models import threads_for
from weaver.places import Places, best_source
from weaver.progress import Stages
from weaver.template import load_template, make_template

__all__ = ["WeaveResult", "template_picture", "weave"]


@dataclass(frozen=True, eq=False)
class WeaveResult:
    """What one run gives.

    Parameters
    ----------
    image : the fused picture
    template : the picture whose composition it has
    masks : [N + 1, height, width] float32, summing to one, the background last
    names : of the N concepts
    prompts : one for each context, as fused: negative, base, concepts, background where it is a concept
    reconstruction_psnr : how well the template is drawn again from its inversion, in dB
    settings : everything that was chosen or taken by default, plain values
    seconds : of each stage
    """

    image: Image.Image
    template: Image.Image
    masks: torch.Tensor
    names: tuple[str, ...]
    prompts: tuple[str, ...]
    reconstruction_psnr: float
    settings: dict
    seconds: dict[str, float]


def _few_threads(function):
    @wraps(function)
    def run(pipe, *args, **kwargs):
        with threads_for(pipe):
            return function(pipe, *args, **kwargs)

    return run


@_few_threads
def weave(
    pipe,
    prompt: str,
    concepts: Sequence[Concept | ConceptUse],
    *,
    background: Concept | ConceptUse | None = None,
    negative_prompt: str = "",
    template: Image.Image | str | Path | None = None,
    places: Places | Sequence[MaskSpec] | None = None,
    masks: torch.Tensor | np.ndarray | None = None,
    mask_source: str | None = None,
    dilation: int | None = None,
    overlap: str = "priority",
    source_prompt: str | None = None,
    seed: int = 0,
    steps: int = 50,
    template_steps: int = 50,
    template_guidance: float | None = None,
    guidance: float | None = None,
    suppression: float | None = None,
    sites: InjectionSites | None = None,
    size: tuple[int, int] | None = None,
    stages: Stages | None = None,
) -> WeaveResult:
    """Draw several personalised concepts into one picture, each in its place (Concept Weaver, section 3).

    Everything that can be checked is checked before the first sampling step.

    Parameters
    ----------
    pipe : a `StableDiffusionPipeline`; it is left as it was
    prompt : p_base, without any concept's token
    concepts : N concepts, in the order of their priority where masks overlap
    background : a concept for what no mask covers; None leaves that to the base model
    template : a picture or its file; None makes one from `prompt` with `pipe`, `seed` and `template_steps`
    places : where each concept stands; None finds each by its class word
    masks : [N, height, width] instead of `places`, in the template's pixels, 0.5 and more is inside
    mask_source : who finds words, "segmenter" (the embedded model's) or "attention"; None is the best there is
    dilation : pixels that masks grow by; None is a 64th of the shorter side
    overlap : who gets what two masks claim, "priority" or "share"
    source_prompt : p_src, what the template shows; None is `prompt`
    steps : of inversion, reconstruction and fusion
    guidance : omega; None, like `suppression` (lambda) and `sites`, is the model's default (`weaver.defaults`)
    size : (height, width) of the picture; None is the model's own
    stages : takes the seconds and shows progress; None shows nothing

    Raises `WeaverError` when anything does not fit.
    """
    stages = stages or Stages(bars=False)
    defaults = defaults_for(pipe)
    uses, ground = _uses(prompt, concepts, background)
    guidance = defaults.guidance if guidance is None else guidance
    suppression = defaults.suppression if suppression is None else suppression
    sites = sites or defaults.sites
    size = size or model_size(pipe)
    dilation = default_dilation(size) if dilation is None else dilation
    source_prompt = prompt if source_prompt is None else source_prompt
    everyone = [*uses, *([ground] if ground else [])]
    reasons = setting_reasons(pipe, size, steps) + use_reasons(pipe, everyone)
    reasons += [] if everyone else ["there is no concept to draw"]
    texts = {"prompt": prompt, "negative_prompt": negative_prompt, "source_prompt": source_prompt}
    reasons += token_reasons(texts, [use.concept for use in everyone if use.concept])
    raise_if(reasons + encode_contexts(pipe, prompt, negative_prompt, everyone)[2], "Cannot weave")
    places = _places(pipe, uses, places, masks, mask_source, size)

    if not isinstance(template, Image.Image):
        template = template_picture(
            pipe,
            prompt if template is None else Path(template),
            size=size,
            seed=seed,
            steps=template_steps,
            guidance=template_guidance,
            negative_prompt=negative_prompt,
            stages=stages,
        )
    if template.size != (size[1], size[0]):
        raise WeaverError(f"the template is {template.width}x{template.height}, expected {size[1]}x{size[0]}")
    template = template.convert("RGB")
    with stages.stage("masks"):
        places = places.find(pipe, template, source_prompt)
        final = compose_masks(
            places.dense(size),
            dilation=dilation,
            overlap=overlap,
            names=[use.name for use in uses],
        )
    with stages.stage("inversion"):
        with stages.bar("inversion", steps) as move:
            inversion = invert(pipe, template, source_prompt, steps, progress=move)
        with stages.bar("features", steps) as move:
            features = collect_features(pipe, inversion, sites, progress=move)
        quality = reconstruction_psnr(pipe, inversion, features)
    with stages.stage("fusion"), stages.bar("fusion", steps) as move:
        plan = FusionPlan.build(
            pipe,
            uses,
            final,
            prompt=prompt,
            negative_prompt=negative_prompt,
            background=ground,
            suppression=suppression,
            features=features,
        )
        scheduler = ddim_scheduler(pipe.scheduler)
        z = sample_fusion(pipe.unet, features.z_T, scheduler, plan, guidance_scale=guidance, progress=move)
        image = tensor_to_images(decode_latents(pipe.vae, z))[0]
    settings = {
        "size": [size[1], size[0]],
        "seed": seed,
        "steps": steps,
        "guidance": guidance,
        "lambda": suppression,
        "source_prompt": source_prompt,
        "injection": {"sites": sites.name, "resnet": sites.resnet_window, "attention": sites.attention_window},
        "masks": {"sources": list(places.sources), "dilation": dilation, "overlap": overlap},
    }
    return WeaveResult(
        image, template, final, tuple(use.name for use in uses), plan.prompts, quality, settings, dict(stages.seconds)
    )


def _places(pipe, uses, places, masks, source, size) -> Places:
    if places is not None and masks is not None:
        raise WeaverError("give either masks or places, not both")
    if isinstance(places, Places):
        return places
    if masks is not None:
        return Places.from_masks(masks, len(uses), size)
    places = [MaskSpec()] * len(uses) if places is None else places
    if len(places) != len(uses):
        raise WeaverError(f"{len(places)} places for {len(uses)} concepts; give one a concept")
    words = [use.concept.word if use.concept else None for use in uses]
    labels = [f"the place of {use.name}" for use in uses]
    return Places.build(places, words, labels, source=source or best_source(pipe), size=size)


def _uses(prompt: str, concepts, background) -> tuple[list[ConceptUse], ConceptUse | None]:
    """Every concept as a use with a prompt of its own; what can't be derived is left for the checks to tell."""
    uses = [concept if isinstance(concept, ConceptUse) else ConceptUse(concept) for concept in concepts]
    ground = ConceptUse(background) if isinstance(background, Concept) else background
    named = [use for use in uses if use.concept is not None]
    derived = own_prompts(prompt, [use.concept for use in named], ground and ground.concept)
    own = dict(zip([*map(id, named), id(ground)], derived, strict=False))

    def written(use: ConceptUse) -> ConceptUse:
        text = own.get(id(use))
        return replace(use, prompt=text) if use.prompt is None and isinstance(text, str) else use

    return [written(use) for use in uses], ground and written(ground)


def template_picture(
    pipe,
    source: str | Path,
    *,
    size: tuple[int, int],
    seed: int = 0,
    steps: int = 50,
    guidance: float | None = None,
    negative_prompt: str = "",
    stages: Stages | None = None,
) -> Image.Image:
    """The template at `size` (height, width): read from a `Path`, or made by `pipe` from a prompt.

    `guidance` None is the model's default, which for a pipeline that can't fuse is its own.
    """
    stages = stages or Stages(bars=False)
    with stages.stage("template"):
        if isinstance(source, Path):
            return load_template(source, size)
        if guidance is None and type(pipe).__name__ == "StableDiffusionPipeline":
            guidance = defaults_for(pipe).guidance
        with stages.pipeline_bar(pipe, "template"):
            return make_template(
                pipe,
                source,
                seed=seed,
                steps=steps,
                guidance=guidance,
                negative_prompt=negative_prompt or None,
                size=size,
            )
