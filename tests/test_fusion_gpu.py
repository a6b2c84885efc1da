"""What of a fusion only a GPU shows: steps in CUDA graphs, no wait for the device, features from the host's memory."""

from __future__ import annotations

import pytest
import torch
from conftest import WORDS_OF_CONCEPTS, make_concept, make_pipeline

from weaver.features import collect_features
from weaver.fusion import ConceptUse, FusionPlan, FusionSampler, sample_fusion
from weaver.inversion import invert
from weaver.layers import InjectionSites
from weaver.schedule import ddim_scheduler

pytestmark = pytest.mark.gpu
PROMPT, STEPS = "a dog and a cat, mountain", 5
SITES = InjectionSites("some", resnets=(3, 4), attentions=(4, 7), resnet_window=0.8, attention_window=0.4)


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline(dtype=torch.float32).to("cuda")


@pytest.fixture(scope="module")
def plans(pipe):
    concepts = [make_concept(pipe, i + 1, word) for i, word in enumerate(WORDS_OF_CONCEPTS)]
    masks = torch.zeros(2, 32, 32)
    masks[0, 8:, :16] = masks[1, :20, 16:] = 1
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).cuda()
    inversion = invert(pipe, z, PROMPT, STEPS)
    features = collect_features(pipe, inversion, SITES)
    uses = [ConceptUse(concepts[0]), ConceptUse(concepts[1], window=(0.3, 0.7), negative_prompt="ugly")]
    return inversion, [
        FusionPlan.build(pipe, uses[: i + 1], masks[: i + 1], prompt=PROMPT, suppression=0.2 * i, features=features)
        for i in range(2)
    ]


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)  # TF32 and other kernels in float32


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_captured_steps_give_the_same_pictures(pipe, plans, eta):
    _, (first, second) = plans
    scheduler = ddim_scheduler(pipe.scheduler)
    z = first.features.z_T

    def noise():
        return torch.Generator().manual_seed(3)

    expected = [sample_fusion(pipe.unet, z, scheduler, plan, eta=eta, generator=noise()) for plan in (first, second)]
    with FusionSampler(pipe.unet, scheduler, first, capacity=2, eta=eta, graphs=True) as sampler:
        close(sampler(z, first, generator=noise()), expected[0])
        assert len(sampler._graphs) == 3  # all features, those of the ResNets, none
        for plan, picture in ((second, expected[1]), (first, expected[0])):
            close(sampler(z, plan, generator=noise()), picture)
        assert len(sampler._graphs) == 3


@pytest.mark.parametrize("graphs", [True, False])
def test_no_step_waits_for_the_device(pipe, plans, graphs):
    _, (first, _) = plans
    with FusionSampler(pipe.unet, ddim_scheduler(pipe.scheduler), first, graphs=graphs) as sampler:
        z = first.features.z_T
        sampler(z)

        def forbid(done, steps):
            torch.cuda.set_sync_debug_mode("error" if done < steps else "default")

        try:
            sampler(z, progress=forbid)  # the first step begins a run, and may wait
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", ["stored", "replayed"])
def test_features_from_the_host_s_memory_give_the_same_picture(pipe, plans, kind):
    inversion, (first, _) = plans
    scheduler = ddim_scheduler(pipe.scheduler)
    expected = sample_fusion(pipe.unet, first.features.z_T, scheduler, first)
    features = collect_features(pipe, inversion, SITES, kind=kind, storage="cpu")
    assert all(x.is_pinned() for step in features.tensors for x in step.values()) and bool(features.tensors) == (
        kind == "stored"
    )
    masks = torch.zeros(1, 32, 32)
    masks[0, 8:, :16] = 1
    concept = make_concept(pipe, 1, "dog")
    plan = FusionPlan.build(pipe, [ConceptUse(concept)], masks, prompt=PROMPT, features=features)
    close(sample_fusion(pipe.unet, features.z_T, scheduler, plan), expected)
