"""Training uses accelerate, and leaves its state to the caller and to trainings before and after it."""

from __future__ import annotations

import gc
import socket
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from test_concept_train import ALONE, NAMES, equal, pictures

from weaver.concepts.train import train_concept
from weaver.errors import WeaverError


@pytest.fixture
def fresh_state():
    """The process as it is before its first `Accelerator`, and again afterwards."""

    def reset():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    reset()
    yield
    reset()


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def train(pipe, **changes):
    return train_concept(pipe, pictures(), **NAMES, settings=replace(ALONE, **changes))


def test_a_caller_may_accumulate_by_an_accelerator_of_another_precision(tiny_pipe, fresh_state):
    expected, parts = train(tiny_pipe), train(tiny_pipe, accumulate=2)
    theirs = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=3)  # ours left nothing behind
    weight = torch.nn.Parameter(torch.zeros(()))
    optimiser = theirs.prepare(torch.optim.SGD([weight], lr=1.0))
    values = []
    for _ in range(6):
        with theirs.accumulate():
            theirs.backward(weight * 1)
            optimiser.step()
            optimiser.zero_grad()
            values.append(weight.item())
            ours = train(tiny_pipe), train(tiny_pipe, accumulate=2)
            assert equal(ours[0], expected) and equal(ours[1], parts) and not equal(expected, parts)
    assert values == [0, 0, -1, -1, -1, -2] and theirs.mixed_precision == "bf16"


def test_what_a_launcher_asks_of_others_is_not_ours(tiny_pipe, fresh_state, monkeypatch):
    """One process of `accelerate launch`, whose own settings are of a training of its own."""
    expected = train(tiny_pipe)
    told = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": 4, "ACCELERATE_MIXED_PRECISION": "bf16"}
    told |= {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in told.items():
        monkeypatch.setenv(name, str(value))
    assert equal(train(tiny_pipe), expected)
    assert not torch.distributed.is_initialized()


def test_several_processes_are_refused_before_they_wait_for_each_other(tiny_pipe, monkeypatch):
    for name, value in {"WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 0}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(WeaverError, match=r"the environment has WORLD_SIZE=2; a concept is learned by one process"):
        train(tiny_pipe)


def test_nothing_of_an_optimiser_is_kept(tiny_pipe):
    gc.collect()
    before = {id(x) for x in gc.get_objects() if issubclass(type(x), torch.optim.Optimizer)}
    train(tiny_pipe)
    left = [x for x in gc.get_objects() if issubclass(type(x), torch.optim.Optimizer) and id(x) not in before]
    assert not any(x.state for x in left)
