"""A training that was interrupted ends with the concept of one that was not."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from test_concept_train import FAST, NAMES, PRIOR, equal, pictures

from weaver.concepts.changes import parts_of
from weaver.concepts.concept import attn2_hash
from weaver.concepts.train import train_concept
from weaver.errors import WeaverError

SETTINGS = replace(FAST, steps=7, batch=2, views=2, warmup=3, final_rate=0.1)


class Interrupted(Exception):
    pass


def train(pipe, *, stop: int | None = None, images=None, settings=SETTINGS, **options):
    def progress(done, total):
        if done == stop:
            raise Interrupted

    given = {"prior": PRIOR, "settings": settings, "progress": progress, "checkpoint_every": 3}
    return train_concept(pipe, images or pictures(2), **NAMES | given | options)


@pytest.fixture(scope="module")
def whole(tiny_pipe):
    """What a training in one go learns, once for each settings."""
    return cache(lambda settings: train(tiny_pipe, settings=settings))


@pytest.fixture(scope="module")
def kept(tiny_pipe, tmp_path_factory):
    """The checkpoint of a training that was interrupted at its third step."""
    file = tmp_path_factory.mktemp("kept") / "rex.ckpt"
    with pytest.raises(Interrupted):
        train(tiny_pipe, stop=3, checkpoint=file)
    return file.read_bytes()


@pytest.mark.parametrize(
    ("rank", "optimiser", "accumulate"),
    [(0, "adamw", 1), (2, "adamw", 1), (0, "muon", 1), (0, "adamw", 3)],
    ids=["matrices", "factors", "muon", "accumulated"],
)
@pytest.mark.parametrize("stop", [2, 3, 5])
def test_an_interrupted_training_ends_as_a_whole_one(tiny_pipe, tmp_path, whole, stop, rank, optimiser, accumulate):
    settings, file = (
        replace(SETTINGS, rank=rank, optimiser=optimiser, accumulate=accumulate),
        tmp_path / "deep" / "rex.ckpt",
    )
    with pytest.raises(Interrupted):
        train(tiny_pipe, stop=stop, settings=settings, checkpoint=file)
    assert file.exists() == (stop >= 3) and len(list(tmp_path.rglob("*.part"))) == 0
    seen = []
    again = train_concept(
        tiny_pipe, pictures(2), **NAMES, prior=PRIOR, settings=settings, checkpoint=file,
        progress=lambda done, total: seen.append(done),
    )  # fmt: skip
    assert seen == list(range(4 if stop >= 3 else 1, 8)) and not file.exists()
    once = whole(settings)
    for key, delta in once.deltas.items():
        pairs = zip(parts_of(delta).values(), parts_of(again.deltas[key]).values(), strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    assert torch.equal(once.embeddings["text_encoder"], again.embeddings["text_encoder"])


def test_a_checkpoint_changes_nothing(tiny_pipe, tmp_path, whole):
    assert equal(train(tiny_pipe, checkpoint=tmp_path / "rex.ckpt"), whole(SETTINGS))


def test_a_checkpoint_of_another_version_is_told(tiny_pipe, tmp_path, kept):
    file = tmp_path / "rex.ckpt"
    file.write_bytes(kept)
    state = torch.load(file, weights_only=True)
    del state["layout"]
    torch.save(state, file)
    with pytest.raises(WeaverError, match=r"rex\.ckpt: a checkpoint of another version of this package: remove it"):
        train(tiny_pipe, checkpoint=file, prior=None, images=[])
    assert file.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"settings": replace(SETTINGS, learning_rate=2e-3, optimiser="muon")},
            r"other settings \(optimiser: kept 'adamw', asked 'muon'; learning_rate: kept 0.001, asked 0.002\): ask",
        ),
        ({"token": "<v2>"}, r"with other pictures or captions and settings \(token: kept '<v1>', asked '<v2>'\): ask"),
        ({"images": pictures(2, seed=5)}, "with other pictures or captions: ask for what it has to go on, remove it"),
        (
            {"prior": None, "settings": replace(SETTINGS, prior_batch=0)},
            r"other prior pictures and settings \(prior_batch: kept 1, asked 0\): ask",
        ),
    ],
)
def test_a_checkpoint_of_another_training_is_refused_and_stays(tiny_pipe, tmp_path, kept, changes, message):
    file = tmp_path / "rex.ckpt"
    file.write_bytes(kept)
    with pytest.raises(WeaverError, match=message):
        train(tiny_pipe, checkpoint=file, **changes)
    assert file.read_bytes() == kept


def test_a_checkpoint_of_another_precision_is_refused(tiny_pipe, pipe, tmp_path, kept):
    file = tmp_path / "rex.ckpt"
    file.write_bytes(kept)
    assert attn2_hash(pipe.unet) == attn2_hash(tiny_pipe.unet)
    with pytest.raises(WeaverError, match=r"with other settings \(precision: kept 'float64', asked 'float32'\): ask"):
        train(pipe, checkpoint=file)


def test_a_damaged_checkpoint_is_told(tiny_pipe, tmp_path):
    file = tmp_path / "rex.ckpt"
    file.write_bytes(b"half")
    with pytest.raises(WeaverError, match=r"rex.ckpt: not a readable checkpoint .*remove it to begin anew"):
        train(tiny_pipe, checkpoint=file)


MADE = replace(SETTINGS, prior_images=5, prior_steps=2)


def test_class_pictures_are_made_once(tiny_pipe, tmp_path, monkeypatch):
    """Interrupted while they are made, and after that: all in all as many are drawn as in one go."""
    drawn, draw = [], type(tiny_pipe).__call__

    def counted(self, prompts, **options):
        drawn.append(len(prompts))
        return draw(self, prompts, **options)

    monkeypatch.setattr(type(tiny_pipe), "__call__", counted)
    file = tmp_path / "rex.ckpt"
    options = {"settings": MADE, "prior": None, "at_once": 2}
    whole = train(tiny_pipe, **options)
    drawn.clear()
    for stop in (2, 5 + 4):
        with pytest.raises(Interrupted):
            train(tiny_pipe, stop=stop, checkpoint=file, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rex.ckpt", "rex.ckpt.class"]
    assert equal(train(tiny_pipe, checkpoint=file, **options), whole)
    assert drawn == [2, 2, 1] and not list(tmp_path.iterdir())


def test_class_pictures_of_another_training_are_refused(tiny_pipe, tmp_path):
    file = tmp_path / "rex.ckpt"
    options = {"prior": None, "at_once": 2, "checkpoint": file}
    with pytest.raises(Interrupted):
        train(tiny_pipe, stop=2, settings=MADE, **options)
    with pytest.raises(WeaverError, match=r"class: class pictures made otherwise \(seed: kept 0, asked 7\): remove it"):
        train(tiny_pipe, settings=replace(MADE, seed=7), **options)
    (tmp_path / "rex.ckpt.class" / "made.json").write_text("{")
    with pytest.raises(WeaverError, match=r"made.json: can't be read .*remove its folder"):
        train(tiny_pipe, settings=MADE, **options)


def test_a_checkpoint_of_another_training_is_told_before_class_pictures_are_made(
    tiny_pipe, tmp_path, kept, monkeypatch
):
    file = tmp_path / "rex.ckpt"
    file.write_bytes(kept)
    monkeypatch.setattr(type(tiny_pipe), "__call__", None)
    with pytest.raises(WeaverError, match="other prior pictures and settings"):
        train(tiny_pipe, checkpoint=file, settings=MADE, prior=None)
