"""What of a fusion only a GPU shows: steps in CUDA graphs, no wait for the device, features from the host's memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import WORDS_OF_CONCEPTS, make_concept, make_pipeline
from diffusers import (
    EulerAncestralDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
)
from pipeline_forms import controlnet_of, draw, make

from weaver import attach, weave
from weaver.features import collect_features
from weaver.fusion import ConceptUse, FusionPlan, FusionSampler, sample_fusion
from weaver.graphs import CUDAGraphs
from weaver.inversion import invert
from weaver.layers import InjectionSites
from weaver.schedule import ddim_scheduler

pytestmark = pytest.mark.gpu
PROMPT, STEPS = "a dog and a cat, mountain", 5
SITES = InjectionSites("some", resnets=(3, 4), attentions=(4, 7), resnet_window=0.8, attention_window=0.4)


@pytest.fixture(scope="module", autouse=True)
def whole_float32():
    """Convolutions of float32 as such: compiled ones are others, and TF32 would tell them apart."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cudnn, "allow_tf32", False)
        yield


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
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)  # other kernels in float32


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
    kept = [x for step in features.tensors for x in step.values()]
    assert all(x.is_pinned() for x in kept) and bool(kept) == (kind == "stored")
    masks = torch.zeros(1, 32, 32)
    masks[0, 8:, :16] = 1
    concept = make_concept(pipe, 1, "dog")
    plan = FusionPlan.build(pipe, [ConceptUse(concept)], masks, prompt=PROMPT, features=features)
    close(sample_fusion(pipe.unet, features.z_T, scheduler, plan), expected)


@pytest.fixture
def replays(monkeypatch):
    """Grows by one at every replay of a graph."""
    made, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (made.append(1), replay(graph))[1])
    return made


def plain_plan(pipe, *uses):
    masks = torch.zeros(len(uses), 32, 32)
    masks[0, 8:, :16] = 1
    masks[1:, :20, 16:] = 1
    return FusionPlan.build(pipe, uses, masks, prompt=PROMPT, negative_prompt="ugly", steps=4)


FORMS = {
    "ancestral": (None, EulerAncestralDiscreteScheduler),
    "outputs kept": (None, PNDMScheduler),
    "img2img": (StableDiffusionImg2ImgPipeline, None),
    "controlnet": (StableDiffusionControlNetPipeline, None),
}


@pytest.mark.parametrize("form", FORMS)
def test_an_attached_pipeline_replays_its_forwards(pipe, form, replays):
    kind, scheduler = FORMS[form]
    concepts = [make_concept(pipe, i + 1, word) for i, word in enumerate(WORDS_OF_CONCEPTS[:2])]
    plan = plain_plan(pipe, ConceptUse(concepts[0]), ConceptUse(concepts[1], window=(0.3, 0.7), strength=0.7))
    used = make(kind or type(pipe), pipe, controlnet_of(pipe.unet), requires_safety_checker=False)
    used.scheduler = (scheduler or type(pipe.scheduler)).from_config(pipe.scheduler.config)
    arguments = plan.pipeline_arguments(used)

    def each(**options):
        with attach(used, plan, **options):
            for number in (1, 2, 1):  # of pictures: other rows, and the first ones again
                yield draw(used, **arguments | {"num_images_per_prompt": number})

    expected = list(each())
    assert not replays
    for ours, theirs in zip(each(graphs=True), expected, strict=True):
        close(ours, theirs)
    assert len(replays) >= 3 * 3 and "forward" not in vars(pipe.unet)


@pytest.mark.parametrize("kind", ["stored", "replayed"])
def test_an_attached_pipeline_replays_injected_steps(pipe, plans, kind, replays):
    inversion, _ = plans
    features = collect_features(pipe, inversion, SITES, kind=kind)
    plan = FusionPlan.build(pipe, prompt=PROMPT, features=features)
    used = make(type(pipe), pipe, requires_safety_checker=False)
    used.scheduler = ddim_scheduler(pipe.scheduler)
    arguments = plan.pipeline_arguments() | {"latents": features.z_T, "output_type": "latent"}
    with attach(used, plan):
        expected = used(**arguments).images
    with attach(used, plan, graphs=True):
        for _ in range(2):
            close(used(**arguments).images, expected)
    assert len(replays) == 2 * STEPS


@pytest.mark.parametrize("how", ["sample_fusion", "attach"])
def test_own_queries_and_outputs_are_captured_too(pipe, how, replays):
    concepts = [
        make_concept(pipe, 1, "dog", changed=("to_k", "to_v", "to_q", "to_out.0")),
        make_concept(pipe, 2, "cat"),
    ]
    plan = plain_plan(pipe, *map(ConceptUse, concepts))
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).cuda()
    scheduler = ddim_scheduler(pipe.scheduler)
    expected = sample_fusion(pipe.unet, z, scheduler, plan)
    if how == "attach":
        used = make(type(pipe), pipe, requires_safety_checker=False)
        used.scheduler = scheduler
        with attach(used, plan, graphs=True):
            found = used(**plan.pipeline_arguments(), latents=z, output_type="latent").images
    else:
        found = sample_fusion(pipe.unet, z, scheduler, plan, graphs=True)
    close(found, expected)
    assert len(replays) == 4


