"""A concept learned in woven scenes is learned under what a fusion does, and the pictures for it show what they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import make_whole, shallow
from PIL import Image

from weaver import WeaverError
from weaver.concepts.changes import moved
from weaver.concepts.encoding import Encoding, encode
from weaver.concepts.settings import TrainSettings
from weaver.concepts.train import train_concept
from weaver.concepts.training_state import added
from weaver.concepts.woven import WovenSet, prepare_woven, woven
from weaver.conditioning import make_time_ids, unet_arguments
from weaver.features import Features
from weaver.fusion import ConceptUse, FusionPlan, attach
from weaver.layers import InjectionSites, transformer_linears
from weaver.replay import forward_until

SITES = InjectionSites("some", resnets=(3, 4), attentions=(4, 7), resnet_window=0.6, attention_window=0.4)
KINDS = {
    "SD": ("tiny_pipe", "concepts", SITES),
    "whole": ("tiny_pipe", "whole", SITES),
    "SDXL": ("tiny_sdxl", "concepts_sdxl", InjectionSites("some", (1,), (1, 4), 0.6, 0.4)),
}
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


@pytest.fixture(scope="module")
def whole(tiny_pipe):
    """A LoRA of all layers that are learned."""
    return [make_whole(tiny_pipe, 1, "dog", transformer_linears(tiny_pipe.unet))]


def read(pipe, *encodings):
    """Those prompts as the U-Net's forward takes them, of whole pictures of the model's size."""
    text, pooled = Encoding.joined(encodings)
    time_ids = make_time_ids(pipe, (32, 32), text)
    return unet_arguments(text, pooled, time_ids if time_ids is None else time_ids.expand(len(text), -1))


@pytest.mark.parametrize("step", range(4), ids=["both", "resnets", "free", "last"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_woven_rows_are_drawn_as_a_fusion_draws_them(request, scenes, kind, step):
    pipe, (concept, *_) = map(request.getfixturevalue, KINDS[kind][:2])
    unet, sites = pipe.unet, KINDS[kind][2]
    steps = (950, 500, 300, 10)
    t = torch.tensor([steps[step]] * 2)
    examples = prepare_woven(pipe, scenes, "<v1>", 1)
    noise = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(1)).double()
    own, other, base = encode(pipe, OWN, concept), encode(pipe, "a fox"), encode(pipe, BASE)
    own = own._replace(pooled=base.pooled)
    z = torch.cat([examples.own.latents.double(), torch.ones(1, 4, 16, 16)]) + noise

    def noised(latents, rows):
        return latents.double() + noise[rows]

    changes = dict(concept.deltas) | dict(concept.outside)
    picks, deltas = torch.tensor([1, 0]), {path: moved(x, "cpu", torch.float64) for path, x in changes.items()}
    z[:2] = examples.own.latents.double()[picks] + noise[:2]
    with added(unet, deltas):
        plain = unet(z[2:], t[:1], **read(pipe, other)).sample
    with woven(unet, examples, sites) as forward, added(unet, deltas, forward):
        forward.begin(picks, t, 1000, noised)
        found = unet(z, torch.cat([t, t[:1]]), **read(pipe, own, own, other)).sample
    torch.testing.assert_close(found[2:], plain, rtol=1e-10, atol=1e-10)

    paths = sites.resnet_modules() * (step < 2)
    paths += [f"{path}.{name}" for path in sites.attention_modules(unet) for name in ("to_q", "to_k")] * (step < 1)
    for row, pick in enumerate(picks.tolist()):
        template = examples.templates[pick : pick + 1].double() + noise[row : row + 1]
        found_there, _ = forward_until(unet, paths, template, t[0], read(pipe, base))
        tensors = ({},) * step + (found_there,)
        features = Features(sites, torch.tensor(steps), tensors, template, None, read(pipe, base))
        plan = FusionPlan.build(
            pipe, [ConceptUse(concept, prompt=OWN)], scenes.masks[pick][None].astype(float), prompt=BASE,
            features=features,
        )  # fmt: skip
        with attach(unet, plan, rows=("fused",)) as state:
            state.set_step(step, features.timesteps)
            fused = unet(z[row : row + 1], t[0], **read(pipe, base)).sample
        torch.testing.assert_close(found[row : row + 1], fused, rtol=1e-6, atol=1e-6)  # masks and latents are float32
        assert (fused - unet(z[row : row + 1], t[0], **read(pipe, own)).sample).abs().max() > 1e-2


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


def test_scenes_for_a_unet_that_no_sites_are_known_for(tiny_pipe, scenes):
    settings = TrainSettings(woven_batch=1)
    with pytest.raises(WeaverError, match="No injection sites are known for a U-Net with channels"):
        train_concept(shallow(tiny_pipe), [], token="<v1>", word="dog", woven=scenes, settings=settings)


def test_woven_rows_of_sdxl_have_the_base_prompts_pooled_embedding(tiny_sdxl, scenes):
    seen = []
    hook = tiny_sdxl.unet.register_forward_pre_hook(lambda *given: seen.append(given[2]), with_kwargs=True)
    settings = TrainSettings(steps=1, batch=1, woven_batch=1, prior_batch=0)
    try:
        train_concept(tiny_sdxl, scenes.images, token="<v1>", word="dog", woven=scenes, settings=settings)
    finally:
        hook.remove()
    (row, _), base = seen[-1]["added_cond_kwargs"]["text_embeds"], encode(tiny_sdxl, BASE)
    torch.testing.assert_close(row, base.pooled[0])
    assert not torch.allclose(seen[-1]["encoder_hidden_states"][0], base.text[0])
