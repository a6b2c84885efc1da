"""`sample_fusion` gives what the stock pipeline gives under `attach`, to the last bit."""

from __future__ import annotations

import dataclasses
import inspect
from contextlib import ExitStack

import pytest
import torch
from conftest import make_concept, make_pipeline
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)

from weaver import WeaverError
from weaver.concepts.concept import attn2_hash
from weaver.features import collect_features
from weaver.fusion import ConceptUse, FusionPlan, attach, sample_fusion
from weaver.inversion import invert
from weaver.layers import EMBEDDED, InjectionSites
from weaver.schedule import ddim_scheduler

PROMPT = "a dog and a cat, mountain"


@pytest.fixture(scope="module")
def uses_and_masks(concepts):
    masks = torch.zeros(2, 32, 32)
    masks[0, 8:, :16] = 1
    masks[1, :20, 16:] = 1
    return [ConceptUse(concepts[0], window=(0.0, 0.7)), ConceptUse(concepts[1], strength=0.8)], masks


@pytest.mark.parametrize("guidance", [5.0, 1.0])
@pytest.mark.parametrize("injected", ["stored", "replayed", "inversion", None])
def test_same_numbers_as_the_stock_pipeline(tiny_pipe, uses_and_masks, guidance, injected):
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    features = None
    if injected:
        inversion = invert(tiny_pipe, z, PROMPT, 4)
        features, z = collect_features(tiny_pipe, inversion, EMBEDDED, kind=injected), inversion.z_T
    arguments = {"negative_prompt": "ugly", "suppression": 0.2, "guidance": guidance, "features": features, "steps": 4}
    plan = FusionPlan.build(tiny_pipe, *uses_and_masks, prompt=PROMPT, **arguments)
    done = []
    ours = sample_fusion(
        tiny_pipe.unet,
        z,
        ddim_scheduler(tiny_pipe.scheduler),
        plan,
        progress=lambda *step: done.append(step),
    )
    arguments = plan.pipeline_arguments() | {"latents": z, "output_type": "latent"}
    with attach(tiny_pipe, plan):
        assert torch.equal(ours, tiny_pipe(**arguments).images)
    assert done == [(i, 4) for i in range(1, 5)]


def test_fresh_noise_is_the_stock_pipeline_s_too(tiny_pipe, uses_and_masks):
    plan = FusionPlan.build(tiny_pipe, *uses_and_masks, prompt=PROMPT, steps=4)
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    scheduler = ddim_scheduler(tiny_pipe.scheduler)

    def draw(eta, seed):
        noise = torch.Generator().manual_seed(seed)
        return sample_fusion(tiny_pipe.unet, z, scheduler, plan, eta=eta, generator=noise)

    with attach(tiny_pipe, plan):
        arguments = plan.pipeline_arguments() | {"latents": z, "output_type": "latent"}
        stock = tiny_pipe(**arguments, eta=0.6, generator=torch.Generator().manual_seed(3)).images
    assert torch.equal(draw(0.6, 3), stock) and not torch.equal(draw(0.6, 4), stock)
    assert torch.equal(draw(0.0, 3), draw(0, 4))
    for wrong in (-0.1, 1.5, "1", True, float("nan")):
        with pytest.raises(WeaverError, match="eta: is .*, expected 0"):
            draw(wrong, 0)


def test_several_noises_at_once(tiny_pipe, uses_and_masks):
    plan = FusionPlan.build(tiny_pipe, *uses_and_masks, prompt=PROMPT, steps=2)
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1)).double()
    scheduler = ddim_scheduler(tiny_pipe.scheduler)
    together = sample_fusion(tiny_pipe.unet, noise, scheduler, plan)
    alone = torch.cat([sample_fusion(tiny_pipe.unet, z[None], scheduler, plan) for z in noise])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)


