"""A LoRA used whole: what it changes outside of cross-attention acts in its region, in the fused row alone."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from conftest import make_concept, make_pipeline, make_scheduler, make_whole, shallow
from paper_comparison import compare, make_templates
from paper_reference import Case, Sites
from pipeline_forms import draw
from test_formats_lora import PROMPT, kohya, saved, woven_latents
from test_fusion_again import Compiling, Eager
from torch import nn

from weaver import ConceptUse, FusionPlan, WeaverError, attach, sample_fusion, stack_plans
from weaver.concepts.formats import read_concept_file
from weaver.features import collect_features
from weaver.fusion import FusionSampler
from weaver.inversion import invert
from weaver.layers import has_region, output_size, sites_for
from weaver_kernels import LowRank

EVERYWHERE = ["to_k", "to_v", "to_q", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv_in", "conv_out", "conv"]


def make_lora(pipe, number: int, word: str, only: str = "", **options):
    """Keys, values and factors for every other module that has a region, or for those with `only` in their path."""
    places = (nn.Linear, nn.Conv2d)
    paths = [path for path, module in pipe.unet.named_modules() if isinstance(module, places) and has_region(path)]
    return make_whole(pipe, number, word, [path for path in paths if only in path], **options)


@pytest.fixture(scope="module")
def whole(tiny_pipe):
    return [make_lora(tiny_pipe, i + 1, word) for i, word in enumerate(("dog", "cat", "fox", "panda", "mountain"))]


def plan_of(pipe, concepts, **options):
    """A plan without guidance in which each concept has an upright stripe, with a margin around them."""
    masks = torch.zeros(len(concepts), 32, 32)
    for mask, columns in zip(masks, torch.arange(4, 28).chunk(len(concepts)), strict=True):
        mask[4:28, columns] = 1
    size = {"height": 32, "width": 32}
    return FusionPlan.build(pipe, concepts, masks, **{"prompt": "a dog and a cat", "guidance": 1.0} | size | options)


def sampled(pipe, plan, **options):
    noise = torch.randn(plan.variants, 4, 16, 16, generator=torch.manual_seed(0)).to(pipe.unet.dtype)
    return sample_fusion(pipe.unet, noise, pipe.scheduler, plan, **options)


templates = pytest.fixture(scope="module")(make_templates)

CASES = [
    Case("one", 1),
    Case("two-soft", 2, lam=0.5, soft=True, negative="ugly"),
    Case("background-scale", 2, background=True, scale=0.5, omega=1.0),
    Case("window-strength", 2, strengths=(0.6, 1.0, 1.0, 1.0, 1.0), windows={1: (0.4, 1.0)}),
    Case("not-square", 2, pixels=(48, 32)),
    Case("injected", 2, sites=Sites("some", resnets=(3, 4, 7), attentions=(4, 7, 9)), negative="blurry"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_is_each_change_inside_its_mask(tiny_pipe, whole, templates, case):
    compare(case, tiny_pipe, whole, templates)


@pytest.mark.parametrize(
    "part", ["attn1", "attn2", ".ff.", "proj_", "conv1", "conv2", "conv_shortcut", "time_emb", "sampler"]
)
def test_every_kind_of_module_counts(tiny_pipe, part):
    concept, plain = make_lora(tiny_pipe, 1, "dog", part), make_concept(tiny_pipe, 1, "dog")
    drawn = [sampled(tiny_pipe, plan_of(tiny_pipe, [each], steps=1)) for each in (concept, plain)]
    assert (drawn[0] - drawn[1]).abs().max() > 1e-3


@pytest.mark.parametrize("targets", [EVERYWHERE, EVERYWHERE + CONVOLUTIONS], ids=["linears", "convolutions"])
def test_over_the_whole_picture_it_is_what_diffusers_draws_with_it(tmp_path, targets):
    path = saved(make_pipeline(dtype=torch.float32), tmp_path, unet_targets=targets)
    stock = make_pipeline(dtype=torch.float32)
    plain = draw(stock, prompt=PROMPT, guidance_scale=1.0)
    stock.load_lora_weights(tmp_path, weight_name=path.name)
    expected = draw(stock, prompt=PROMPT, guidance_scale=1.0)
    found = woven_latents(make_pipeline(dtype=torch.float32), read_concept_file(path))
    assert (expected - plain).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_kohyas_too(tmp_path):
    path = saved(
        make_pipeline(dtype=torch.float32), tmp_path, unet_targets=EVERYWHERE, rank_pattern={}, alpha_pattern={}
    )
    pipe, stock = make_pipeline(dtype=torch.float32), make_pipeline(dtype=torch.float32)
    path = kohya(path)
    stock.load_lora_weights(tmp_path, weight_name=path.name)
    found = woven_latents(pipe, read_concept_file(path))
    torch.testing.assert_close(found, draw(stock, prompt=PROMPT, guidance_scale=1.0), rtol=1e-4, atol=1e-4)


def test_parts_restricts_it_to_cross_attention(tiny_pipe, whole):
    use = ConceptUse(whole[0], parts="cross-attention")
    plan, without = plan_of(tiny_pipe, [use]), plan_of(tiny_pipe, [replace(whole[0], outside={})])
    assert not plan.regional and not plan.regions and len(plan.own_projections) == len(plan.keys_values)
    assert {path.partition(".attn2.")[2] for path in without.regional} == {"to_q", "to_out.0"}
    assert not without.own_projections
    with pytest.raises(WeaverError, match="parts of c1 is 'half', expected one of whole, cross-attention"):
        plan_of(tiny_pipe, [ConceptUse(whole[0], parts="half")])


def test_afterwards_the_unet_is_as_it_was(tiny_pipe, whole):
    before = draw(tiny_pipe, prompt="a dog")
    with pytest.raises(RuntimeError, match="stop"), attach(tiny_pipe, plan := plan_of(tiny_pipe, whole[:2], steps=1)):
        tiny_pipe(**plan.pipeline_arguments(), output_type="latent")
        raise RuntimeError("stop")
    assert torch.equal(draw(tiny_pipe, prompt="a dog"), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny_pipe.unet.modules())


def test_variants_each_have_their_own(tiny_pipe, whole):
    """Also beside one that changes nothing but keys and values, and one of other modules and ranks."""
    other = make_lora(tiny_pipe, 2, "cat", "ff.net", rank=5)
    plans = [
        plan_of(tiny_pipe, each, steps=2)
        for each in ([whole[0], whole[1]], [make_concept(tiny_pipe, 3, "dog")], [other])
    ]
    together = sampled(tiny_pipe, stack_plans(plans))
    noise = torch.randn(3, 4, 16, 16, generator=torch.manual_seed(0)).double()
    for plan, z, found in zip(plans, noise.split(1), together.split(1), strict=True):
        alone = sample_fusion(tiny_pipe.unet, z, tiny_pipe.scheduler, plan)
        torch.testing.assert_close(found, alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("held", [False, True], ids=["", "as-for-graphs"])
def test_a_sampler_takes_other_changes_of_the_same_modules(tiny_pipe, whole, held):
    other = make_lora(tiny_pipe, 2, "dog", rank=2 if held else 4)
    plans = [plan_of(tiny_pipe, [each], steps=2) for each in (whole[0], other)]
    noise = torch.randn(1, 4, 16, 16, generator=torch.manual_seed(0)).double()
    expected = [sample_fusion(tiny_pipe.unet, noise, tiny_pipe.scheduler, plan) for plan in plans]
    sampler = FusionSampler(tiny_pipe.unet, tiny_pipe.scheduler, plans[0])
    sampler._graphs = Eager() if held else None
    with sampler:
        factors = next(iter(sampler._state.regions.reads.values())).stack.down.data_ptr()
        for plan, picture in zip([*plans, plans[0]], [*expected, expected[0]], strict=True):
            torch.testing.assert_close(sampler(noise, plan), picture, rtol=1e-10, atol=1e-10)
            stays = factors == next(iter(sampler._state.regions.reads.values())).stack.down.data_ptr()
            assert stays == held or plan is plans[0]
        with pytest.raises(WeaverError, match="the plans' do not change the same modules"):
            sampler(noise, plan_of(tiny_pipe, [make_lora(tiny_pipe, 2, "dog", "attn1")], steps=2))
        if held:
            with pytest.raises(WeaverError, match="graphs hold the ranks of a LoRA"):
                sampler(noise, plan_of(tiny_pipe, [make_lora(tiny_pipe, 2, "dog", rank=4)], steps=2))


def test_the_whole_unet_compiles_with_it(tiny_pipe):
    """As one graph for all steps, and for other changes of the same ranks."""
    pipe = shallow(tiny_pipe)
    plans = [plan_of(pipe, [make_lora(pipe, number, "dog", "mid_block")], steps=2) for number in (1, 2)]
    noise = torch.randn(1, 4, 16, 16, generator=torch.manual_seed(0)).double()
    expected = [sample_fusion(pipe.unet, noise, pipe.scheduler, plan) for plan in plans]
    sampler, counted = (
        FusionSampler(pipe.unet, pipe.scheduler, plans[0]),
        torch._dynamo.utils.counters["stats"],
    )
    sampler._graphs, before = Compiling(), counted["unique_graphs"]
    torch.compiler.reset()
    with sampler:
        for plan, picture in zip(plans, expected, strict=True):
            torch.testing.assert_close(sampler(noise, plan), picture, rtol=1e-9, atol=1e-9)
            assert counted["unique_graphs"] - before == 1
    torch.compiler.reset()


@pytest.mark.parametrize("kind", ["stored", "replayed"])
def test_the_template_is_the_base_models(tiny_pipe, whole, kind):
    """Where features are drawn again at each step, the changes stand aside for them."""
    pipe = copy.copy(tiny_pipe)
    pipe.scheduler = make_scheduler("epsilon")
    z = torch.randn(1, 4, 16, 16, generator=torch.manual_seed(5)).double()
    inversion = invert(pipe, z, "a dog and a cat", 3)
    found = [collect_features(pipe, inversion, sites_for(pipe.unet), kind=each) for each in (kind, "stored")]
    drawn = [sampled(pipe, plan_of(pipe, whole[:2], features=features)) for features in found]
    torch.testing.assert_close(drawn[0], drawn[1], rtol=1e-10, atol=1e-10)


def test_under_a_style(tmp_path):
    """An adapter that is loaded into the pipeline draws the whole picture, and the concept's changes come to it."""
    path = saved(make_pipeline(dtype=torch.float32), tmp_path, unet_targets=EVERYWHERE)
    stock, styled = (make_pipeline(dtype=torch.float32) for _ in range(2))
    parsed = read_concept_file(path)
    for each, names in ((stock, ["a", "b"]), (styled, ["a"])):
        for name in names:
            each.load_lora_weights(tmp_path, weight_name=path.name, adapter_name=name)
        each.set_adapters(names, [0.5] * len(names))
    found = woven_latents(styled, replace(parsed, text_deltas={}), scale=0.5)
    stock.text_encoder.set_adapter("a")
    torch.testing.assert_close(found, draw(stock, prompt=PROMPT, guidance_scale=1.0), rtol=1e-4, atol=1e-4)


