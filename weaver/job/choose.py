"""Choose a job's template: of several seeds the first whose picture shows all that the prompt names."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace

import torch
from PIL import Image

from weaver.errors import WeaverError
from weaver.graphs import CUDAGraphs
from weaver.job import Job, JobError
from weaver.job.fields import LARGEST
from weaver.job.inputs import shipped_name
from weaver.job.resolve import final_masks, mask_fields
from weaver.job.spec import TemplateSpec
from weaver.masks import MaskError
from weaver.masks.assign import NotFoundError
from weaver.models import is_embedded
from weaver.places import Places
from weaver.progress import Stages
from weaver.template import template_picture

__all__ = ["SEED_STRIDE", "choose_template", "template_seeds"]

SEED_STRIDE = 1_000_003  # between the seeds of several templates, so that neighbouring seeds stay different pictures


def choose_template(
    job: Job, pipe, maker, places: Places, stages: Stages, source: str, *, graphs: bool = False
) -> tuple[Job, Image.Image, Places]:
    """Make or read the template, up to `TemplateSpec.tries` times, and find where everything stands in it.

    Parameters
    ----------
    job : with its defaults resolved
    pipe : the model that fuses, whose attention can find words
    maker : the pipeline that makes the template; it is given the negative prompt if it takes one
    places : what is known of the concepts' masks
    source : what to call the job in errors
    graphs : replay the maker's forwards from CUDA graphs

    Returns the job, which names the seed that was taken, the template and the places, every mask found.
    Raises `JobError` naming the template where it can't be used or made, else the fields whose masks can't be found in
    any of the templates, or leave a concept nothing.
    """
    spec = job.template
    takes_negative = "negative_prompt" in inspect.signature(maker.__call__).parameters
    embedded = is_embedded(pipe)
    best, fewest, failure = None, len(job.concepts) + 1, None
    for seed in template_seeds(spec):
        try:
            template = template_picture(
                maker,
                spec.image or spec.prompt,
                size=job.size,
                seed=seed,
                steps=spec.steps,
                guidance=spec.guidance,
                negative_prompt=job.negative_prompt if takes_negative else "",
                graphs=CUDAGraphs() if graphs else None,  # a maker that rests on the host comes back to another place
                stages=stages,
            )
        except WeaverError as error:
            raise JobError(f"{source}: {'template.image' if spec.image else 'template'}: {error}") from error
        try:
            with stages.stage("masks"):
                found, masks = _find(job, pipe, template, places, stages)
                unlike = _unlike(job, template, masks) if spec.tries > 1 and embedded else 0
        except MaskError as error:
            failure = error
            continue
        if unlike < fewest:
            best, fewest = (seed, template, found), unlike
        if unlike == 0:
            break
    if best is None:
        tried = f"; {spec.tries} templates were tried, from seed {spec.seed}" if spec.tries > 1 else ""
        raise JobError(f"{source}: {failure}{tried}") from failure
    seed, template, found = best
    if not spec.image:
        job = replace(job, template=replace(spec, seed=seed, tries=1))
    return job, template, found


def template_seeds(spec: TemplateSpec) -> Iterator[int]:
    """The seeds that a job's template is tried with, in their order; each is one that a job may name."""
    for number in range(spec.tries):
        yield ((spec.seed or 0) + number * SEED_STRIDE) % (LARGEST + 1)


def _find(job: Job, pipe, template: Image.Image, places: Places, stages: Stages) -> tuple[Places, torch.Tensor]:
    """Every mask, and the final ones [N + 1, height, width]; `MaskError` with the fields of those that will not do."""
    try:
        found = places.find(pipe, template, job.inversion_prompt, stages)
    except NotFoundError as error:
        named = [field for field, word in zip(mask_fields(job), places.words, strict=True) if word in error.words]
        raise MaskError(f"{', '.join(named)}: {error}") from error
    except MaskError as error:
        raise MaskError(f"masks: {error}") from error
    return found, final_masks(job, found)


def _unlike(job: Job, template: Image.Image, masks: torch.Tensor) -> int:
    """How many regions do not look like their class word to the embedded model's classifier."""
    from weaver.embedded import CONCEPTS
    from weaver.embedded.identity import classify_animal

    names = [shipped_name(spec) for spec in job.concepts]
    return sum(
        classify_animal(template, mask.numpy()) != CONCEPTS[name].word
        for name, mask in zip(names, masks, strict=False)
        if name is not None and CONCEPTS[name].kind == "animal"
    )
