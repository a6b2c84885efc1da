"""A concept learned in woven scenes is learned under what a fusion does, and the pictures for it show what they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from weaver import WeaverError
from weaver.concepts.prompts import encode
from weaver.concepts.settings import TrainSettings
from weaver.concepts.train import train_concept
from weaver.concepts.training_state import added
from weaver.concepts.woven import WovenSet, prepare_woven, woven
from weaver.features import Features
from weaver.fusion import ConceptUse, FusionPlan, attach
from weaver.layers import InjectionSites
from weaver.replay import forward_until

SITES = InjectionSites("some", resnets=(3, 4), attentions=(4, 7), resnet_window=0.6, attention_window=0.4)
BASE, OWN = "a dog and a cat, mountain", "a <v1> dog, mountain"


@pytest.fixture(scope="module")
def scenes():
    rng = np.random.default_rng(0)
    images, templates = (
        tuple(Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(2)) for _ in range(2)
    )
    masks = np.zeros((2, 32, 32), bool)
    masks[0, 5:25, 3:18] = masks[1, 8:30, 14:31] = True
    return WovenSet(images, (OWN,) * 2, (BASE,) * 2, masks, templates)


@pytest.mark.parametrize("step", range(4), ids=["both", "resnets", "free", "last"])
@torch.no_grad()
def test_woven_rows_are_drawn_as_a_fusion_draws_them(tiny_pipe, concepts, scenes, step):
    unet, concept = tiny_pipe.unet, concepts[0]
    steps = (950, 500, 300, 10)
    t = torch.tensor([steps[step]] * 2)
    examples = prepare_woven(tiny_pipe, scenes, "<v1>", 1)
    noise = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(1)).double()
    own, other = encode(tiny_pipe, OWN, concept).text, encode(tiny_pipe, "a fox").text
    z = torch.cat([examples.own.latents.double(), torch.ones(1, 4, 16, 16)]) + noise

    def noised(latents, rows):
        return latents.double() + noise[rows]

    picks, deltas = torch.tensor([1, 0]), {path: delta.double() for path, delta in concept.deltas.items()}
    z[:2] = examples.own.latents.double()[picks] + noise[:2]
    text = torch.cat([own, own, other])
    with added(unet, deltas):
        plain = unet(z[2:], t[:1], other).sample
        with woven(unet, examples, SITES) as forward:
            forward.begin(picks, t, 1000, noised)
            found = unet(z, torch.cat([t, t[:1]]), text).sample
    torch.testing.assert_close(found[2:], plain, rtol=1e-10, atol=1e-10)

    paths = SITES.resnet_modules() * (step < 2)
    paths += [f"{path}.{name}" for path in SITES.attention_modules(unet) for name in ("to_q", "to_k")] * (step < 1)
    base_text = {"encoder_hidden_states": encode(tiny_pipe, BASE).text}
    for row, pick in enumerate(picks.tolist()):
        template = examples.templates[pick : pick + 1].double() + noise[row : row + 1]
        features = Features(
            SITES, torch.tensor(steps), ({},) * step + (forward_until(unet, paths, template, t[0], base_text)[0],),
            template, None,
        )  # fmt: skip
        plan = FusionPlan.build(
            tiny_pipe, [ConceptUse(concept, prompt=OWN)], scenes.masks[pick][None].astype(float), prompt=BASE,
            features=features,
        )  # fmt: skip
        with attach(unet, plan, rows=("fused",)) as state:
            state.set_step(step, features.timesteps)
            fused = unet(z[row : row + 1], t[0], base_text["encoder_hidden_states"]).sample
        torch.testing.assert_close(found[row : row + 1], fused, rtol=1e-6, atol=1e-6)  # masks and latents are float32
        assert (fused - unet(z[row : row + 1], t[0], own).sample).abs().max() > 1e-2


def test_nothing_of_it_is_left_on_the_unet(tiny_pipe, scenes):
    processors = dict(tiny_pipe.unet.attn_processors)
    examples = prepare_woven(tiny_pipe, scenes, "<v1>", 1)
    with pytest.raises(ZeroDivisionError), woven(tiny_pipe.unet, examples, SITES):
        assert tiny_pipe.unet.attn_processors != processors
        _ = 1 / 0
    assert tiny_pipe.unet.attn_processors == processors
    assert not any(module._forward_hooks for module in tiny_pipe.unet.modules())


def test_parts_that_do_not_belong_together(scenes):
    with pytest.raises(WeaverError, match=r"\[1, 2\] of their parts"):
        WovenSet(scenes.images, scenes.captions, scenes.base_captions[:1], scenes.masks, scenes.templates)
    with pytest.raises(WeaverError, match="a mask is empty"):
        WovenSet(scenes.images, scenes.captions, scenes.base_captions, scenes.masks * False, scenes.templates)
    with pytest.raises(WeaverError, match=r"\(32, 32\) pixels beside masks of \(30, 32\)"):
        WovenSet(scenes.images, scenes.captions, scenes.base_captions, scenes.masks[:, :, :30], scenes.templates)


def test_scenes_that_no_step_would_show(tiny_pipe, scenes):
    with pytest.raises(WeaverError, match="set woven_batch, or leave them out"):
        train_concept(tiny_pipe, [], token="<v1>", word="dog", woven=scenes, settings=TrainSettings())