def test_what_does_not_fit(tiny_pipe, whole):
    odd = {"mid_block.resnets.0.conv1": LowRank(torch.ones(2, 8, 3, 3), torch.ones(16, 2, 1, 1))}
    concept = replace(whole[0], outside=dict(whole[0].outside) | odd)
    with pytest.raises(
        WeaverError, match="1 of the .* changes that c1 makes outside cross-attention do not fit the U-Net"
    ):
        plan_of(tiny_pipe, [concept])
    assert plan_of(tiny_pipe, [ConceptUse(concept, parts="cross-attention")])
    absent = replace(concept, outside={"down_blocks.7.resnets.0.conv1": odd["mid_block.resnets.0.conv1"]})
    with pytest.raises(WeaverError, match="down_blocks.7.resnets.0.conv1 among them"):
        plan_of(tiny_pipe, [absent])


def test_compiled_blocks_would_leave_it_out(tiny_pipe, whole):
    pipe = make_pipeline()
    plan = plan_of(pipe, [make_lora(pipe, 1, "dog")])
    block = pipe.unet.mid_block.attentions[0].transformer_blocks[0]
    block.compile()
    message = "transformer_blocks.0 is compiled, which leaves out what concepts change in it"
    with pytest.raises(WeaverError, match=message), attach(pipe, plan):
        pass


@pytest.mark.parametrize("path", ["time_embedding.linear_1", "add_embedding.linear_2", "down_blocks.0.resnets.0.norm1"])
def test_what_has_no_region(path):
    assert not has_region(path)


def test_where_outputs_lie(tiny_pipe):
    found, hooks = {}, []
    unet, size = tiny_pipe.unet, (11, 6)
    for path, module in unet.named_modules():
        if (
            has_region(path)
            and isinstance(module, nn.Linear | nn.Conv2d)
            and "time_emb" not in path
            and "to_k" not in path
        ):
            hooks.append(
                module.register_forward_hook(lambda m, args, output, path=path: found.update({path: output.shape}))
            )
    with torch.no_grad():
        unet(torch.zeros(1, 4, *size).double(), 1, torch.zeros(1, 16, 16).double())
    for hook in hooks:
        hook.remove()
    assert len(found) > 100
    for path, shape in found.items():
        if ".attn2.to_v" not in path:
            height, width = output_size(path, 4, size)
            assert tuple(shape[2:]) == (height, width) if len(shape) == 4 else shape[1] == height * width, path
