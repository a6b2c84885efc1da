"""`attach` on every pipeline it takes: same arguments, and each row of the batch attends to what it should."""

from __future__ import annotations

import inspect

import pytest
import torch
from diffusers import (
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from pipeline_forms import STEPS, controlnet_of, draw, full_mask, make

from weaver import ConceptUse, FusionPlan, attach
from weaver.concepts.concept import attn2_projections
from weaver.features import collect_features
from weaver.inversion import invert
from weaver.layers import InjectionSites
from weaver.schedule import ddim_scheduler

PROMPT, NEGATIVE = "a dog and a cat, mountain", "ugly"
PIPELINES = [
    StableDiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
]
ALL = pytest.mark.parametrize("kind", PIPELINES, ids=lambda kind: kind.__name__.removeprefix("StableDiffusion"))


@pytest.fixture(scope="module")
def controlnet(tiny_pipe):
    return controlnet_of(tiny_pipe.unet)


@pytest.fixture(scope="module")
def template(tiny_pipe):
    """Features of a template, which plans only read."""
    sites = InjectionSites("some", resnets=(4,), attentions=(4, 7), resnet_window=1.0, attention_window=1.0)
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    return collect_features(tiny_pipe, invert(tiny_pipe, z, PROMPT, STEPS), sites)


@ALL
@pytest.mark.parametrize("guidance", [1.0, 5.0], ids=["no-guidance", "guidance"])
def test_a_region_that_is_the_whole_picture_is_its_prompt(kind, guidance, tiny_pipe, controlnet):
    """Catches rows in another order, rows left out, and other steps: p_neg, p_base and the region's prompt all differ.

    A ControlNet reads p_base under `attach` and the region's prompt without it, so there p_base is that prompt too.
    """
    pipe = make(kind, tiny_pipe, controlnet, requires_safety_checker=False)
    own = "a cat, white"
    base = own if hasattr(pipe, "controlnet") else PROMPT
    plan = FusionPlan.build(
        tiny_pipe, [ConceptUse(None, prompt=own)], full_mask(), prompt=base, negative_prompt=NEGATIVE, steps=STEPS
    )
    expected = draw(pipe, prompt=own, negative_prompt=NEGATIVE, guidance_scale=guidance, num_images_per_prompt=2)
    with attach(pipe, plan):
        found = draw(pipe, prompt=base, negative_prompt=NEGATIVE, guidance_scale=guidance, num_images_per_prompt=2)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    plain = draw(pipe, prompt=PROMPT, negative_prompt=NEGATIVE, guidance_scale=guidance, num_images_per_prompt=2)
    assert (plain - expected).abs().max() > 1e-3


@pytest.mark.parametrize("kind", PIPELINES[:3], ids=lambda kind: kind.__name__.removeprefix("StableDiffusion"))
def test_a_concept_on_the_whole_picture_is_the_model_with_its_weights(kind, tiny_pipe, concepts):
    """Without a ControlNet, which would read p_base and not the concept's prompt."""
    pipe, concept = make(kind, tiny_pipe, requires_safety_checker=False), concepts[0]
    own = f"a {concept.token} {concept.word}"
    plan = FusionPlan.build(tiny_pipe, [ConceptUse(concept, prompt=own)], full_mask(), prompt=PROMPT, steps=STEPS)
    with attach(pipe, plan):
        found = draw(pipe, prompt_embeds=plan.text[1:2], guidance_scale=1.0)
    projections = attn2_projections(pipe.unet)
    before = {path: projections[path].weight.detach().clone() for path in concept.deltas}
    with torch.no_grad():
        for path, delta in concept.deltas.items():
            projections[path].weight += delta.double()
    expected = draw(pipe, prompt_embeds=plan.text[2:3], guidance_scale=1.0)
    with torch.no_grad():
        for path, weight in before.items():
            projections[path].weight.copy_(weight)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@ALL
def test_features_of_the_template_are_injected(kind, tiny_pipe, controlnet, concepts, template):
    """Image-to-image begins in the middle of the template's steps and takes the features of those."""
    plans = [
        FusionPlan.build(tiny_pipe, [ConceptUse(concepts[0])], full_mask(), prompt=PROMPT, steps=STEPS, features=f)
        for f in (template, None)
    ]
    pipe = make(kind, tiny_pipe, controlnet, requires_safety_checker=False)
    pipe.scheduler = ddim_scheduler(tiny_pipe.scheduler)
    drawn = []
    for plan in plans:
        with attach(pipe, plan):
            drawn.append(draw(pipe, prompt=PROMPT))
    assert (drawn[0] - drawn[1]).abs().max() > 1e-3


@ALL
@pytest.mark.parametrize("injected", [False, True], ids=["noise", "template"])
def test_the_arguments_of_a_plan_suit_every_form(kind, injected, tiny_pipe, controlnet, concepts, template):
    """A form that starts from its own picture does so, though the plan has the template's noise."""
    features = template if injected else None
    plan = FusionPlan.build(tiny_pipe, concepts[:1], full_mask(), prompt=PROMPT, steps=STEPS, features=features)
    pipe = make(kind, tiny_pipe, controlnet, requires_safety_checker=False)
    pipe.scheduler = ddim_scheduler(tiny_pipe.scheduler)
    arguments = plan.pipeline_arguments(pipe)
    assert arguments.keys() <= inspect.signature(pipe.__call__).parameters.keys()
    from_noise = "strength" not in inspect.signature(pipe.__call__).parameters
    assert ("latents" in arguments) == (injected and from_noise)
    expected = {"latents": features.z_T} if injected and from_noise else {}
    with attach(pipe, plan):
        found = draw(pipe, **arguments)
        assert torch.equal(found, draw(pipe, prompt=PROMPT, guidance_scale=7.5, height=32, width=32, **expected))
        if kind is StableDiffusionInpaintPipeline and injected:
            from_template = draw(pipe, **plan.pipeline_arguments())
            assert (found - from_template).abs().max() > 1e-3


@pytest.mark.parametrize("strength", [0.25, 0.5, 1.0])
def test_windows_of_image_to_image_are_parts_of_the_whole_schedule(strength, tiny_pipe, concepts):
    """A concept whose window has passed where image-to-image begins is not seen at all."""
    pipe = make(StableDiffusionImg2ImgPipeline, tiny_pipe, requires_safety_checker=False)
    use = ConceptUse(concepts[0], window=(0.0, 0.5))
    plan = FusionPlan.build(tiny_pipe, [use], full_mask(), prompt=PROMPT, steps=STEPS)
    plain = draw(pipe, prompt=PROMPT, strength=strength)
    with attach(pipe, plan):
        found = draw(pipe, prompt=PROMPT, strength=strength)
    assert ((found - plain).abs().max() > 1e-3) == (strength > 0.5)
