"""The stages in order: template, masks, inversion and features, fusion; before them `weaver.concepts.bank`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from weaver.background import KeptBackground, default_seam, laid_over
from weaver.cache import Cache
from weaver.checks import argument_reasons, fusion_reasons
from weaver.choices import FEATURES, KEPT_AND_CHANGED
from weaver.concepts.concept import Concept, attn2_hash
from weaver.concepts.own_prompts import token_reasons
from weaver.defaults import default_dilation, default_sites, defaults_for, model_size
from weaver.errors import WeaverError, raise_if, told
from weaver.features import collect_features, reconstruction_psnr
from weaver.fusion.contexts import ConceptUse, as_use, encode_contexts
from weaver.fusion.inputs import eta_reasons
from weaver.fusion.plan import FusionPlan
from weaver.fusion.regional import regional_reasons
from weaver.fusion.sampler import sampler_for
from weaver.fusion.support import model_reasons
from weaver.graphs import CUDAGraphs, graph_reasons
from weaver.inversion import invert
from weaver.job import MaskSpec
from weaver.latents import decode_latents, tensor_to_images
from weaver.layers import InjectionSites, sites_for
from weaver.limits import step_reasons
from weaver.masks import TextMasks
from weaver.masks.pyramid import downsampling_reasons
from weaver.memory.plans import MemoryPlan
from weaver.memory.resting import modules_of, resting
from weaver.models import threads_for
from weaver.places import Places, places_of
from weaver.progress import Stages
from weaver.schedule import ddim_scheduler
from weaver.template import load_template, shown_size, template_picture

__all__ = ["WeaveResult", "template_picture", "weave"]

_OTHER_NOISE = 1_000_003  # what is added to the seed, with which the template's noise is drawn


@dataclass(frozen=True, eq=False)
class WeaveResult:
    """What one run gives.

    Parameters
    ----------
    image : the fused picture
    template : the picture whose composition it has
    masks : [N + 1, height, width] float32, summing to one, the background last
    names : of the N concepts
    prompts : one for each context, as fused: negative (None: as `FusionPlan.build` says), base, concepts, background
        where it is a concept
    reconstruction_psnr : how well the template is drawn again from its inversion, in dB; None with features of the
        inversion, where it is not
    settings : everything that was chosen or taken by default, plain values
    seconds : of each stage
    live_contexts : how many contexts a token attends to on average, by the map's "WIDTHxHEIGHT"
    cached : what was taken from the cache, "inversion" and "features"
    """

    image: Image.Image
    template: Image.Image
    masks: torch.Tensor
    names: tuple[str, ...]
    prompts: tuple[str | None, ...]
    reconstruction_psnr: float | None
    settings: dict
    seconds: dict[str, float]
    live_contexts: dict[str, float]
    cached: tuple[str, ...] = ()


def _on_model(function):
    """Refuse a pipeline that can't fuse; run with the threads that suit its model, its parts where they belong."""

    @wraps(function)
    def run(pipe, *args, memory: MemoryPlan | None = None, **kwargs):
        raise_if(model_reasons(pipe), "Cannot weave with this model")
        if not isinstance(memory, MemoryPlan | None):
            raise WeaverError(f"Cannot weave: memory: is {told(memory)}, expected MemoryPlan(features=...)")
        memory = memory or MemoryPlan()
        others = [module for module in modules_of(pipe) if module is not pipe.unet]
        with threads_for(pipe), resting(others if memory.offload else []):
            return function(pipe, *args, memory=memory, **kwargs)

    return run


