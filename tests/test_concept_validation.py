"""Pictures drawn while a concept is learned: they show it as it then is, and change nothing of what is learned."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from test_concept_objective import scenes
from test_concept_train import ALONE, FAST, NAMES, PRIOR, pictures
from test_concept_train_sdxl import same, written_in

from weaver.concepts.concept import Concept
from weaver.concepts.encoding import encode
from weaver.concepts.prompts import PromptError
from weaver.concepts.train import train_concept
from weaver.concepts.validation import Validation
from weaver.errors import WeaverError

PROMPTS = ("a <v1> cat, mountain", "a dog and a <v1> cat")
SIDE = 32


def drawn(folder, **changes) -> Validation:
    return Validation(**{"prompts": PROMPTS, "folder": folder, "every": 2, "pictures": 3, "steps": 2} | changes)


def strips(file) -> np.ndarray:
    """[prompts, pictures, height, width, 3]"""
    sheet = np.asarray(Image.open(file)).astype(int)
    rows, columns = (length // SIDE for length in sheet.shape[:2])
    return sheet.reshape(rows, SIDE, columns, SIDE, 3).swapaxes(1, 2)


@pytest.mark.parametrize("kind", ["made", "woven", "checkpointing"])
@pytest.mark.parametrize("model", ["tiny_pipe", "tiny_sdxl"])
def test_what_is_learned_is_the_same_to_the_last_bit(request, tmp_path, model, kind):
    pipe, given = request.getfixturevalue(model), {"settings": replace(FAST, steps=5, accumulate=2)}
    if kind == "woven":
        given = {"settings": replace(FAST, steps=5, woven_batch=1), "prior": PRIOR, "woven": scenes()}
    if kind == "checkpointing":
        given = {"settings": replace(ALONE, steps=5, checkpointing=True)}
    plain = train_concept(pipe, pictures(), **NAMES, **given)
    modules = [module for part in (pipe.unet, pipe.vae, pipe.text_encoder) for module in part.modules()]
    before = torch.get_rng_state(), [module.training for module in modules], vars(pipe.scheduler).copy()
    watched = train_concept(pipe, pictures(), **NAMES, **given, validation=drawn(tmp_path))
    assert same(plain, watched)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert [module.training for module in modules] == before[1]
    assert pipe.scheduler.config == before[2]["_internal_dict"]
    assert all(p.grad is None for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters())
    assert [file.name for file in sorted(tmp_path.iterdir())] == [f"step-00000{step}.png" for step in (2, 4, 5)]
    assert len({file.read_bytes() for file in tmp_path.iterdir()}) == 3


def stock(pipe, concept: Concept, prompt: str, count: int) -> list[np.ndarray]:
    """What the library draws of the concept's prompt with weights and token written into it."""
    given = {"prompt": [prompt] * count}
    if hasattr(pipe, "text_encoder_2"):
        pipe = written_in(pipe, concept)
    else:
        given = {
            "prompt_embeds": encode(pipe, prompt, concept).text.expand(count, -1, -1),
            "negative_prompt_embeds": encode(pipe, "").text.expand(count, -1, -1),
        }
        pipe = copy.copy(pipe)
        pipe.unet = copy.deepcopy(pipe.unet)
        for path, delta in concept.deltas.items():
            pipe.unet.get_submodule(path).weight.data += delta
    generators = [torch.Generator().manual_seed(11 + number) for number in range(count)]
    images = pipe(**given, num_inference_steps=2, guidance_scale=4.0, generator=generators).images
    return [np.asarray(image).astype(int) for image in images]


@pytest.mark.parametrize("kind", ["alone", "woven"])
@pytest.mark.parametrize("model", ["tiny_pipe", "tiny_sdxl"])
def test_the_pictures_are_the_librarys_with_the_concept_written_in(request, tmp_path, model, kind):
    """To the rounding of a concept to half precision, which is more than that of a level."""
    pipe = request.getfixturevalue(model)
    settings = replace(ALONE, steps=4, learning_rate=0.1, token_learning_rate=0.5)
    given = {"settings": settings}
    if kind == "woven":
        given = {"settings": replace(settings, woven_batch=1), "woven": scenes()}
    validation = drawn(tmp_path, every=1, guidance=4.0, seed=11)
    concept = train_concept(pipe, pictures(), **NAMES, **given, validation=validation, at_once=2)
    first, last = (strips(tmp_path / f"step-00000{step}.png") for step in (1, 4))
    assert last.shape == (2, 3, SIDE, SIDE, 3)
    for strip, earlier, prompt in zip(last, first, PROMPTS, strict=True):
        expected = stock(pipe, concept, prompt, 3)
        assert np.abs(strip - expected).max() <= 3
        assert np.abs(earlier - expected).mean() > 3 and np.abs(strip[0] - strip[1]).mean() > 3


def test_strips_are_shown_in_tensorboard(tiny_pipe, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = replace(ALONE, steps=3)
    validation = drawn(tmp_path / "pictures")
    train_concept(tiny_pipe, pictures(), **NAMES, settings=settings, validation=validation, log_dir=tmp_path / "log")
    events = EventAccumulator(str(tmp_path / "log"))
    events.Reload()
    assert events.Tags()["images"] == [f"validation/{prompt}" for prompt in PROMPTS]
    shown = events.Images(f"validation/{PROMPTS[0]}")
    assert [(one.step, one.width, one.height) for one in shown] == [(2, 96, 32), (3, 96, 32)]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"prompts": ["a cat"]}, PromptError, "token '<v1>' is not in its prompt 'a cat'"),
        ({"prompts": "a <v1> cat"}, WeaverError, "prompts is 'a <v1> cat', expected a list"),
        ({"every": 0, "pictures": 0}, WeaverError, "every is 0, expected 1 or more; pictures is 0"),
        ({"folder": __file__}, WeaverError, "validation: .* can't be made a folder .*: name another"),
    ],
    ids=["token", "text", "counts", "folder"],
)
def test_mistakes_are_told_before_anything_is_made(tiny_pipe, tmp_path, monkeypatch, changes, error, message):
    def never(*args, **kwargs):
        raise AssertionError("class pictures were made")

    monkeypatch.setattr(type(tiny_pipe), "__call__", never)
    with pytest.raises(error, match=message):
        train_concept(tiny_pipe, pictures(), **NAMES, settings=FAST, validation=drawn(**{"folder": tmp_path} | changes))
