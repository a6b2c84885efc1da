"""Several variants of one template in a batch: each gets the picture that its plan gives alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import make_concept
from pipeline_forms import STEPS, draw

from weaver import WeaverError
from weaver.features import collect_features
from weaver.fusion import ConceptUse, FusionPlan, attach, sample_fusion, stack_plans
from weaver.inversion import invert
from weaver.layers import InjectionSites
from weaver.schedule import ddim_scheduler

PROMPT = "a dog and a cat, mountain"
SITES = InjectionSites("some", resnets=(3, 4), attentions=(4, 7), resnet_window=0.8, attention_window=0.5)


@pytest.fixture(scope="module")
def features(tiny_pipe):
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    return collect_features(tiny_pipe, invert(tiny_pipe, z, PROMPT, STEPS), SITES)


@pytest.fixture(scope="module")
def make(tiny_pipe, concepts):
    """Returns a function that builds three plans: two concepts, one with a window and its own negative, none."""
    masks = torch.zeros(2, 32, 32)
    masks[0, 8:, :16] = 1
    masks[1, :20, 16:] = 1

    def build(**shared):
        shared = {"steps": STEPS} | shared
        dog, cat = (ConceptUse(concept) for concept in concepts[:2])
        late = dataclasses.replace(cat, window=(0.3, 1.0), strength=0.8, negative_prompt="ugly")
        ground = ConceptUse(concepts[4])
        return [
            FusionPlan.build(tiny_pipe, [dog, cat], masks, prompt=PROMPT, suppression=0.3, **shared),
            FusionPlan.build(tiny_pipe, [late], masks[1:], prompt="a red cat, mountain", background=ground, **shared),
            FusionPlan.build(tiny_pipe, prompt="a fox, beach", negative_prompt="blurry", **shared),
        ]

    return build


@pytest.mark.parametrize("guidance", [5.0, 1.0])
@pytest.mark.parametrize("injected", [True, False], ids=["template", "noise"])
def test_variants_are_drawn_as_they_are_alone(tiny_pipe, make, features, guidance, injected):
    z = features.z_T if injected else torch.randn(1, 4, 16, 16).double()
    plans = make(guidance=guidance, features=features if injected else None)
    scheduler = ddim_scheduler(tiny_pipe.scheduler)
    alone = torch.cat([sample_fusion(tiny_pipe.unet, z, scheduler, plan) for plan in plans])
    stacked = stack_plans(plans)
    assert stacked.variants == 3
    together = sample_fusion(tiny_pipe.unet, z, scheduler, stacked)
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)
    assert all((a - b).abs().max() > 1e-3 for a, b in ((alone[0], alone[1]), (alone[1], alone[2])))


def test_several_pictures_of_each_variant(tiny_pipe, make):
    plans, scheduler = make(), ddim_scheduler(tiny_pipe.scheduler)
    noise = torch.randn(6, 4, 16, 16, generator=torch.Generator().manual_seed(1)).double()
    alone = [sample_fusion(tiny_pipe.unet, z, scheduler, plan) for plan, z in zip(plans, noise.split(2), strict=True)]
    together = sample_fusion(tiny_pipe.unet, noise, scheduler, stack_plans(plans))
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-10, atol=1e-10)
    with pytest.raises(WeaverError, match="4 pictures of 3 variants: expected as many of each"):
        sample_fusion(tiny_pipe.unet, noise[:4], scheduler, stack_plans(plans))


def test_the_pipeline_takes_a_prompt_for_each_variant(tiny_pipe, make, features):
    plans = make(features=features)
    stacked = stack_plans(plans)
    arguments = {"output_type": "latent"}
    with attach(tiny_pipe, stacked):
        together = tiny_pipe(**stacked.pipeline_arguments(), **arguments).images
        with pytest.raises(WeaverError, match="other prompts than the plan's.*'a fox, beach'.*'blurry'"):
            draw(tiny_pipe, prompt=[PROMPT] * 3)
    for plan, picture in zip(plans, together, strict=True):
        with attach(tiny_pipe, plan):
            alone = tiny_pipe(**plan.pipeline_arguments(), **arguments).images
        torch.testing.assert_close(picture[None], alone, rtol=1e-10, atol=1e-10)


def test_rows_of_variants_are_declared_with_their_number(tiny_pipe, make, features):
    stacked = stack_plans(make(features=features))
    z, text, t = features.z_T.expand(2, -1, -1, -1), stacked.text[:2], features.timesteps
    found = {}
    for rows in (("fused", 2), ("negative", 1)), (("negative", 1), ("fused", 2)):
        with attach(tiny_pipe.unet, stacked, rows=rows) as state, torch.no_grad():
            state.set_step(0, t)
            found[rows] = tiny_pipe.unet(z, t[0], text).sample
    first, second = found.values()
    torch.testing.assert_close(first, second.flip(0), rtol=1e-10, atol=1e-10)
    for odd in ("fused", ("fused", 3), ("source", 0), ("fused", -1), 7):
        with pytest.raises(WeaverError, match="number of the variant from 0 to 2"):
            with attach(tiny_pipe.unet, stacked, rows=[odd]):
                pass


def test_plans_that_do_not_go_together(tiny_pipe, make, features):
    plan = make()[0]
    other = FusionPlan.build(tiny_pipe, prompt=PROMPT, steps=STEPS + 1, guidance=3.0, height=48, width=32)
    with pytest.raises(WeaverError) as caught:
        stack_plans([plan, other, make(features=features)[0]])
    message = str(caught.value)
    for reason in (
        f"plan 1 has steps {STEPS + 1}, the first {STEPS}",
        "plan 1 has guidance 3.0, the first 7.5",
        "plan 1 has size (24, 16), the first (16, 16)",
        "plan 2 has other features than the first",
    ):
        assert reason in message
    with pytest.raises(WeaverError, match="there are none"):
        stack_plans([])
    with pytest.raises(WeaverError, match="plans is a FusionPlan, expected a list of plans"):
        stack_plans(plan)
    with pytest.raises(WeaverError, match="plan 1 is None, expected what `FusionPlan.build` gives"):
        stack_plans([plan, None])


def test_variants_with_projections_of_their_own(tiny_pipe, features):
    """A plan with a changed query and output beside one without, whose contexts have other numbers when stacked."""
    masks = torch.zeros(1, 32, 32)
    masks[0, 4:28, 4:28] = 1
    every = ("to_k", "to_v", "to_q", "to_out.0", "to_out.0.bias")
    uses = [ConceptUse(make_concept(tiny_pipe, 1, "dog", changed=names)) for names in (every[:2], every)]
    plans = [FusionPlan.build(tiny_pipe, [use], masks, prompt=PROMPT, features=features) for use in uses]
    scheduler = ddim_scheduler(tiny_pipe.scheduler)
    alone = torch.cat([sample_fusion(tiny_pipe.unet, features.z_T, scheduler, plan) for plan in plans])
    together = sample_fusion(tiny_pipe.unet, features.z_T, scheduler, stack_plans(plans))
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)
    assert (alone[0] - alone[1]).abs().max() > 1e-3
