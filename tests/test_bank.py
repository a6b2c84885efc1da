"""Training several concepts at once gives what training them one by one gives."""

from __future__ import annotations

import multiprocessing
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import make_pipeline
from PIL import Image

from weaver import apart
from weaver.concepts import bank
from weaver.concepts.bank import drop_checkpoints, resolve_prompts, train_bank, training_settings, worker_count
from weaver.concepts.settings import TrainSettings
from weaver.concepts.train import train_concept
from weaver.embedded import load_pipeline
from weaver.errors import WeaverError
from weaver.job import JobError
from weaver.job.parse import job_from_mapping
from weaver.job.resolve import resolve_job
from weaver.models import load_model
from weaver.progress import Stages


@pytest.fixture(scope="module")
def job(tmp_path_factory, served):
    folder = tmp_path_factory.mktemp("bank")
    make_pipeline(dtype=torch.float32).save_pretrained(folder / "model")
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "one.png")
    train = {"images": "one.png", "steps": 2, "prior_images": 2, "prior_steps": 1, "learning_rate": 1e-3}
    concepts = [
        {"word": "cat", "train": train | {"token": "<v1>"}},
        {"word": "dog", "train": train | {"token": "<v2>", "seed": 5}},
    ]
    mapping = {"model": "model", "prompt": "a cat and a dog", "concepts": concepts}
    return job_from_mapping(mapping, folder=folder)


class Watched(Stages):
    """Stages that remember how far each bar came."""

    def __init__(self):
        super().__init__(bars=False)
        self.moves: dict[str, list] = {}

    def bar(self, label, total=None, **options):
        return nullcontext(lambda done, whole: self.moves.setdefault(label, []).append((done, whole)))


@pytest.mark.parametrize("how", ["as-commands", "as-scripts"])
def test_training_at_once_and_one_by_one_agree(job, monkeypatch, how):
    if how == "as-scripts":
        monkeypatch.setattr(apart, "_expected", False)  # processes that import for themselves
    pipe = load_model(job.model, device="cpu")
    stages = Watched()
    alone = train_bank(job, pipe, stages, processes=1)
    together = train_bank(job, pipe, Watched(), processes=2)
    assert list(alone) == list(together) == ["cat", "dog"]
    assert stages.moves["training cat"][-1][0] == stages.moves["training cat"][-1][1]
    for name, concept in alone.items():
        other = together[name]
        assert concept.settings == other.settings and concept.token == other.token
        assert all(torch.equal(delta, other.deltas[path]) for path, delta in concept.deltas.items())
        assert any(delta.any() for delta in concept.deltas.values())


@pytest.mark.parametrize(
    ("steps", "processes", "cores", "waiting"),
    [
        ((2, 3, 2), 3, 2, [True, False, True]),
        ((2, 2, 2), 3, 2, [False] * 3),
        ((2, 3, 2), 2, 1, [False] * 3),  # not all begin at once
        ((2, 3, 2), 3, 3, [False] * 3),  # none has to wait
    ],
)
def test_shorter_trainings_leave_the_processor_to_the_longest(job, monkeypatch, steps, processes, cores, waiting):
    cat, dog = job.concepts
    specs = [
        replace(spec, train=replace(spec.train, settings={**dict(spec.train.settings), "steps": count}))
        for spec, count in zip((cat, dog, replace(cat, name="tom")), steps, strict=True)
    ]
    pipe, told, nice = load_model(job.model, device="cpu"), [], []

    def call_here(function, arguments, moves, processes):
        told.extend(waits for _, waits in arguments)
        return [function(*values, move) for values, move in zip(arguments, moves, strict=True)]

    monkeypatch.setattr(bank, "cores", lambda: cores)
    monkeypatch.setattr(bank, "call_apart", call_here)
    monkeypatch.setattr(bank.os, "nice", nice.append, raising=False)
    monkeypatch.setattr(bank, "load_model", lambda *_, **__: pipe)
    monkeypatch.setattr(bank, "_train", lambda task, *_: task.spec.name)
    found = train_bank(replace(job, concepts=tuple(specs)), pipe, Watched(), processes=processes)
    assert list(found.values()) == ["cat", "dog", "tom"]
    assert told == waiting and len(nice) == sum(waiting) and all(value > 0 for value in nice)


