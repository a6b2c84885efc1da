"""A step's loss, whole and in parts: accumulated gradients are those of one batch."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from test_concept_train import NAMES, PRIOR, equal, pictures

from benchmarks.timing import host_peak
from weaver.concepts.examples import prepare
from weaver.concepts.images import TrainingSet
from weaver.concepts.learned import start
from weaver.concepts.objective import Batch, Objective, Rows
from weaver.concepts.settings import TrainSettings
from weaver.concepts.train import train_concept
from weaver.concepts.training_state import added, frozen
from weaver.concepts.woven import WovenSet, prepare_woven, woven
from weaver.conditioning import text_encoders
from weaver.layers import InjectionSites

SITES = {4: InjectionSites("some", resnets=(3, 4), attentions=(4, 7)), 3: InjectionSites("some", (1,), (1, 4))}
WHOLE = TrainSettings(steps=3, learning_rate=1e-3, batch=6, prior_batch=3)
PARTS = replace(WHOLE, batch=2, prior_batch=1, accumulate=3)


def masked() -> TrainingSet:
    """Four pictures, the concept in a smaller or larger part of each."""
    masks = []
    for number in range(4):
        masks.append(Image.new("L", (32, 32), 0))
        masks[-1].paste(255, (0, 0, 6 + 6 * number, 32))
    return TrainingSet(tuple(pictures(4)), ("a <v1> cat",) * 4, tuple(masks))


def scenes() -> WovenSet:
    masks = np.zeros((4, 32, 32), bool)
    for number in range(4):
        masks[number, 4 : 12 + 4 * number, 3:18] = True
    own, base = ("a <v1> cat, mountain",) * 4, ("a dog and a cat, mountain",) * 4
    return WovenSet(tuple(pictures(4, seed=1)), own, base, masks, tuple(pictures(4, seed=2)))


def gradients(pipe, settings: TrainSettings, data: TrainingSet, woven_data: WovenSet | None):
    """Of the first step: its loss, what is learned's gradients, and how many batches it took."""
    learned = start(pipe, "cat", settings)
    own, other = prepare(pipe, data, "<v1>"), prepare(pipe, PRIOR)
    examples = woven_data and prepare_woven(pipe, woven_data, "<v1>", 1)
    sites = SITES[len(pipe.unet.config.block_out_channels)]
    with (
        frozen(pipe.unet, *text_encoders(pipe).values()),
        woven(pipe.unet, examples, sites) if examples else nullcontext() as forward,
        added(pipe.unet, learned.deltas),
    ):
        objective = Objective(pipe, learned.vectors, settings, own, other, examples, forward)
        batches = objective.draw(torch.Generator().manual_seed(3))
        losses = [objective.loss(batch) for batch in batches]
        (sum(loss.total for loss in losses) / len(losses)).backward()
    told = [sum(part.item() for part in parts) / len(parts) for parts in zip(*losses, strict=True)]
    return told, [x.grad for x in learned.tensors()], len(batches)


@pytest.mark.parametrize("kind", ["pictures", "masked", "woven"])
@pytest.mark.parametrize("model", ["tiny_pipe", "tiny_sdxl"])
def test_a_step_in_parts_is_that_of_one_batch(request, model, kind):
    pipe = request.getfixturevalue(model)
    data = masked() if kind == "masked" else TrainingSet(tuple(pictures(4)), ("a <v1> cat",) * 4)
    more, woven_data = ({"woven_batch": 3}, scenes()) if kind == "woven" else ({}, None)
    told, expected, one = gradients(pipe, replace(WHOLE, **more), data, woven_data)
    more = {key: value // 3 for key, value in more.items()}
    parts, found, three = gradients(pipe, replace(PARTS, **more), data, woven_data)
    assert (one, three) == (1, 3)
    assert parts == pytest.approx(told, rel=1e-5)  # latents and losses are float32
    for gradient, whole in zip(found, expected, strict=True):
        assert whole.any()
        torch.testing.assert_close(gradient, whole, rtol=1e-4, atol=1e-5 * whole.abs().max().item())


@torch.no_grad()
def test_pictures_count_alike_however_small_their_masks(tiny_pipe):
    learned = start(tiny_pipe, "cat", WHOLE)
    objective = Objective(tiny_pipe, learned.vectors, WHOLE, prepare(tiny_pipe, masked(), "<v1>"))
    (batch,) = objective.draw(torch.Generator().manual_seed(3))
    rows = batch.rows["own"]
    alone = [Rows(*(part[i : i + 1] for part in rows[:3])) for i in range(len(rows.picks))]
    each = torch.stack([objective.loss(Batch({"own": row}, False)).own for row in alone])
    assert len(set(rows.picks.tolist())) > 1 and each.std() > 0.01 * each.mean()
    torch.testing.assert_close(objective.loss(batch).own, each.mean(), rtol=1e-5, atol=1e-6)


def test_a_training_in_parts_learns_the_same(tiny_pipe):
    whole, parts, other = (
        train_concept(tiny_pipe, pictures(3), **NAMES, prior=PRIOR, settings=settings)
        for settings in (WHOLE, PARTS, replace(PARTS, accumulate=1))
    )
    assert parts.settings["accumulate"] == 3 and not equal(parts, other)

    def apart(concept) -> float:
        moved, expected = (torch.cat([x.float().flatten() for x in c.deltas.values()]) for c in (concept, whole))
        return ((moved - expected).norm() / expected.norm()).item()

    assert apart(parts) < 0.01 < 0.1 < apart(other)  # steps of AdamW are as long for the smallest gradients


def test_a_step_in_parts_takes_the_memory_of_one(tiny_pipe):
    def peak(settings: TrainSettings) -> int:
        return host_peak(lambda: train_concept(tiny_pipe, pictures(3), **NAMES, prior=PRIOR, settings=settings))

    one, parts, whole = (peak(replace(s, steps=1)) for s in (replace(PARTS, accumulate=1), PARTS, WHOLE))
    assert parts < 1.1 * one + 4 * 4 * 16 * 16 * 6 < 0.6 * whole  # and the noise of the others


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_gradients_are_scaled_and_summed(tiny_pipe, dtype):
    half = copy.copy(tiny_pipe)
    for name in ("unet", "text_encoder", "vae"):
        setattr(half, name, copy.deepcopy(getattr(tiny_pipe, name)).to(dtype))
    found, expected = (
        train_concept(pipe, pictures(3), **NAMES, prior=PRIOR, settings=replace(PARTS, steps=1))
        for pipe in (half, tiny_pipe)
    )
    learned, whole = (torch.cat([x.flatten() for x in c.deltas.values()]).float() for c in (found, expected))
    assert torch.cosine_similarity(learned, whole, dim=0) > 0.8
    assert all(x.dtype == torch.float32 for x in found.embeddings.values())
