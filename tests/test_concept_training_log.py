"""What TensorBoard is told of a training."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_concept_train import ALONE, FAST, NAMES, PRIOR, equal, pictures

from weaver.concepts.train import train_concept
from weaver.errors import WeaverError

SETTINGS = replace(FAST, steps=5, warmup=1, final_rate=0.0, prior_weight=0.5, accumulate=2)


def read(folder) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_losses_and_learning_rate_of_every_step(tiny_pipe, tmp_path):
    told = []
    given = {"prior": PRIOR, "settings": SETTINGS}
    logged = train_concept(
        tiny_pipe, pictures(), **NAMES, **given, log_dir=tmp_path / "deep" / "log",
        progress=lambda done, total, loss: told.append(loss),
    )  # fmt: skip
    found = read(tmp_path / "deep" / "log")
    assert found.keys() == {"train/loss", "train/own_loss", "train/prior_loss", "train/learning_rate"}
    assert all([step for step, _ in values] == [1, 2, 3, 4, 5] for values in found.values())
    values = {tag.partition("/")[2]: [value for _, value in series] for tag, series in found.items()}
    parts = [own + 0.5 * prior for own, prior in zip(values["own_loss"], values["prior_loss"], strict=True)]
    assert values["loss"] == pytest.approx(parts, rel=1e-6)
    assert values["loss"][0] == pytest.approx(told[0], rel=1e-6) and len(set(values["loss"])) == 5
    rates = [min(1, (step + 1) / 2) * (1 - step / 5) * 1e-3 for step in range(5)]
    assert values["learning_rate"] == pytest.approx(rates, rel=1e-6)
    assert equal(logged, train_concept(tiny_pipe, pictures(), **NAMES, **given))


def test_without_prior_pictures_there_is_no_loss_of_theirs(tiny_pipe, tmp_path):
    train_concept(tiny_pipe, pictures(), **NAMES, settings=ALONE, log_dir=tmp_path)
    assert read(tmp_path).keys() == {"train/loss", "train/own_loss", "train/learning_rate"}


def test_a_training_that_goes_on_writes_each_step_once(tiny_pipe, tmp_path):
    def stop(done, total):
        if done == 3:
            raise KeyboardInterrupt

    given = {**NAMES, "prior": PRIOR, "settings": SETTINGS, "log_dir": tmp_path / "log"}
    given |= {"checkpoint": tmp_path / "rex.checkpoint", "checkpoint_every": 2}
    with pytest.raises(KeyboardInterrupt):
        train_concept(tiny_pipe, pictures(), **given, progress=stop)
    before = read(tmp_path / "log")["train/loss"]
    assert [step for step, _ in before] == [1, 2, 3]
    train_concept(tiny_pipe, pictures(), **given)
    after = read(tmp_path / "log")["train/loss"]
    assert [step for step, _ in after] == [1, 2, 3, 4, 5] and after[:3] == before


def test_what_can_not_be_logged_is_told_before_anything_is_made(tiny_pipe, tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("class pictures were made")

    monkeypatch.setattr(type(tiny_pipe), "__call__", never)
    (tmp_path / "file").write_text("")
    with pytest.raises(WeaverError, match=r"log_dir: .*file can't be made a folder .*: name another"):
        train_concept(tiny_pipe, pictures(), **NAMES, settings=FAST, log_dir=tmp_path / "file")
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(WeaverError, match=r"log_dir: .*tensorboard.*; install it by pip install tensorboard, or train"):
        train_concept(tiny_pipe, pictures(), **NAMES, settings=FAST, log_dir=tmp_path / "log")
    assert not (tmp_path / "log").exists()
