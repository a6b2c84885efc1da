"""Between a job file and its run: the model's defaults filled in, and what only a model can tell checked."""

from __future__ import annotations

from dataclasses import asdict, replace

import torch

from weaver.checks import fusion_reasons
from weaver.concepts.bank import training_settings
from weaver.concepts.concept import Concept
from weaver.defaults import default_dilation, default_sites, defaults_for, model_size
from weaver.errors import WeaverError
from weaver.job import SAME_MODEL, Job, JobError, TextSpec, TrainSpec
from weaver.job.inputs import shipped_name
from weaver.layers import SITES
from weaver.limits import step_reasons
from weaver.masks import MaskError
from weaver.masks.grounded import DETECTOR, OUTLINER
from weaver.models import ModelError, is_embedded
from weaver.places import Places, best_source
from weaver.template import shown_size

__all__ = [
    "TEMPLATE_MODEL",
    "check_model",
    "final_masks",
    "in_field",
    "mask_fields",
    "open_finder",
    "place_concepts",
    "resolve_job",
]

TEMPLATE_MODEL = "stabilityai/stable-diffusion-xl-base-1.0"  # the paper's


def resolve_job(job: Job, pipe, prompts: list[str], source: str = "job") -> Job:
    """The same job with every default of the model written out, so that it no longer depends on defaults.

    The device is the one the model is on: another may draw another picture. `prompts` are those of `Job.everyone`.
    Raises `JobError`, led by `source`, for training settings that do not go with the model's own.
    """
    defaults, embedded = defaults_for(pipe), is_embedded(pipe)
    size = job.size or model_size(pipe)
    wishes, template = job.fusion, job.template
    sites = SITES[wishes.sites] if wishes.sites else default_sites(pipe)
    settings, problems = _resolve_training(job, pipe)
    if problems:
        raise JobError(f"{source}: " + "; ".join(problems))
    specs = zip(job.everyone, prompts, settings, strict=True)
    everyone = [replace(spec, prompt=prompt, train=train) for spec, prompt, train in specs]
    if template.image is None:
        model = template.model or (SAME_MODEL if embedded else TEMPLATE_MODEL)
        model = SAME_MODEL if model == job.model else model
        template = replace(
            template,
            prompt=template.prompt or job.prompt,
            model=model,
            seed=_or(template.seed, job.seed),
            guidance=_or(template.guidance, defaults.template_guidance) if model == SAME_MODEL else template.guidance,
        )
    return replace(
        job,
        device=pipe.device.type,
        size=size,
        inversion_prompt=_or(job.inversion_prompt, job.prompt),
        template=template,
        concepts=tuple(everyone[: len(job.concepts)]),
        background=everyone[-1] if job.background else None,
        masks=replace(
            job.masks,
            source=job.masks.source or best_source(pipe),
            dilation=_or(job.masks.dilation, default_dilation(size, defaults.dilation)),
            text=_resolve_text(job.masks.text),
        ),
        fusion=replace(
            wishes,
            suppression=_or(wishes.suppression, defaults.suppression),
            guidance=_or(wishes.guidance, defaults.guidance),
            eta=_or(wishes.eta, defaults.eta),
            sites=sites.name,
            resnet_window=_or(wishes.resnet_window, sites.resnet_window),
            attention_window=_or(wishes.attention_window, sites.attention_window),
        ),
    )


def check_model(job: Job, pipe, source: str) -> None:
    """Whether the model can fuse as the job asks.

    `job` has its defaults resolved. Raises `JobError` with every field that is wrong.
    """
    amounts = {"fusion.guidance": job.fusion.guidance, "fusion.lambda": job.fusion.suppression}
    problems = fusion_reasons(
        pipe,
        size=job.size,
        steps=job.steps,
        sites=SITES[job.fusion.sites],
        amounts=amounts,
        sites_field="fusion.injection.sites",
    )
    if job.template.image is None and job.template.model == SAME_MODEL:
        problems += [f"template.{reason}" for reason in step_reasons(pipe, job.template.steps)]
    problems += [] if is_embedded(pipe) else _embedded_only(job) + _prior_reasons(job, pipe)
    if problems:
        raise JobError(f"{source}: " + "; ".join(problems))


