"""Run a job: everything checked first, then bank and stages, then all results written at once."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from weaver.bank import read_concept, resolve_prompts, train_bank
from weaver.concepts.concept import Concept
from weaver.errors import WeaverError
from weaver.fusion.contexts import ConceptUse
from weaver.inputs import read_inputs, shipped_name
from weaver.job import Job, JobError
from weaver.layers import SITES
from weaver.manifest import picture_record
from weaver.masks import MaskError, compose_masks
from weaver.models import ModelError, choose_device, load_model, threads_for
from weaver.outputs import make_report, write_outputs
from weaver.pipeline import WeaveResult, template_picture, weave
from weaver.places import Places
from weaver.progress import Stages
from weaver.resolve import check_model, place_concepts, resolve_job

__all__ = ["Run", "run_job"]

_SEED_STRIDE = 1_000_003  # between the seeds of several templates, so that neighbouring seeds stay different pictures


@dataclass(frozen=True, eq=False)
class Run:
    """A finished run: where its files are, what it gave, and its report."""

    folder: Path
    result: WeaveResult
    concepts: tuple[Concept, ...]
    report: dict


def run_job(
    job: Job,
    folder: str | os.PathLike,
    *,
    source: str = "job",
    offline: bool = False,
    processes: int | None = None,
    stages: Stages | None = None,
) -> Run:
    """Run all five stages of a job and write pictures, manifest and report into `folder`.

    Parameters
    ----------
    source : what to call the job in errors, usually its file
    offline : take models from the local cache only
    processes : how many concepts train at once; None decides by model and machine. More than one starts fresh Python
        processes, so a script that asks for it needs the usual `if __name__ == "__main__":`
    stages : shows progress; None shows nothing

    Raises `WeaverError`, one line, before any sampling where that can be known; then nothing is written.
    """
    stages, folder = stages or Stages(bars=False), Path(folder)
    _check_folder(folder)
    inputs = read_inputs(job, source)
    with stages.stage("bank"):
        known = {spec.name: read_concept(spec) for spec in job.everyone if spec.file}
    prompts = resolve_prompts(job, known, source)
    with stages.step("loading the model"):
        device = _named("device", source, choose_device, job.device)
        pipe = _named("model", source, load_model, job.model, device=device, offline=offline)
    with threads_for(pipe):
        return _run(job, folder, pipe, known, prompts, inputs, source, offline, processes, stages)


def _run(job, folder, pipe, known, prompts, inputs, source, offline, processes, stages) -> Run:
    job = resolve_job(job, pipe, prompts)
    check_model(job, known, pipe, source)
    places = place_concepts(job, known, source)

    job, template, places = _template(job, pipe, places, stages, offline, source)
    with stages.stage("bank"):
        known |= train_bank(job, pipe, stages, processes=processes)
    concepts = [known[spec.name] for spec in job.everyone]
    uses = [
        ConceptUse(concept, prompt=spec.prompt, strength=spec.strength, window=spec.window, scale=spec.scale)
        for spec, concept in zip(job.everyone, concepts, strict=True)
    ]
    fusion = job.fusion
    result = weave(
        pipe,
        job.prompt,
        uses[: len(job.concepts)],
        background=uses[-1] if job.background else None,
        negative_prompt=job.negative_prompt,
        template=template,
        places=places,
        dilation=job.masks.dilation,
        overlap=job.masks.overlap,
        source_prompt=job.inversion_prompt,
        seed=job.seed,
        steps=job.steps,
        guidance=fusion.guidance,
        suppression=fusion.suppression,
        sites=replace(
            SITES[fusion.sites], resnet_window=fusion.resnet_window, attention_window=fusion.attention_window
        ),
        size=job.size,
        stages=stages,
    )
    record = picture_record(job, pipe, concepts, result.settings, inputs)
    report = make_report(job, result, stages.seconds)
    write_outputs(folder, job, result, concepts, record, report, inputs, stages.elapsed)
    return Run(folder, result, tuple(concepts), report)


def _named(field: str, source: str, function, *args, **kwargs):
    """Call a function, and tell a `ModelError` with the job's field."""
    try:
        return function(*args, **kwargs)
    except ModelError as error:
        raise JobError(f"{source}: {field}: {error}") from error


def _check_folder(folder: Path) -> None:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise WeaverError(f"out: {there} is a file, not a folder; choose another with --out")
    if not os.access(there, os.W_OK):
        raise WeaverError(f"out: can't write into {there}; choose another folder with --out")


def _template(
    job: Job, pipe, places: Places, stages: Stages, offline: bool, source: str
) -> tuple[Job, Image.Image, Places]:
    """The template, and where everything stands in it; of several, the first that shows all that the prompt names.

    The job that comes back names the seed that was taken.
    """
    spec, maker = job.template, pipe
    if spec.model and not spec.image:
        maker = _named(
            "template.model", source, load_model, spec.model, device=job.device, offline=offline, fuses=False
        )
    best, fewest, failure = None, len(job.concepts) + 1, None
    for extra in range(spec.tries):
        template = template_picture(
            maker,
            spec.image or spec.prompt,
            size=job.size,
            seed=(spec.seed or 0) + extra * _SEED_STRIDE,
            steps=spec.steps,
            guidance=spec.guidance,
            negative_prompt=job.negative_prompt,
            stages=stages,
        )
        try:
            with stages.stage("masks"):
                found = places.find(pipe, template, job.inversion_prompt)
                names = [concept.name for concept in job.concepts]
                final = compose_masks(
                    found.dense(job.size), dilation=job.masks.dilation, overlap=job.masks.overlap, names=names
                )
                unlike = _unlike(job, template, final) if spec.tries > 1 else 0
        except MaskError as error:
            failure = error
            continue
        if unlike < fewest:
            best, fewest = (extra, template, found), unlike
        if unlike == 0:
            break
    if best is None:
        tried = f"; {spec.tries} templates were tried, from seed {spec.seed}" if spec.tries > 1 else ""
        raise MaskError(f"{failure}{tried}") from failure
    extra, template, found = best
    if not spec.image:
        job = replace(job, template=replace(spec, seed=spec.seed + extra * _SEED_STRIDE, tries=1))
    return job, template, found


def _unlike(job: Job, template: Image.Image, masks) -> int:
    """How many regions do not look like their class word to the embedded model's classifier; 0 for other models."""
    if not job.embedded:
        return 0
    from weaver.embedded import CONCEPTS
    from weaver.embedded.identity import classify_animal

    names = [shipped_name(spec) for spec in job.concepts]
    return sum(
        classify_animal(template, mask.numpy()) != CONCEPTS[name].word
        for name, mask in zip(names, masks, strict=False)
        if name is not None and CONCEPTS[name].kind == "animal"
    )
