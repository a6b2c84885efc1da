"""The concept bank of a job: concept files are read, the others are trained, several at once where that pays."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch

from weaver.concepts.concept import Concept
from weaver.concepts.images import load_images
from weaver.concepts.own_prompts import own_prompts
from weaver.concepts.settings import TrainSettings
from weaver.concepts.train import train_concept
from weaver.errors import WeaverError
from weaver.fields import EMBEDDED
from weaver.inputs import training_pictures
from weaver.job import BackgroundSpec, Job, JobError, TrainSpec
from weaver.models import load_model, quiet_libraries
from weaver.progress import Stages

__all__ = ["read_concept", "resolve_prompts", "train_bank", "training_settings"]

_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class _Task:
    """One concept to train, in terms that travel to another process."""

    spec: BackgroundSpec
    model: str


def read_concept(spec: BackgroundSpec) -> Concept:
    """The concept of a spec that names a file, under the name and class word the spec gives it."""
    path = spec.file
    if isinstance(path, str):
        from weaver import embedded

        path = embedded.concept_path(path.removeprefix(EMBEDDED))
    concept = Concept.load(path)
    return replace(concept, name=spec.name, word=spec.word or concept.word)


def resolve_prompts(job: Job, known: dict[str, Concept], source: str = "job") -> list[str]:
    """The prompt p_+i of every concept of `Job.everyone`, written or derived (Concept Weaver, section 3.5).

    `known` are the concepts read from files, by name. Raises `JobError` where a token or class word is missing, or
    another concept's token stands in a prompt.
    """
    people = [
        known.get(spec.name) or SimpleNamespace(name=spec.name, token=spec.train.token, word=spec.word)
        for spec in job.everyone
    ]
    derived = own_prompts(job.prompt, people[: len(job.concepts)], people[-1] if job.background else None)
    prompts, problems = [], []
    for (place, spec), concept, own in zip(job.places(), people, derived, strict=True):
        prompt = spec.prompt or own
        if isinstance(prompt, WeaverError):
            problems.append(f"{place}: {prompt}")
            continue
        prompts.append(prompt)
        if concept.token not in prompt:
            fix = f"put it before {concept.word!r}"
            problems.append(f"{place}.prompt: {prompt!r} lacks the concept's token {concept.token!r}; {fix}")
        tokens = {other.token for other in people} - {concept.token}
        if strange := sorted(token for token in tokens if token in prompt):
            problems.append(f"{place}.prompt: holds another concept's token {strange[0]!r}; each names its own only")
    if problems:
        raise JobError(f"{source}: " + "; ".join(problems))
    return prompts


def train_bank(job: Job, pipe, stages: Stages, *, processes: int | None = None) -> dict[str, Concept]:
    """Train every concept of a job that is to be trained; name -> concept.

    Parameters
    ----------
    pipe : the base model, for training in this process; it is left as it was
    processes : how many train at once. None is one a core for the embedded model on the CPU, and one otherwise: other
        models would need their memory several times.
    """
    tasks = [_Task(spec, job.model) for spec in job.everyone if spec.train]
    if processes is None:
        processes = _cores() if job.embedded and pipe.device.type == "cpu" else 1
    with ExitStack() as open_bars:
        moves = [open_bars.enter_context(stages.bar(f"training {task.spec.name}")) for task in tasks]
        if min(processes, len(tasks)) > 1:
            trained = _train_apart(tasks, moves, min(processes, len(tasks)))
        else:
            trained = [_train(task, pipe, move) for task, move in zip(tasks, moves, strict=True)]
    return {task.spec.name: concept for task, concept in zip(tasks, trained, strict=True)}


def training_settings(wishes: TrainSpec, model: str) -> TrainSettings:
    """The model's own training defaults with a job's wishes applied."""
    defaults = TrainSettings.embedded() if model == "embedded" else TrainSettings()
    return replace(defaults, **dict(wishes.settings))


def _train(task: _Task, pipe, move: Callable[[int, int], None]) -> Concept:
    spec, wishes = task.spec, task.spec.train
    prior = None
    if task.model == "embedded":
        from weaver.embedded.prior import prior_scenes

        prior = prior_scenes()
    return train_concept(
        pipe,
        load_images(training_pictures(spec), wishes.token, spec.word, template=wishes.caption),
        name=spec.name,
        token=wishes.token,
        word=spec.word,
        prior=prior,
        settings=training_settings(wishes, task.model),
        progress=move,
    )


def _train_apart(tasks: Sequence[_Task], moves: Sequence[Callable], processes: int) -> list[Concept]:
    """Train in fresh processes of one thread each; their progress comes back by a queue."""
    context = multiprocessing.get_context("spawn")
    news = context.Queue()
    with (
        tempfile.TemporaryDirectory(prefix="weaver-bank-") as folder,
        ProcessPoolExecutor(processes, context, _begin_worker, (news,)) as pool,
    ):
        paths = [Path(folder) / f"{number}.safetensors" for number in range(len(tasks))]
        futures = [pool.submit(_work, number, task, paths[number]) for number, task in enumerate(tasks)]
        try:
            while any(not future.done() for future in futures):
                _pass_on(news, moves)
                for future in futures:
                    if future.done():
                        future.result()  # raises what went wrong there
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        for future in futures:
            future.result()
        return [Concept.load(path) for path in paths]


def _pass_on(news, moves: Sequence[Callable]) -> None:
    try:
        number, done, total = news.get(timeout=_POLL_SECONDS)
    except queue.Empty:
        return
    moves[number](done, total)


_news = None  # of a worker process: the queue to the process that waits


def _begin_worker(news) -> None:
    global _news
    _news = news
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a worker without a traceback; the parent tells
    torch.set_num_threads(1)
    quiet_libraries()


def _work(number: int, task: _Task, path: Path) -> None:
    pipe = load_model(task.model, device="cpu", offline=True)
    _train(task, pipe, lambda done, total: _news.put((number, done, total))).save(path)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