def _prior_reasons(job: Job, pipe) -> list[str]:
    """Concepts whose pictures of the class, which the model makes, are to have other steps than it can draw."""
    return [
        f"{place}.train.prior_{reason}"
        for place, spec in job.places()
        if spec.train and dict(spec.train.settings)["prior_batch"]
        for reason in step_reasons(pipe, dict(spec.train.settings)["prior_steps"])
    ]


def _embedded_only(job: Job) -> list[str]:
    """What a job takes from the embedded model's world, which another model can't use."""
    reasons = [
        f"{place}: {name!r} belongs to the embedded model, the model is {job.model!r}"
        for place, spec in job.places()
        if (name := shipped_name(spec)) is not None
    ]
    if job.masks.source == "segmenter":
        reasons.append(
            "masks.source: the segmenter knows the embedded model's world only; use 'attention' or 'text', or give "
            "every concept a mask file or box"
        )
    return reasons


def place_concepts(job: Job, known: dict[str, Concept], pipe, source: str) -> Places:
    """Read the masks that are given; `JobError` with every field that holds an unusable one, or a word nobody can find.

    They are composed to see that each leaves the others something; what is still to be found can only take more away.
    """
    own_size = shown_size(job.template.image) if job.template.image else None
    specs = [spec.mask for spec in job.concepts]
    words = [spec.word or known[spec.name].word for spec in job.concepts]
    labels = mask_fields(job)
    try:
        places = Places.build(specs, words, labels, source=job.masks.source, size=job.size, source_size=own_size)
        final_masks(job, places)
    except WeaverError as error:
        raise JobError(f"{source}: {error}") from error
    problems = [
        f"{label}: {reason}"
        for label, wish in zip(labels, places.wishes, strict=True)
        for reason in replace(places, wishes=(wish,)).word_reasons(pipe, job.inversion_prompt)
    ]
    if problems:
        raise JobError(f"{source}: " + "; ".join(problems))
    return places


def open_finder(job: Job, places: Places, source: str, *, offline: bool = False) -> Places:
    """The same places with the Grounding DINO and SAM loaded that the job names; `JobError` where they can't be."""
    try:
        return places.opened(**asdict(job.masks.text), device=job.device, offline=offline)
    except WeaverError as error:
        raise JobError(f"{source}: {error}") from error


def mask_fields(job: Job) -> list[str]:
    """The field of every concept's mask, the background's not: "concepts[0].mask", ..."""
    return [f"concepts[{number}].mask" for number in range(len(job.concepts))]


def final_masks(job: Job, places: Places) -> torch.Tensor:
    """The final masks [N + 1, height, width] of a job, its defaults resolved; before all are found, of those that are.

    Raises `MaskError` naming the fields of masks that can't be used, or leave a concept or the background's nothing.
    """
    names = mask_fields(job)
    final = places.compose(job.size, names=names, **job.masks.shaping)
    if job.background and not final[-1].any():
        raise MaskError(
            "background: the masks cover the whole picture and leave it nothing; make them or masks.dilation "
            "smaller, or leave the background out"
        )
    return final


def in_field(field: str, source: str, function, *args, **kwargs):
    """Call a function, and tell a `ModelError` with the job's field."""
    try:
        return function(*args, **kwargs)
    except ModelError as error:
        raise JobError(f"{source}: {field}: {error}") from error


def _resolve_training(job: Job, pipe) -> tuple[list[TrainSpec | None], list[str]]:
    """How every concept of `Job.everyone` is trained, all settings written out, and what is wrong with them."""
    found, problems = [], []
    for place, spec in job.places():
        train = spec.train
        if train:
            try:
                train = replace(train, settings=tuple(asdict(training_settings(train, pipe)).items()))
            except WeaverError as error:
                problems.append(f"{place}.train: {error}")
        found.append(train)
    return found, problems


def _resolve_text(spec: TextSpec) -> TextSpec:
    if spec.backend != "transformers":
        return spec
    return replace(spec, detector=spec.detector or DETECTOR, segmenter=spec.segmenter or OUTLINER)


def _or(value, default):
    return default if value is None else value
