"""The concept bank of a job: concept files are read, the others are trained, several at once where that pays."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

from weaver.apart import call_apart, cores
from weaver.concepts.checkpoints import Checkpoint
from weaver.concepts.concept import Concept
from weaver.concepts.formats.reading import ConceptReading
from weaver.concepts.formats.unused import tell_unused
from weaver.concepts.images import TrainingSet, load_images
from weaver.concepts.own_prompts import own_prompt_reasons, own_prompts, token_reasons
from weaver.concepts.settings import TrainSettings
from weaver.concepts.train import train_concept
from weaver.concepts.woven import WovenSet
from weaver.errors import WeaverError, raise_if
from weaver.fusion.contexts import ConceptUse
from weaver.fusion.regional import regional_reasons
from weaver.job import BackgroundSpec, Job, JobError, TrainSpec
from weaver.job.fields import EMBEDDED
from weaver.job.inputs import training_pictures
from weaver.models import is_embedded, load_model, quiet_libraries
from weaver.progress import Stages

__all__ = [
    "bind_concepts",
    "drop_checkpoints",
    "prior_and_scenes",
    "read_concept",
    "read_concepts",
    "resolve_prompts",
    "train_bank",
    "training_settings",
    "worker_count",
]


_NICE = 5  # a third of the time that a process of 0 gets beside it


@dataclass(frozen=True)
class _Task:
    """One concept to train, in terms that travel to another process; `place` is its field of the job `source`."""

    source: str
    place: str
    spec: BackgroundSpec
    model: str
    at_once: int | None
    checkpoint: Path | None


def read_concept(spec: BackgroundSpec) -> ConceptReading:
    """Open the file that a spec names, under the name, class word and token that the spec gives it."""
    path = spec.file
    if isinstance(path, str):
        from weaver import embedded

        path = embedded.concept_path(path.removeprefix(EMBEDDED))
    return ConceptReading.of(path, name=spec.name, word=spec.word, token=spec.token)


def read_concepts(job: Job, source: str) -> dict[str, ConceptReading]:
    """The concepts of a job's files by name. Raises `JobError` with every field whose file can't be used."""
    found, problems = {}, []
    for place, spec in job.places():
        if spec.file:
            try:
                found[spec.name] = read_concept(spec)
            except WeaverError as error:
                problems.append(f"{place}.file: {error}")
    if problems:
        raise JobError(f"{source}: " + "; ".join(problems))
    return found


def bind_concepts(
    job: Job, read: Mapping[str, ConceptReading], pipe, source: str, on_unused: str = "warn"
) -> dict[str, Concept]:
    """The concepts of a job's files on the base model of `pipe`, by name; what of them is not used is told.

    Raises `JobError` with every field whose file does not fit the model, or is to be refused (`on_unused`).
    """
    concepts, problems = {}, []
    for place, spec in job.places():
        if spec.name in read:
            try:
                concepts[spec.name] = read[spec.name].concept(pipe)
                used = ConceptUse(concepts[spec.name], parts=spec.parts)
                raise_if(regional_reasons(pipe.unet, [used]), "this model can't draw it")
                tell_unused(concepts[spec.name], on_unused, f"{place}.file")
            except WeaverError as error:
                problems.append(str(error) if str(error).startswith(f"{place}.file") else f"{place}.file: {error}")
    if problems:
        raise JobError(f"{source}: " + "; ".join(problems))
    return concepts


def resolve_prompts(job: Job, known: Mapping[str, Concept | ConceptReading], source: str = "job") -> list[str]:
    """The prompt p_+i of every concept of `Job.everyone`, written or derived (Concept Weaver, section 3.5).

    `known` are the concepts read from files, by name. Raises `JobError` where a token or class word is missing, or
    a token stands in the prompt of another concept or of the base model.
    """
    people = [known.get(spec.name) or _named(spec) for spec in job.everyone]
    derived = own_prompts(job.prompt, people[: len(job.concepts)], people[-1] if job.background else None)
    texts = {"prompt": job.prompt, "negative_prompt": job.negative_prompt}
    texts |= {"inversion.prompt": job.inversion_prompt, "template.prompt": job.template.prompt}
    texts |= {f"{place}.negative_prompt": spec.negative_prompt for place, spec in job.places()}
    prompts, problems = [], token_reasons(texts, people)
    for (place, spec), concept, own in zip(job.places(), people, derived, strict=True):
        prompt = spec.prompt or own
        if isinstance(prompt, WeaverError):
            problems.append(f"{place}: {prompt}")
            continue
        prompts.append(prompt)
        problems += [f"{place}.prompt: {reason}" for reason in own_prompt_reasons(prompt, concept, people)]
    if problems:
        raise JobError(f"{source}: " + "; ".join(problems))
    return prompts


def _named(spec: BackgroundSpec) -> SimpleNamespace:
    """What prompts need of a concept that is not trained yet."""
    token = spec.train.token
    return SimpleNamespace(name=spec.name, token=token, modifier=token, word=spec.word)


def worker_count(pipe, processes: int | None = None, device: str | None = None) -> int:
    """How many concepts train at once, where `processes` is the wish for it, None for none.

    That is two a core for the embedded model on the CPU, so that none idles while the last of an odd number trains, and
    one otherwise: other models would need their memory several times. `device` is the kind of device that the model
    will be on; None is where it is. Raises `WeaverError` for more than one on a GPU.
    """
    device = device or pipe.device.type
    if processes is None:
        return 2 * cores() if is_embedded(pipe) and device == "cpu" else 1
    if processes > 1 and device != "cpu":
        raise WeaverError(f"processes: is {processes}; on {device} concepts train one by one, give 1 or none")
    return processes


def train_bank(
    job: Job,
    pipe,
    stages: Stages,
    *,
    processes: int | None = None,
    at_once: int | None = None,
    checkpoints: Path | None = None,
    source: str = "job",
) -> dict[str, Concept]:
    """Train every concept of a job that is to be trained; name -> concept.

    Parameters
    ----------
    pipe : the base model, for training in this process; it is left as it was
    processes : how many train at once, see `worker_count`
    at_once : how many pictures are made or encoded in one pass; None is `train_concept`'s own
    checkpoints : a folder of a file for each, `NAME.checkpoint`, from which an interrupted training goes on; they stay
        until `drop_checkpoints`. None writes none

    Raises `JobError`, led by `source` and the concept's field, when a training fails; all others end with it.
    """
    tasks = [
        _Task(source, place, spec, job.model, at_once, checkpoints and _checkpoint(checkpoints, spec))
        for place, spec in job.places()
        if spec.train
    ]
    processes = min(worker_count(pipe, processes), len(tasks))
    with ExitStack() as open_bars:
        moves = [open_bars.enter_context(stages.bar(f"training {task.spec.name}", left=True)) for task in tasks]
        if processes > 1:
            works = [_work(training_settings(task.spec.train, pipe)) for task in tasks]
            # Where all begin at once and cores are few, the longest goes first, or it is left over on one core.
            waits = [len(tasks) == processes > cores() and work < max(works) for work in works]
            files = call_apart(_train_apart, list(zip(tasks, waits, strict=True)), moves, processes)
            trained = [torch.load(io.BytesIO(file), weights_only=False) for file in files]
        else:
            trained = [_train(task, pipe, move) for task, move in zip(tasks, moves, strict=True)]
    return {task.spec.name: concept for task, concept in zip(tasks, trained, strict=True)}


def drop_checkpoints(job: Job, checkpoints: Path) -> None:
    """Throw away what `train_bank` left in a folder: the concepts are saved."""
    for spec in job.everyone:
        if spec.train:
            Checkpoint.remove(_checkpoint(checkpoints, spec))


def _checkpoint(folder: Path, spec: BackgroundSpec) -> Path:
    return folder / f"{spec.name}.checkpoint"


def training_settings(wishes: TrainSpec, pipe) -> TrainSettings:
    """The model's own training defaults with a job's wishes applied."""
    asked = dict(wishes.settings)
    return TrainSettings.embedded(**asked) if is_embedded(pipe) else TrainSettings(**asked)


def prior_and_scenes(
    pipe, pictures: TrainingSet, token: str, word: str, settings: TrainSettings
) -> tuple[TrainingSet | None, WovenSet | None]:
    """What else a concept of the embedded model is learned from: its world's scenes; nothing for other models."""
    if not is_embedded(pipe):
        return None, None
    from weaver.embedded.prior import prior_scenes
    from weaver.embedded.woven import woven_scenes

    return prior_scenes(), woven_scenes(pictures, token, word) if settings.woven_batch else None