def test_inversion_and_features_by_graphs(pipe, plans, replays):
    expected, _ = plans
    graphs = CUDAGraphs()
    for _ in range(2):
        inversion = invert(pipe, expected.z_0, PROMPT, STEPS, graphs=graphs)
        close(inversion.latents, expected.latents)
        for kind in ("stored", "inversion"):
            ours = collect_features(pipe, inversion, SITES, kind=kind, graphs=graphs)
            theirs = collect_features(pipe, inversion, SITES, kind=kind)
            for step, others in zip(ours.tensors, theirs.tensors, strict=True):
                assert step.keys() == others.keys()
                for path, feature in step.items():
                    close(feature, others[path])
    assert len(graphs) == 1 + 2 + 2  # whole; whole and with features of two kinds; cut after them
    assert len(replays) == 2 * (STEPS + STEPS + 4 + STEPS)


def test_weave_by_graphs(pipe, replays):
    concepts = [make_concept(pipe, i + 1, word) for i, word in enumerate(WORDS_OF_CONCEPTS[:2])]
    masks = torch.zeros(2, 32, 32)
    masks[0, 8:, :16] = masks[1, :20, 16:] = 1
    options = {"masks": masks, "sites": SITES, "steps": STEPS, "template_steps": STEPS}
    expected = weave(pipe, PROMPT, concepts, **options)
    assert not replays
    found = weave(pipe, PROMPT, concepts, **options, graphs=True)
    assert len(replays) == 4 * STEPS  # template, inversion, features, fusion
    for name in ("template", "image"):
        ours, theirs = (torch.tensor(np.asarray(getattr(x, name))).float() for x in (found, expected))
        assert (ours - theirs).abs().mean() < 1  # of 255


@torch._dynamo.config.patch(recompile_limit=64)
def test_repeated_blocks_compiled(pipe, plans, replays):
    _, (first, _) = plans
    scheduler = ddim_scheduler(pipe.scheduler)
    expected = sample_fusion(pipe.unet, first.features.z_T, scheduler, first)
    compiled = make_pipeline(dtype=torch.float32).to("cuda")
    compiled.unet.compile_repeated_blocks(fullgraph=True)
    for graphs in (False, True):
        close(sample_fusion(compiled.unet, first.features.z_T, scheduler, first, graphs=graphs), expected)
    assert len(replays) == STEPS


def test_the_whole_unet_compiled_and_captured(pipe, plans):
    """Inversion, features, fusion of one plan and the next, and an attached pipeline; one kind of step each."""
    inversion, _ = plans
    sites = InjectionSites("one kind", resnets=(3,), attentions=(4,), resnet_window=1.0, attention_window=1.0)
    graphs, scheduler = CUDAGraphs(compiled=True), ddim_scheduler(pipe.scheduler)
    close(invert(pipe, inversion.z_0, PROMPT, STEPS, graphs=graphs).latents, inversion.latents)
    features, expected = (collect_features(pipe, inversion, sites, graphs=how) for how in (graphs, None))
    for ours, theirs in zip(features.tensors, expected.tensors, strict=True):
        assert ours.keys() == theirs.keys()
        for path, tensor in ours.items():
            close(tensor, theirs[path])
    concepts = [ConceptUse(make_concept(pipe, i + 1, word)) for i, word in enumerate(WORDS_OF_CONCEPTS[:2])]
    options = {"prompt": PROMPT, "features": expected}
    masks = torch.zeros(1, 32, 32)
    masks[0, 8:, :16] = 1
    first, second = (FusionPlan.build(pipe, [use], masks, **options) for use in concepts)
    pictures = [sample_fusion(pipe.unet, expected.z_T, scheduler, plan) for plan in (first, second)]
    with FusionSampler(pipe.unet, scheduler, first, graphs=CUDAGraphs(compiled=True)) as sampler:
        for plan, picture in zip((first, second, first), (*pictures, pictures[0]), strict=True):
            close(sampler(expected.z_T, plan), picture)
    used = make(type(pipe), pipe, requires_safety_checker=False)
    used.scheduler = scheduler
    arguments = first.pipeline_arguments() | {"latents": expected.z_T, "output_type": "latent"}
    with attach(used, first, graphs=CUDAGraphs(compiled=True)):
        for _ in range(2):
            close(used(**arguments).images, pictures[0])