def test_an_interrupt_ends_every_training_and_leaves_nothing(job, tmp_path, monkeypatch):
    """Whatever ends the process that waits, a signal too, is an exception in it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    class Interrupt(BaseException):
        pass

    class Interrupted(Watched):
        def bar(self, label, total=None, **options):
            def move(done, whole):
                raise Interrupt(len(multiprocessing.active_children()))

            return nullcontext(move)

    long = [
        replace(spec, train=replace(spec.train, settings=(*spec.train.settings, ("steps", 10**6))))
        for spec in job.concepts
    ]
    with pytest.raises(Interrupt, match="2"):
        pipe = load_model(job.model, device="cpu")
        train_bank(replace(job, concepts=tuple(long)), pipe, Interrupted(), processes=2)
    assert multiprocessing.active_children() == [] and list(tmp_path.iterdir()) == []


def test_an_interrupted_training_goes_on_from_its_checkpoint(job, tmp_path, monkeypatch):
    class Interrupted(Watched):
        def bar(self, label, total=None, **options):
            def move(done, whole):
                if done == 5:  # two class pictures and three steps
                    raise KeyboardInterrupt

            return nullcontext(move)

    monkeypatch.setattr(bank, "train_concept", partial(train_concept, checkpoint_every=1))
    cat, pipe = job.concepts[0], load_model(job.model, device="cpu")
    longer = tuple((dict(cat.train.settings) | {"steps": 4}).items())
    alone = replace(job, concepts=(replace(cat, train=replace(cat.train, settings=longer)),))
    with pytest.raises(KeyboardInterrupt):
        train_bank(alone, pipe, Interrupted(), checkpoints=tmp_path)
    assert (tmp_path / "cat.checkpoint").is_file()
    found = train_bank(alone, pipe, stages := Watched(), checkpoints=tmp_path)["cat"]
    assert stages.moves["training cat"][-1] == (6, 6) and (5, 6) not in stages.moves["training cat"]
    whole = train_bank(alone, pipe, Watched())["cat"]
    assert all(torch.equal(delta, found.deltas[path]) for path, delta in whole.deltas.items())
    drop_checkpoints(alone, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("processes", [1, 2])
def test_a_training_that_fails_names_its_concept_and_leaves_nothing(job, tmp_path, monkeypatch, processes):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cat, dog = job.concepts
    settings = dict(dog.train.settings)
    long = replace(cat, train=replace(cat.train, settings=tuple((settings | {"steps": 10**6}).items())))
    wild = replace(dog, train=replace(dog.train, settings=tuple((settings | {"learning_rate": 1e30}).items())))
    concepts = (wild, long) if processes == 1 else (long, wild)
    place = f"concepts[{concepts.index(wild)}].train"
    with pytest.raises(JobError) as caught:
        failing = replace(job, concepts=concepts)
        train_bank(failing, load_model(job.model, device="cpu"), Watched(), processes=processes, source="my.yaml")
    assert str(caught.value).startswith(f"my.yaml: {place}: training diverged at step 2 of 2")
    assert multiprocessing.active_children() == [] and list(tmp_path.iterdir()) == []


def test_several_processes_are_for_the_cpu(job):
    elsewhere = make_pipeline().to("meta")
    assert worker_count(elsewhere) == 1
    with pytest.raises(WeaverError, match="processes: is 2; on meta concepts train one by one"):
        train_bank(job, elsewhere, Watched(), processes=2)


@pytest.mark.parametrize(("token", "there"), [("sks", "sksy"), ("v1", "v10")])
def test_a_token_is_a_whole_word(job, token, there):
    cat, dog = job.concepts
    cat = replace(cat, train=replace(cat.train, token=token))
    with pytest.raises(JobError, match="concepts.0..prompt: 'a .* cat' lacks the concept's token"):
        resolve_prompts(replace(job, concepts=(replace(cat, prompt=f"a {there} cat"), dog)), {})
    others = replace(job, concepts=(cat, replace(dog, prompt=f"a <v2> dog, {there}")), prompt=f"a cat, a dog, {there}")
    assert resolve_prompts(others, {})[1] == f"a <v2> dog, {there}"


def test_training_settings_start_from_the_models_own(job):
    cat, dog = job.concepts
    assert training_settings(cat.train, make_pipeline()) == TrainSettings(
        steps=2, prior_images=2, prior_steps=1, learning_rate=1e-3
    )
    embedded = load_pipeline()
    assert training_settings(dog.train, embedded).batch == TrainSettings.embedded().batch
    assert training_settings(dog.train, embedded).seed == 5


def test_the_embedded_model_has_scenes_of_its_world_whatever_defaults_are_written_out(tmp_path):
    """A job whose defaults are resolved names how many class pictures a model would make, which this one does not."""
    train = {"images": "embedded:pug", "token": "<pug>", "steps": 1, "woven_batch": 0, "batch": 1}
    mapping = {"prompt": "a dog", "concepts": [{"word": "dog", "train": train}]}
    job = job_from_mapping(mapping, folder=tmp_path)
    pipe = load_pipeline()
    job = resolve_job(job, pipe, ["a <pug> dog"])
    assert dict(job.concepts[0].train.settings)["prior_images"] == 48
    (concept,) = train_bank(job, pipe, Stages(bars=False)).values()
    assert concept.settings["prior"] == "given"