def _train(task: _Task, pipe, move: Callable[[int, int], None]) -> Concept:
    spec, wishes = task.spec, task.spec.train
    settings = training_settings(wishes, pipe)
    try:
        pictures = load_images(training_pictures(spec), wishes.token, spec.word, template=wishes.caption)
        prior, woven = prior_and_scenes(pipe, pictures, wishes.token, spec.word, settings)
        return train_concept(
            pipe,
            pictures,
            name=spec.name,
            token=wishes.token,
            word=spec.word,
            prior=prior,
            woven=woven,
            settings=settings,
            checkpoint=task.checkpoint,
            keep_checkpoint=True,
            at_once=task.at_once,
            progress=move,
        )
    except WeaverError as error:
        raise JobError(f"{task.source}: {task.place}.train: {error}") from error


def _work(settings: TrainSettings) -> int:
    """How many rows go through the U-Net while it trains: about how long that takes."""
    rows = settings.batch + settings.woven_batch + settings.prior_batch
    return settings.steps * settings.accumulate * rows


def _train_apart(task: _Task, waits: bool, move: Callable[[int, int], None]) -> bytes:
    """Train in a process of its own, on one thread; the concept as `torch.save` writes it.

    `waits` leaves the processor to those that don't, where there are more of both than cores.
    """
    if waits and hasattr(os, "nice"):  # Windows has none
        os.nice(_NICE)
    torch.set_num_threads(1)
    quiet_libraries()
    file = io.BytesIO()
    torch.save(_train(task, load_model(task.model, device="cpu", offline=True), move), file)
    return file.getvalue()
