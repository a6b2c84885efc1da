"""Run a job: everything checked first, then bank and stages, then all results written at once."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from weaver.cache import Cache
from weaver.concepts.bank import drop_checkpoints, train_bank, worker_count
from weaver.concepts.concept import Concept
from weaver.folder import check_folder, clashes
from weaver.fusion.contexts import ConceptUse
from weaver.job import Job, JobError
from weaver.job.inputs import InputFile, read_inputs, training_paths
from weaver.job.prepare import prepare
from weaver.layers import SITES
from weaver.manifest import picture_record
from weaver.memory.plans import MemoryPlan
from weaver.models import threads_for
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
    options = {"offline": offline, "on_unused": on_unused, "graphs": graphs, "manifest": manifest}
    prepared = prepare(job, inputs, source, stages=stages, **options)
    pipe, known, weights = prepared.pipe, prepared.known, prepared.weights
    with threads_for(pipe):
        processes = worker_count(pipe, processes)
        job, template, places = prepared.template(graphs=graphs, offload=memory is not None and memory.offload)
        del prepared  # what found words is no longer needed, and its memory is free for what follows
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
    folders = {field: path for field, path in training_paths(job).items() if path.is_dir()}
    read = {file.field: file.path for file in inputs} | folders
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
