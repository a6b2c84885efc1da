"""Run a job: everything checked first, then bank and stages, then all results written at once."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

from weaver.bank import read_concept, resolve_prompts, train_bank
from weaver.concepts.concept import Concept
from weaver.defaults import default_dilation, defaults_for
from weaver.errors import WeaverError
from weaver.fusion.contexts import ConceptUse
from weaver.inputs import read_inputs
from weaver.job import Job, JobError
from weaver.layers import SITES
from weaver.manifest import picture_record
from weaver.masks import MaskError, compose_masks
from weaver.models import load_model
from weaver.outputs import make_report, write_outputs
from weaver.pictures import open_picture
from weaver.pipeline import WeaveResult, model_size, setting_reasons, template_picture, weave
from weaver.places import Places, best_source
from weaver.progress import Stages

__all__ = ["Run", "run_job"]


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
    start, stages, folder = time.perf_counter(), stages or Stages(bars=False), Path(folder)
    _check_folder(folder)
    inputs = read_inputs(job, source)
    known = {spec.name: read_concept(spec) for spec in job.everyone if spec.file}
    prompts = resolve_prompts(job, known, source)
    pipe = load_model(job.model, device=job.device, offline=offline)
    size = job.size or model_size(pipe)
    places = _places(job, known, pipe, size, source)
    _check_model(job, known, pipe, size, source)

    template, places, template_seed = _template(job, pipe, places, size, stages, offline)
    with stages.stage("bank"):
        known |= train_bank(job, pipe, stages, processes=processes)
    concepts = [known[spec.name] for spec in job.everyone]
    uses = [
        ConceptUse(concept, prompt=prompt, strength=spec.strength, window=spec.window, scale=spec.scale)
        for spec, concept, prompt in zip(job.everyone, concepts, prompts, strict=True)
    ]
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
        guidance=job.fusion.guidance,
        suppression=job.fusion.suppression,
        sites=_sites(job, pipe),
        size=size,
        stages=stages,
    )
    record = picture_record(job, pipe, concepts, prompts, template_seed, result.settings, inputs)
    report = make_report(job, result, stages.seconds)
    write_outputs(folder, job, result, concepts, record, report, inputs, lambda: time.perf_counter() - start)
    return Run(folder, result, tuple(concepts), report)


def _check_folder(folder: Path) -> None:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise WeaverError(f"out: {there} is a file, not a folder; choose another with --out")
    if not os.access(there, os.W_OK):
        raise WeaverError(f"out: can't write into {there}; choose another folder with --out")


def _places(job: Job, known: dict[str, Concept], pipe, size: tuple[int, int], source: str) -> Places:
    specs = [spec.mask for spec in job.concepts]
    words = [spec.word or known[spec.name].word for spec in job.concepts]
    labels = [f"concepts[{i}].mask" for i in range(len(specs))]
    own_size = None
    if job.template.image:
        image = open_picture(job.template.image)
        own_size = (image.height, image.width)
    try:
        finder = job.masks.source or best_source(pipe)
        return Places.build(specs, words, labels, source=finder, size=size, source_size=own_size)
    except WeaverError as error:
        raise JobError(f"{source}: {error}") from error


def _check_model(job: Job, known: dict[str, Concept], pipe, size: tuple[int, int], source: str) -> None:
    """What only the loaded model can tell: sizes, steps, and whether the concepts are its own."""
    problems = setting_reasons(pipe, size, job.steps)
    places = [f"concepts[{i}].file" for i in range(len(job.concepts))] + ["background.file"]
    for spec, place in zip(job.everyone, places, strict=False):
        if spec.name in known:
            try:
                known[spec.name].check_base(pipe)
            except WeaverError as error:
                problems.append(f"{place}: {error}")
    if problems:
        raise JobError(f"{source}: " + "; ".join(problems))


def _template(job: Job, pipe, places: Places, size, stages: Stages, offline: bool):
    """The template, where everything stands in it, and its seed; the next seed where a word is not to be found."""
    spec = job.template
    prompt = job.prompt if job.inversion_prompt is None else job.inversion_prompt
    maker = pipe
    if spec.model and not spec.image:
        maker = load_model(spec.model, device=job.device, offline=offline, fuses=False)
    first = job.seed if spec.seed is None else spec.seed
    for seed in range(first, first + spec.tries):
        template = template_picture(
            maker,
            spec.image or spec.prompt or job.prompt,
            size=size,
            seed=seed,
            steps=spec.steps,
            guidance=spec.guidance,
            negative_prompt=job.negative_prompt,
            stages=stages,
        )
        try:
            with stages.stage("masks"):
                found = places.find(pipe, template, prompt)
                compose_masks(
                    found.dense(size),
                    dilation=default_dilation(size) if job.masks.dilation is None else job.masks.dilation,
                    overlap=job.masks.overlap,
                    names=[spec.name for spec in job.concepts],
                )
            return template, found, seed
        except MaskError as error:
            failure = error
    tried = f"; {spec.tries} templates were tried, from seed {first}" if spec.tries > 1 else ""
    raise MaskError(f"{failure}{tried}") from failure


def _sites(job: Job, pipe):
    """The table of injection sites that the job names, or the model's, with the job's windows."""
    wishes = job.fusion
    sites = SITES[wishes.sites] if wishes.sites else defaults_for(pipe).sites
    windows = {"resnet_window": wishes.resnet_window, "attention_window": wishes.attention_window}
    return replace(sites, **{name: value for name, value in windows.items() if value is not None})