def test_every_part_moves_the_result(tiny_pipe, concepts, uses_and_masks):
    """Nothing that is asked for is dropped in silence."""
    uses, masks = uses_and_masks
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    features = collect_features(tiny_pipe, invert(tiny_pipe, z, PROMPT, 2), EMBEDDED, reconstruct=False)
    scheduler = ddim_scheduler(tiny_pipe.scheduler)

    def draw(**changes):
        arguments = {"concepts": uses, "masks": masks, "prompt": PROMPT, "steps": 2} | changes
        return sample_fusion(tiny_pipe.unet, z, scheduler, FusionPlan.build(tiny_pipe, **arguments))

    plain = draw()
    for changes in (
        {"suppression": 0.1},
        {"guidance": 7.0},
        {"negative_prompt": "ugly"},
        {"features": features},
        {"background": ConceptUse(concepts[4])},
        {"masks": masks.roll(4, 1)},
        {"concepts": [ConceptUse(concepts[0], strength=0.9), uses[1]]},
        {"concepts": [ConceptUse(concepts[0], window=(0.5, 1.0)), uses[1]]},
        {"concepts": [ConceptUse(concepts[0], window=(0.0, 0.7), scale=0.9), uses[1]]},
        {"concepts": [ConceptUse(concepts[0], "a <v1> fox", window=(0.0, 0.7)), uses[1]]},
    ):
        assert (draw(**changes) - plain).abs().max() > 1e-3 * plain.abs().max(), changes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lower_precision(tiny_pipe, uses_and_masks, dtype):
    """Every stage in the model's own dtype, near what float64 gives."""
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    sites = InjectionSites("all", resnets=(4,), attentions=(4, 7, 9), resnet_window=1.0, attention_window=1.0)

    def draw(pipe, uses):
        inversion = invert(pipe, z, PROMPT, 2)
        features = collect_features(pipe, inversion, sites)
        amounts = {"suppression": 0.2, "guidance": 2.0}
        plan = FusionPlan.build(pipe, uses, uses_and_masks[1], prompt=PROMPT, features=features, **amounts)
        return sample_fusion(pipe.unet, inversion.z_T, ddim_scheduler(pipe.scheduler), plan)

    truth = draw(tiny_pipe, uses_and_masks[0])
    pipe = make_pipeline("epsilon", dtype)
    ours = draw(pipe, [dataclasses.replace(use, concept=rebased(use.concept, pipe)) for use in uses_and_masks[0]])
    assert ours.dtype == dtype
    error = (ours.double() - truth).norm() / (truth - z).norm()
    assert error < (1e-5 if dtype == torch.float32 else 0.1)


def test_a_text_encoder_of_more_bits_than_the_unet(tiny_pipe, uses_and_masks):
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))

    def draw(pipe, uses):
        plan = FusionPlan.build(pipe, uses, uses_and_masks[1], prompt=PROMPT, steps=2, suppression=0.2, guidance=2.0)
        return sample_fusion(pipe.unet, z.to(pipe.unet.dtype), ddim_scheduler(pipe.scheduler), plan)

    truth = draw(tiny_pipe, uses_and_masks[0])
    pipe = make_pipeline()
    pipe.unet.to(torch.bfloat16)
    ours = draw(pipe, [dataclasses.replace(use, concept=rebased(use.concept, pipe)) for use in uses_and_masks[0]])
    assert ours.dtype == torch.bfloat16
    assert (ours.double() - truth).norm() < 0.1 * (truth - z).norm()


EVERY = ("to_k", "to_v", "to_q", "to_out.0", "to_out.0.bias")


@pytest.mark.parametrize(
    ("changed", "norms"), [(EVERY[:2], None), (EVERY, torch.float32)], ids=["keys", "every-as-on-a-gpu"]
)
def test_autocast_moves_the_result_as_little_as_its_type_does(pipe, uses_and_masks, changed, norms):
    """Of a U-Net in float32: products in 16 bits, and on a GPU layer norms in 32; within it plans and prompts too."""
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    uses = [ConceptUse(make_concept(pipe, i, word, changed=changed)) for i, word in ((1, "dog"), (2, "cat"))]
    features = collect_features(pipe, invert(pipe, z, PROMPT, 2), EMBEDDED)
    arguments = {"prompt": PROMPT, "suppression": 0.2, "guidance": 2.0, "features": features}
    call = {"num_inference_steps": 2, "guidance_scale": 2.0, "latents": features.z_T, "output_type": "latent"}

    def draw(plan):
        ours = sample_fusion(pipe.unet, features.z_T, ddim_scheduler(pipe.scheduler), plan)
        with attach(pipe, plan):
            return ours, pipe(PROMPT, **call).images

    plan = FusionPlan.build(pipe, uses, uses_and_masks[1], **arguments)
    truth, _ = draw(plan)
    with ExitStack() as undo:
        for path, module in pipe.unet.named_modules():
            if norms is not None and path.endswith(".norm2") and isinstance(module, torch.nn.LayerNorm):
                undo.callback(module.register_forward_hook(lambda module, args, output: output.to(norms)).remove)
        undo.enter_context(torch.autocast("cpu", torch.bfloat16))
        within = FusionPlan.build(pipe, uses, uses_and_masks[1], **arguments)
        for ours in (*draw(plan), *draw(within)):
            assert 0 < (ours - truth).norm() < 0.1 * (truth - features.z_T).norm()


