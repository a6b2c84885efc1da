"""A step of the embedded model's fusion is as exact as attention written out, and so is what its benchmark times."""

from __future__ import annotations

import pytest
import torch

from benchmarks.fusion_step import ROWS, STEPS, make_plan, write_out
from weaver.embedded import load_pipeline
from weaver.fusion import attach


def outputs(device, dtype, z=None, *, written_out=False):
    """The noise it began from, and the U-Net's outputs [2, C, h, w] of the injected step and of the one after."""
    pipe = load_pipeline(device, dtype)
    plan = make_plan(pipe, 3, 64)
    z = plan.features.z_T if z is None else z.to(device, dtype)
    found = []
    with torch.no_grad(), attach(pipe.unet, plan, rows=ROWS) as state:
        if written_out:
            write_out(pipe.unet)
        for step in STEPS.values():
            state.set_step(step, plan.features.timesteps)
            timestep, text = plan.features.timesteps[step], plan.text[:2]
            found.append(pipe.unet(z.repeat(2, 1, 1, 1), timestep, text).sample.double().cpu())
    return z, torch.stack(found)


@pytest.fixture(scope="module")
def truth():
    return outputs("cpu", torch.float64)


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("cpu", torch.float32),
        pytest.param("cuda", torch.float32, marks=pytest.mark.gpu),
        pytest.param("cuda", torch.float16, marks=pytest.mark.gpu),
        pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu),
    ],
    ids=str,
)
def test_within_twice_the_error_of_attention_written_out(device, dtype, truth):
    z, true = truth
    ours, theirs = (
        (outputs(device, dtype, z, written_out=written_out)[1] - true).norm() for written_out in (False, True)
    )
    assert 0 < ours <= 2 * theirs
    assert theirs < 0.1 * true.norm()
