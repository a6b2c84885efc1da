"""What can be known before the first sampling step: why a model and its settings can't fuse."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from PIL import Image

from weaver.cache import Cache
from weaver.errors import told
from weaver.fusion.attach import installable_reasons
from weaver.fusion.contexts import ConceptUse, concept_reasons, use_reasons
from weaver.fusion.inputs import amount_reasons, string_reasons
from weaver.fusion.support import model_reasons
from weaver.layers import SITES, InjectionSites, site_reasons
from weaver.limits import size_reasons, step_reasons
from weaver.values import is_whole

__all__ = ["argument_reasons", "fusion_reasons"]


def argument_reasons(
    concepts, background, texts: Mapping, template, making: Mapping, *, size, sites, cache
) -> list[str]:
    """Which arguments of `weave` are of another kind than it takes; empty when none is.

    `texts` are its prompts by what they are called, of which "prompt" has to be there; `making` are "seed",
    "template_steps" and "template_guidance". What is wrong with their values is found later.
    """
    reasons = concept_reasons(concepts, background) + string_reasons(texts, optional={*texts} - {"prompt"})
    if not isinstance(template, Image.Image | str | os.PathLike | None):
        reasons.append(f"template: is {told(template)}, expected a picture, its file, or None")
    if size is not None and not (isinstance(size, Sequence) and len(size) == 2 and all(map(is_whole, size))):
        reasons.append(f"size: is {told(size)}, expected (height, width) in pixels")
    for name in ("seed", "template_steps"):
        if not is_whole(making[name]):
            reasons.append(f"{name}: is {told(making[name])}, expected a whole number")
    if is_whole(making["seed"]) and not -(2**63) <= making["seed"] < 2**64:
        reasons.append(f"seed: is {told(making['seed'])}, expected one of 64 bits, as PyTorch takes them")
    if making["template_guidance"] is not None:
        reasons += amount_reasons({"template_guidance": making["template_guidance"]})
    if not isinstance(sites, InjectionSites | None) and not (isinstance(sites, str) and sites in SITES):
        reasons.append(f"sites: is {told(sites)}, expected an InjectionSites or one of {', '.join(SITES)}")
    if not isinstance(cache, Cache | None):
        reasons.append(f"cache: is {told(cache)}, expected a Cache: Cache(folder) keeps results in a folder")
    return reasons


def fusion_reasons(
    pipe,
    uses: Sequence[ConceptUse] = (),
    *,
    size: tuple[int, int],
    steps: int,
    sites: InjectionSites,
    amounts: Mapping[str, float],
    base_hash: str | None = None,
    sites_field: str = "sites",
) -> list[str]:
    """Everything that stands against a fusion, short of its prompts and masks; empty when nothing does.

    Parameters
    ----------
    uses : of all concepts, the background's too; those that are still to be trained are left out
    size : (height, width) of the picture in pixels
    sites : where features will be injected
    amounts : omega and lambda, by what to call them
    base_hash : `attn2_hash` of the pipeline's U-Net where it is known
    sites_field : what to call where `sites` come from
    """
    if reasons := model_reasons(pipe):
        return [f"model: {reason}" for reason in reasons]
    return [
        *step_reasons(pipe, steps),
        *size_reasons(pipe, size),
        *amount_reasons(amounts),
        *(f"{sites_field}: {reason}" for reason in site_reasons(pipe.unet, sites)),
        *(f"model: {reason}" for reason in installable_reasons(pipe.unet, sites)),
        *use_reasons(pipe, uses, base_hash),
    ]