def rebased(concept, pipe):
    """The concept for the same base in another dtype, which bfloat16 rounds to another hash."""
    return dataclasses.replace(concept, base_hash=attn2_hash(pipe.unet))


@pytest.mark.parametrize("processors", ["own", "sliced"])
def test_replayed_features_give_the_same_picture(tiny_pipe, uses_and_masks, processors):
    """Bit for bit, for several rows at once, and on the attention that the user chose."""
    sites = InjectionSites("some", resnets=(3, 4), attentions=(4, 7), resnet_window=0.75, attention_window=0.5)
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    before = dict(tiny_pipe.unet.attn_processors)
    if processors == "sliced":
        tiny_pipe.enable_attention_slicing(1)
    try:
        inversion = invert(tiny_pipe, z, PROMPT, 4)
        pictures = []
        for kind in ("stored", "replayed", "inversion"):
            features = collect_features(tiny_pipe, inversion, sites, kind=kind)
            plan = FusionPlan.build(tiny_pipe, *uses_and_masks, prompt=PROMPT, features=features)
            scheduler = ddim_scheduler(tiny_pipe.scheduler)
            pictures.append(sample_fusion(tiny_pipe.unet, inversion.z_T.expand(2, -1, -1, -1), scheduler, plan))
    finally:
        tiny_pipe.unet.set_attn_processor(before)
    assert torch.equal(pictures[0], pictures[1])
    assert (pictures[0] - pictures[2]).abs().max() > 1e-4


@pytest.mark.parametrize(
    "kind",
    [
        PNDMScheduler,
        HeunDiscreteScheduler,
        KDPM2DiscreteScheduler,
        EulerDiscreteScheduler,
        EulerAncestralDiscreteScheduler,
        DPMSolverMultistepScheduler,
        LCMScheduler,
    ],
)
def test_every_scheduler_draws_as_the_stock_pipeline_has_it(tiny_pipe, uses_and_masks, kind):
    """Also those that call the U-Net more often than there are steps, and those that draw noise of their own."""
    plan = FusionPlan.build(tiny_pipe, *uses_and_masks, prompt=PROMPT, steps=5)
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    scheduler = kind.from_config(tiny_pipe.scheduler.config)
    ours = sample_fusion(tiny_pipe.unet, z, scheduler, plan, generator=torch.Generator().manual_seed(3))
    own, tiny_pipe.scheduler = tiny_pipe.scheduler, scheduler
    try:
        with attach(tiny_pipe, plan):
            arguments = plan.pipeline_arguments() | {"latents": z, "output_type": "latent"}
            stock = tiny_pipe(**arguments, generator=torch.Generator().manual_seed(3)).images
    finally:
        tiny_pipe.scheduler = own
    assert torch.equal(ours, stock)
    if "eta" not in inspect.signature(scheduler.step).parameters:
        with pytest.raises(WeaverError, match="eta is 0.5, which a"):
            sample_fusion(tiny_pipe.unet, z, scheduler, plan, eta=0.5)


@pytest.mark.parametrize(
    ("z", "message"),
    [
        (torch.zeros(1, 4, 8, 32).double(), r"z is \[1, 4, 8, 32\], expected \[n, 4, 16, 16\]"),
        (torch.zeros(4, 16, 16).double(), r"z is \[4, 16, 16\], expected"),
        (torch.zeros(1, 3, 16, 16).double(), "expected"),
        (torch.zeros(1, 4, 16, 16), "torch.float32 on cpu, the U-Net torch.float64 on cpu"),
        (None, "z is a NoneType"),
    ],
)
def test_a_z_that_does_not_fit_is_an_error(tiny_pipe, uses_and_masks, z, message):
    plan = FusionPlan.build(tiny_pipe, *uses_and_masks, prompt=PROMPT, steps=2)
    with pytest.raises(WeaverError, match=message):
        sample_fusion(tiny_pipe.unet, z, ddim_scheduler(tiny_pipe.scheduler), plan)
    with pytest.raises(WeaverError, match="a NoneType: make it by"):
        sample_fusion(tiny_pipe.unet, z, ddim_scheduler(tiny_pipe.scheduler), None)
