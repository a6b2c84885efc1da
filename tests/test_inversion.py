from __future__ import annotations

import copy

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from PIL import Image

from weaver import WeaverError
from weaver.features import collect_features
from weaver.inversion import invert
from weaver.latents import encode_image
from weaver.layers import InjectionSites
from weaver.schedule import ddim_scheduler, most_steps


@pytest.fixture
def z():
    return torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize("name", ["tiny_pipe", "tiny_pipe_v"])
def test_is_ddim_run_backwards(name, request, z):
    """Each step is the DDIM step between the same two noise levels, solved the other way round."""
    pipe = request.getfixturevalue(name)
    steps, done = 5, []
    inversion = invert(pipe, z, "a dog", steps, progress=lambda *step: done.append(step))
    levels = pipe.scheduler.alphas_cumprod
    text = pipe.encode_prompt("a dog", "cpu", 1, False)[0]
    x = z
    for i in range(steps):
        t = 1 + 200 * i
        low, high = (levels[t - 200] if i else levels[0]), levels[t]
        with torch.no_grad():
            output = pipe.unet(x, t, text).sample
        if name == "tiny_pipe":
            x_0, eps = (x - (1 - low) ** 0.5 * output) / low**0.5, output
        else:
            x_0, eps = low**0.5 * x - (1 - low) ** 0.5 * output, low**0.5 * output + (1 - low) ** 0.5 * x
        x = high**0.5 * x_0 + (1 - high) ** 0.5 * eps
        torch.testing.assert_close(inversion.latents[i + 1 : i + 2], x, rtol=1e-9, atol=1e-9)
    assert torch.equal(inversion.z_0, z) and torch.equal(inversion.z_T, inversion.latents[-1:])
    assert inversion.timesteps.tolist() == [801, 601, 401, 201, 1]
    assert (inversion.steps, inversion.size, inversion.prompt) == (steps, (16, 16), "a dog")
    assert torch.equal(inversion.text, text)
    assert done == [(i, steps) for i in range(1, steps + 1)]


def test_a_picture_is_encoded(tiny_pipe):
    image = Image.new("RGB", (48, 32), "orange")
    inversion = invert(tiny_pipe, image, "a photo", 1)
    assert inversion.size == (16, 24)
    assert torch.equal(inversion.z_0, encode_image(tiny_pipe.vae, image))


def test_ddim_takes_over_schedule_and_prediction(tiny_pipe_v):
    other = EulerDiscreteScheduler.from_config(tiny_pipe_v.scheduler.config, timestep_spacing="linspace")
    ddim = ddim_scheduler(other)
    assert ddim.config.prediction_type == "v_prediction" and not ddim.config.clip_sample
    assert ddim.config.timestep_spacing == "leading"
    assert torch.equal(ddim.alphas_cumprod, tiny_pipe_v.scheduler.alphas_cumprod)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_timesteps_are_those_of_the_reverse_pass(tiny_pipe, z, spacing):
    own = tiny_pipe.scheduler
    tiny_pipe.scheduler = type(own).from_config(own.config, timestep_spacing=spacing)
    try:
        inversion = invert(tiny_pipe, z, "a dog", 4)
        ddim = ddim_scheduler(tiny_pipe.scheduler)
    finally:
        tiny_pipe.scheduler = own
    ddim.set_timesteps(4)
    assert torch.equal(inversion.timesteps, ddim.timesteps)


@pytest.mark.parametrize(("spacing", "offset"), [("leading", 0), ("leading", 1), ("trailing", 1)])
def test_the_most_steps_have_a_noise_level_each(tiny_pipe, spacing, offset):
    """One more and the last timestep would be past the schedule's end."""
    changes = {"num_train_timesteps": 20, "timestep_spacing": spacing, "steps_offset": offset}
    pipe = copy.copy(tiny_pipe)
    pipe.scheduler = type(tiny_pipe.scheduler).from_config(tiny_pipe.scheduler.config, **changes)
    limit = most_steps(pipe.scheduler)
    assert limit == (19 if (spacing, offset) == ("leading", 1) else 20)
    z = torch.zeros(1, 4, 8, 8).double()
    inversion = invert(pipe, z, "a dog", limit)
    collect_features(pipe, inversion, InjectionSites("none"))
    assert inversion.timesteps.max() == 19
    with pytest.raises(WeaverError, match=f"from 1 to {limit}"):
        invert(pipe, z, "a dog", limit + 1)


def test_bad_input(tiny_pipe, z):
    with pytest.raises(WeaverError, match="steps: is 0.*size: is 50x32, expected multiples of 8"):
        invert(tiny_pipe, Image.new("RGB", (50, 32)), "a dog", 0)
    for steps in (-1, 1000, 2.0):
        with pytest.raises(WeaverError, match="from 1 to 999"):
            invert(tiny_pipe, z, "a dog", steps)
    with pytest.raises(WeaverError, match=r"latents have shape \(1, 3, 32, 32\), expected \[1, 4, h, w\]"):
        invert(tiny_pipe, torch.zeros(1, 3, 32, 32), "a dog")
    with pytest.raises(WeaverError, match="the picture is a str"):
        invert(tiny_pipe, "photo.png", "a dog")
