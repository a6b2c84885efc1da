"""Training shares accelerate's state with its caller, and with trainings before and after it."""

from __future__ import annotations

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


def train(pipe, **changes):
    return train_concept(pipe, pictures(), **NAMES, settings=replace(ALONE, **changes))


def test_a_caller_may_accumulate_by_an_accelerator_of_another_precision(tiny_pipe, fresh_state):
    expected, parts = train(tiny_pipe), train(tiny_pipe, accumulate=2)
    AcceleratorState._reset_state(reset_partial_state=True)
    theirs = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=3)
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
    assert values == [0, 0, -1, -1, -1, -2]


def test_the_launchers_accumulation_is_not_ours(tiny_pipe, fresh_state, monkeypatch):
    expected = train(tiny_pipe)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert equal(train(tiny_pipe), expected)


def test_several_processes_are_refused(tiny_pipe, monkeypatch):
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    with pytest.raises(WeaverError, match=r"learned by one process, not by 2: start it without `accelerate launch`"):
        train(tiny_pipe)
    assert not any(module._forward_hooks for module in tiny_pipe.unet.modules())
