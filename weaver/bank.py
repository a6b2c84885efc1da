"""The concept bank of a job: concept files are read, the others are trained, several at once where that pays."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch

from weaver.concepts.concept import Concept
from weaver.concepts.images import load_images
from weaver.concepts.own_prompts import own_prompts, token_reasons
from weaver.concepts.prompts import names_token
from weaver.concepts.settings import TrainSettings
from weaver.concepts.train import train_concept
from weaver.errors import WeaverError
from weaver.fields import EMBEDDED
from weaver.inputs import training_pictures
from weaver.job import BackgroundSpec, Job, JobError, TrainSpec
from weaver.models import load_model, quiet_libraries
from weaver.progress import Stages

__all__ = ["read_concept", "resolve_prompts", "train_bank", "training_settings", "worker_count"]

_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class _Task:
    """One concept to train, in terms that travel to another process; `place` is its field of the job."""

    place: str
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
    a token stands in the prompt of
    another concept or of the base model.
    """
    people = [
        known.get(spec.name) or SimpleNamespace(name=spec.name, token=spec.train.token, word=spec.word)
        for spec in job.everyone
    ]
    derived = own_prompts(job.prompt, people[: len(job.concepts)], people[-1] if job.background else None)
    texts = {"prompt": job.prompt, "negative_prompt": job.negative_prompt}
    texts |= {"inversion.prompt": job.inversion_prompt, "template.prompt": job.template.prompt}
    prompts, problems = [], token_reasons(texts, people)
    for (place, spec), concept, own in zip(job.places(), people, derived, strict=True):
        prompt = spec.prompt or own
        if isinstance(prompt, WeaverError):
            problems.append(f"{place}: {prompt}")
            continue
        prompts.append(prompt)
        if not names_token(prompt, concept.token):
            fix = f"put it before {concept.word!r}"
            problems.append(f"{place}.prompt: {prompt!r} lacks the concept's token {concept.token!r}; {fix}")
        tokens = {other.token for other in people} - {concept.token}
        if strange := sorted(token for token in tokens if names_token(prompt, token)):
            problems.append(f"{place}.prompt: holds another concept's token {strange[0]!r}; each names its own only")
    if problems:
        raise JobError(f"{source}: " + "; ".join(problems))
    return prompts


def worker_count(job: Job, pipe, processes: int | None = None) -> int:
    """How many concepts train at once, where `processes` is the wish for it, None for none.

    That is one a core for the embedded model on the CPU, and one otherwise: other models would need their memory
    several times. Raises `WeaverError` for more than one on a GPU.
    """
    if processes is None:
        return _cores() if job.embedded and pipe.device.type == "cpu" else 1
    if processes > 1 and pipe.device.type != "cpu":
        raise WeaverError(f"processes: is {processes}; on {pipe.device.type} concepts train one by one, give 1 or none")
    return processes


def train_bank(
    job: Job, pipe, stages: Stages, *, processes: int | None = None, source: str = "job"
) -> dict[str, Concept]:
    """Train every concept of a job that is to be trained; name -> concept.

    Parameters
    ----------
    pipe : the base model, for training in this process; it is left as it was
    processes : how many train at once, see `worker_count`

    Raises `JobError`, led by `source` and the concept's field, when a training fails; all others end with it.
    """
    tasks = [_Task(place, spec, job.model) for place, spec in job.places() if spec.train]
    processes = min(worker_count(job, pipe, processes), len(tasks))
    with ExitStack() as open_bars:
        moves = [open_bars.enter_context(stages.bar(f"training {task.spec.name}")) for task in tasks]
        if processes > 1:
            trained = _train_apart(tasks, moves, processes, source)
        else:
            trained = []
            for task, move in zip(tasks, moves, strict=True):
                with _told(task, source):
                    trained.append(_train(task, pipe, move))
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


@contextmanager
def _told(task: _Task, source: str) -> Iterator[None]:
    """Say which concept an error of its training belongs to."""
    try:
        yield
    except WeaverError as error:
        raise JobError(f"{source}: {task.place}.train: {error}") from error


def _train_apart(tasks: Sequence[_Task], moves: Sequence[Callable], processes: int, source: str) -> list[Concept]:
    """Train in fresh processes of one thread each; their progress comes back by a queue.

    When one fails, or this process is interrupted, the others are ended before anything else happens.
    """
    context = multiprocessing.get_context("spawn")
    news, others = context.Queue(), set(multiprocessing.active_children())
    with (
        tempfile.TemporaryDirectory(prefix="weaver-bank-") as folder,
        ProcessPoolExecutor(processes, context, _begin_worker, (news,)) as pool,
    ):
        paths = [Path(folder) / f"{number}.safetensors" for number in range(len(tasks))]
        futures = [pool.submit(_work, number, task, paths[number]) for number, task in enumerate(tasks)]
        try:
            waiting = dict(zip(futures, tasks, strict=True))
            while waiting:
                _pass_on(news, moves)
                for future in [future for future in waiting if future.done()]:
                    with _told(waiting.pop(future), source):
                        future.result()  # raises what went wrong there
        except BaseException:
            for worker in set(multiprocessing.active_children()) - others:
                worker.terminate()
            raise  # the pool is left, and with that waited for, before the folder goes
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