@_on_model
def weave(
    pipe,
    prompt: str,
    concepts: Sequence[Concept | ConceptUse],
    *,
    background: Concept | ConceptUse | None = None,
    negative_prompt: str | None = None,
    template: Image.Image | str | Path | None = None,
    places: Places | Sequence[MaskSpec] | None = None,
    masks: torch.Tensor | np.ndarray | Sequence[torch.Tensor | np.ndarray] | None = None,
    mask_source: str | TextMasks | None = None,
    dilation: float | None = None,
    overlap: str = "priority",
    min_area: float = 0,
    fill_holes: bool = False,
    feather: int = 0,
    downsampling: str = "area",
    keep_background: bool = False,
    source_prompt: str | None = None,
    seed: int = 0,
    steps: int = 50,
    template_steps: int = 50,
    template_guidance: float | None = None,
    guidance: float | None = None,
    suppression: float | None = None,
    eta: float | None = None,
    sites: InjectionSites | str | None = None,
    features: str = "stored",
    size: tuple[int, int] | None = None,
    cache: Cache | None = None,
    memory: MemoryPlan | None = None,
    graphs: CUDAGraphs | bool = False,
    stages: Stages | None = None,
) -> WeaveResult:
    """Draw several personalised concepts into one picture, each in its place (Concept Weaver, section 3).

    Everything that can be checked is checked before the first sampling step. The picture does not pass the pipeline's
    safety checker; a template that `pipe` makes does, and is refused where the checker blacks it out.

    Parameters
    ----------
    pipe : a `StableDiffusionPipeline` or a `StableDiffusionXLPipeline`; it is left as it was
    prompt : p_base, without any concept's token
    negative_prompt : p_neg; None is what the pipeline takes where none is given
    concepts : N concepts, in the order of their priority where masks overlap
    background : a concept for what no mask covers; None leaves that to the base model
    template : a picture or its file, brought to `size` by `load_template`; None makes one from `prompt` with `pipe`,
        `seed` and `template_steps`
    places : where each concept stands; None finds each by its class word
    masks : [N, height, width] instead of `places`, in the template's pixels, 0.5 and more is inside; or
        [N + 1, height, width] as `compose_masks` returns them, the background last, which are taken as they are; or a
        list of as many [height, width]
    mask_source : who finds words, "segmenter" (the embedded model's), "attention", "text" (Grounding DINO and SAM,
        `weaver.masks.opening`) or such a `TextMasks` that is open; None is the best that needs no other weights
    dilation, overlap, min_area, fill_holes, feather : how masks are composed, as in `compose_masks`; a dilation of None
        is the model's default, of real models a 64th of the shorter side
    downsampling : how masks are reduced to the tokens of each map, "area" or "nearest" (`mask_pyramid`)
    keep_background : leave the template as it is outside of the masks, every pixel to the last bit but for a seam: the
        masks' `feather`, or else a 32nd of the shorter side about their edges. For real photos; not with `background`
    source_prompt : p_src, what the template shows; None is `prompt`
    steps : of inversion, reconstruction and fusion
    guidance : omega; None, like `suppression` (lambda), `eta` (of the fusion's DDIM steps) and `sites` (a table or its
        name, as `sites_for` takes it), is the model's default (`weaver.defaults`)
    features : "stored"; "replayed", the same picture in less memory and more time; or "inversion", which approximates
    size : (height, width) of the picture; None is the model's own
    cache : where the template's inversion is looked for, and kept; None keeps nothing
    memory : what is kept off the device to save its memory; None keeps everything there
    graphs : replay every stage's steps from CUDA graphs, which take the memory of a step's activations; a
        `weaver.graphs.CUDAGraphs` keeps them for later calls with this pipeline, whose fusions may have other concepts,
        as many or fewer, and other masks
    stages : takes the seconds and shows progress; None shows nothing

    Raises `WeaverError` when anything does not fit.
    """
    stages = stages or Stages(bars=False)
    defaults = defaults_for(pipe)
    texts = {"prompt": prompt, "negative_prompt": negative_prompt, "source_prompt": source_prompt}
    making = {"seed": seed, "template_steps": template_steps, "template_guidance": template_guidance}
    kinds = argument_reasons(concepts, background, texts, template, making, size=size, sites=sites, cache=cache)
    raise_if(kinds, "Cannot weave")
    uses, ground = [as_use(concept) for concept in concepts], background and as_use(background)
    everyone, names = [*uses, *([ground] if ground else [])], [use.name for use in uses]
    guidance = defaults.guidance if guidance is None else guidance
    suppression = defaults.suppression if suppression is None else suppression
    eta = defaults.eta if eta is None else eta
    sites = sites_for(sites) if isinstance(sites, str) else sites or default_sites(pipe)
    size = size or model_size(pipe)
    dilation = default_dilation(size, defaults.dilation) if dilation is None else dilation
    shaping = {"dilation": dilation, "overlap": overlap, "min_area": min_area, "fill_holes": fill_holes}
    shaping["feather"] = feather
    source_prompt = prompt if source_prompt is None else source_prompt
    amounts, base_hash = {"guidance": guidance, "suppression": suppression}, attn2_hash(pipe.unet)
    reasons = fusion_reasons(pipe, everyone, size=size, steps=steps, sites=sites, base_hash=base_hash, amounts=amounts)
    reasons += regional_reasons(pipe.unet, everyone)
    reasons += downsampling_reasons(downsampling) + eta_reasons(eta) + graph_reasons(pipe.unet, graphs)
    reasons += [] if everyone else ["there is no concept to draw"]
    reasons += [f"template_{reason}" for reason in step_reasons(pipe, template_steps)] if template is None else []
    reasons += [] if features in FEATURES else [f"features: is {told(features)}, expected one of {', '.join(FEATURES)}"]
    source = {} if source_prompt == prompt else {"source_prompt": source_prompt}
    reasons += token_reasons(source, [use.concept for use in everyone if use.concept])
    reasons += encode_contexts(pipe, prompt, negative_prompt, uses, ground)[2]
    try:
        own_size = None if template is None else shown_size(template)
        places = places_of(pipe, uses, places, masks, source=mask_source, size=size, source_size=own_size)
        reasons += places.word_reasons(pipe, source_prompt)
        known = places.compose(size, names=names, **shaping)
        reasons += [KEPT_AND_CHANGED] if ground and keep_background else []
        reasons += ["the masks leave the background's concept nothing"] if ground and not known[-1].any() else []
    except WeaverError as error:
        reasons.append(str(error))
    raise_if(reasons, "Cannot weave")

    of_stages = CUDAGraphs() if graphs is True else graphs or None
    if isinstance(template, Image.Image):
        template = load_template(template, size)
    else:
        template = template_picture(
            pipe,
            prompt if template is None else Path(template),
            size=size,
            seed=seed,
            steps=template_steps,
            guidance=template_guidance,
            negative_prompt=negative_prompt,
            graphs=of_stages,
            stages=stages,
        )
    with stages.stage("masks"):
        places = places.find(pipe, template, source_prompt, stages)
        final = places.compose(size, names=names, **shaping)
    with stages.stage("inversion"):
        with stages.bar("inversion", steps) as move:
            inversion = invert(pipe, template, source_prompt, steps, cache=cache, graphs=of_stages, progress=move)
        with stages.bar("features", steps) as move:
            again = features != "inversion"
            found = collect_features(
                pipe,
                inversion,
                sites,
                kind=memory.kind_of(features),
                reconstruct=again,
                storage=memory.storage,
                cache=cache,
                graphs=of_stages,
                progress=move,
            )
        of_stages = None  # unless the caller keeps them, their memory is free for the autoencoder and for the fusion's
        quality = None
        if again:
            with stages.step("drawing the template again"):
                quality = reconstruction_psnr(pipe, inversion, found)
    with stages.stage("fusion"):
        with stages.bar("fusion", steps) as move:
            plan = FusionPlan.build(
                pipe,
                uses,
                final,
                prompt=prompt,
                negative_prompt=negative_prompt,
                background=ground,
                features=found,
                downsampling=downsampling,
                base_hash=base_hash,
                **amounts,
            )
            scheduler = ddim_scheduler(pipe.scheduler)
            kept = KeptBackground.build(inversion.latents, final) if keep_background else None
            noise = torch.Generator().manual_seed((seed + _OTHER_NOISE) % 2**63)  # on the CPU: the same on every device
            with sampler_for(pipe.unet, scheduler, plan, eta, graphs or False) as sampler:
                z = sampler(found.z_T, generator=noise, background=kept, progress=move)
        with stages.step("decoding"):
            image = tensor_to_images(decode_latents(pipe.vae, z))[0]
        if keep_background:
            image = laid_over(template, image, final, 0 if feather > 1 else default_seam(size))
    settings = {
        "size": [size[1], size[0]],
        "seed": seed,
        "steps": steps,
        "guidance": guidance,
        "lambda": suppression,
        "eta": eta,
        "source_prompt": source_prompt,
        "injection": {
            "sites": sites.name,
            "resnet": sites.resnet_window,
            "attention": sites.attention_window,
            "features": features,
        },
        "keep_background": keep_background,
        "masks": {"sources": list(places.sources), **shaping, "downsampling": downsampling},
    }
    cached = tuple(name for name, part in (("inversion", inversion), ("features", found)) if part.cached)
    return WeaveResult(
        image,
        template,
        final,
        tuple(names),
        plan.prompts,
        quality,
        settings,
        dict(stages.seconds),
        {f"{w}x{h}": round(count, 3) for (h, w), count in sorted(plan.live_contexts.items(), reverse=True)},
        cached,
    )
