"""Run a job: everything checked first, then bank and stages, then all results written at once."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from weaver.cache import Cache
from weaver.concepts.bank import (
    bind_concepts,
    drop_checkpoints,
    read_concepts,
    resolve_prompts,
    train_bank,
    worker_count,
)
from weaver.concepts.concept import Concept
from weaver.errors import raise_if
from weaver.folder import check_folder, clashes
from weaver.fusion.contexts import ConceptUse
from weaver.graphs import graph_reasons
from weaver.job import SAME_MODEL, Job, JobError
from weaver.job.choose import choose_template
from weaver.job.inputs import InputFile, read_inputs, training_folders
from weaver.job.resolve import check_model, in_field, open_finder, place_concepts, resolve_job
from weaver.layers import SITES
from weaver.manifest import check_inputs, check_weights, picture_record
from weaver.memory.plans import MemoryPlan
from weaver.memory.resting import modules_of, resting
from weaver.models import choose_device, load_model, threads_for, weights_hash
from weaver.outputs import CONCEPTS, make_report, result_files, trained_kept, write_outputs
from weaver.pipeline import WeaveResult, weave
from weaver.places import Places
from weaver.progress import Stages
from weaver.styles import styled

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
    processes: int | None = 1,
    cache: Cache | None = None,
    memory: MemoryPlan | None = None,
    graphs: bool = False,
    on_unused: str = "warn",
    stages: Stages | None = None,
    manifest: Mapping | None = None,
) -> Run:
    """Run all five stages of a job and write pictures, manifest and report into `folder`.

    Parameters
    ----------
    source : the job's file, which no result replaces, or what else to call it in errors
    offline : take models from the local cache only
    processes : how many concepts train at once; None decides by model and machine. More than one, on the CPU only,
        starts fresh Python processes, so a script that asks for it, by None too, needs the usual
        `if __name__ == "__main__":`
    cache : where the template's inversion is looked for, and kept; None keeps nothing
    memory : what is kept off the device to save its memory (`weaver.memory.estimate` tells which plans fit); None keeps
        everything there
    graphs : replay the steps of every stage from CUDA graphs, which take the memory of a step's activations
    on_unused : what to do where a concept's file has parts that fusion does not use: "warn", or "refuse"
    stages : shows progress; None shows nothing
    manifest : of the run that this one repeats, as `read_job` gives it: files and models must be the same

    Raises `WeaverError`, one line, before any sampling where that can be known; then nothing is written. Where it fails
    later, or is stopped, the concepts that were trained are kept, and a warning says where; of one that was not done
    there is a checkpoint beside them, from which the same job in the same folder goes on.
    """
    stages, folder = stages or Stages(bars=False), Path(folder)
    check_folder(folder, result_files(job))
    inputs = read_inputs(job, source)
    _check_kept(job, folder, inputs, source)
    if manifest:
        check_inputs(manifest, inputs, source)
    with stages.stage("bank"):
        read = read_concepts(job, source)
    prompts = resolve_prompts(job, read, source)
    weights: dict[str, str] = {}

    def note(field: str, loaded) -> None:
        weights[field] = weights_hash(loaded)
        if manifest:
            check_weights(manifest, field, weights[field], source)

    def load(field: str, model: str, label: str, **options):
        with stages.step(label):
            options = {"device": in_field("device", source, choose_device, job.device)} | options
            pipe = in_field(field, source, load_model, model, offline=offline, **options)
            note(field, pipe)
        return pipe

    pipe = load("model", job.model, "loading the model")
    raise_if(graph_reasons(pipe.unet, graphs), f"{source}: device")
    with threads_for(pipe):
        processes = worker_count(pipe, processes)
        job = resolve_job(job, pipe, prompts)
        check_model(job, pipe, source)
        known = bind_concepts(job, read, pipe, source, on_unused)
        places, maker = place_concepts(job, known, pipe, source), pipe
        if places.needs_finder:
            with stages.step("loading Grounding DINO and SAM"):
                places = open_finder(job, places, source, offline=offline)
                note("masks.text", places.finder)
        with ExitStack() as away:
            offload, options = memory is not None and memory.offload, {}
            if offload:
                away.enter_context(resting(modules_of(pipe)))
                options = {"device": "cpu", "dtype": pipe.unet.dtype}
            if job.template.model not in (None, SAME_MODEL):
                label = "loading the template's model"
                maker = load("template.model", job.template.model, label, fuses=False, **options)
            if offload:
                away.enter_context(resting(modules_of(maker), torch.device(job.device)))
            with styled(pipe, job.styles, source):  # concepts, which are trained between, are of the model without
                job, template, places = choose_template(job, pipe, maker, places, stages, source, graphs=graphs)
        del maker  # its memory is free for what follows
        with stages.stage("bank"):
            known |= train_bank(
                job,
                pipe,
                stages,
                processes=processes,
                at_once=memory and memory.at_once,
                checkpoints=folder / CONCEPTS,
                source=source,
            )
        concepts = [known[spec.name] for spec in job.everyone]
        with trained_kept(folder, job, concepts):
            with styled(pipe, job.styles, source):
                result = _weave(job, pipe, concepts, template, places, cache, memory, graphs, stages)
            record = picture_record(job, pipe, concepts, result.settings, inputs, weights)
            report = make_report(job, result, stages.seconds)
            write_outputs(folder, job, result, concepts, record, report, inputs, stages.elapsed)
        drop_checkpoints(job, folder / CONCEPTS)
    return Run(folder, result, tuple(concepts), report)


def _check_kept(job: Job, folder: Path, inputs: Sequence[InputFile], source: str) -> None:
    """Raise `JobError` where results would change what the job was made from, its own file among it."""
    read = {file.field: file.path for file in inputs} | training_folders(job)
    read |= {"the job file": Path(source)} if Path(source).is_file() else {}
    if reasons := clashes(folder, result_files(job), read):
        raise JobError(f"{source}: " + "; ".join(reasons))


def _weave(
    job: Job,
    pipe,
    concepts: Sequence[Concept],
    template,
    places: Places,
    cache: Cache | None,
    memory: MemoryPlan | None,
    graphs: bool,
    stages: Stages,
) -> WeaveResult:
    """Inversion and fusion as the job, with its defaults resolved, has them."""
    uses = [
        ConceptUse(
            concept,
            prompt=spec.prompt,
            strength=spec.strength,
            window=spec.window,
            scale=spec.scale,
            negative_prompt=spec.negative_prompt,
            parts=spec.parts,
        )
        for spec, concept in zip(job.everyone, concepts, strict=True)
    ]
    fusion = job.fusion
    return weave(
        pipe,
        job.prompt,
        uses[: len(job.concepts)],
        background=uses[-1] if job.background else None,
        negative_prompt=job.negative_prompt,
        template=template,
        places=places,
        downsampling=job.masks.downsampling,
        keep_background=job.keep_background,
        **job.masks.shaping,
        source_prompt=job.inversion_prompt,
        seed=job.seed,
        steps=job.steps,
        guidance=fusion.guidance,
        suppression=fusion.suppression,
        eta=fusion.eta,
        sites=replace(
            SITES[fusion.sites], resnet_window=fusion.resnet_window, attention_window=fusion.attention_window
        ),
        features=fusion.features,
        size=job.size,
        cache=cache,
        memory=memory,
        graphs=graphs,
        stages=stages,
    )
