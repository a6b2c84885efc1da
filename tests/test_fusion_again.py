"""`FusionSampler`: one plan after another in the same memory gives what each gives by itself."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import make_concept, make_pipeline, shallow

from weaver import WeaverError
from weaver.compiled import compile_whole
from weaver.features import collect_features
from weaver.fusion import ConceptUse, FusionPlan, FusionSampler, sample_fusion, stack_plans
from weaver.inversion import invert
from weaver.layers import InjectionSites
from weaver.schedule import ddim_scheduler

PROMPT, STEPS = "a dog and a cat, mountain", 5
SITES = InjectionSites("some", resnets=(3, 4), attentions=(4, 7), resnet_window=0.8, attention_window=0.4)


@pytest.fixture(scope="module")
def masks():
    masks = torch.zeros(2, 32, 32)
    masks[0, 8:, :16] = 1
    masks[1, :20, 16:] = 1
    return masks


@pytest.fixture(scope="module")
def templates(tiny_pipe):
    return make_templates(tiny_pipe)


@pytest.fixture(scope="module")
def plans(tiny_pipe, concepts, masks, templates):
    return make_plans(tiny_pipe, [concepts[i] for i in (0, 1, 4)], masks, templates)


def make_templates(pipe):
    noises = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    inversions = [invert(pipe, z[None], PROMPT, STEPS) for z in noises]
    return [collect_features(pipe, inversion, SITES) for inversion in inversions]


def make_plans(pipe, concepts, masks, templates):
    """A concept; two with lambda, a window and a negative prompt; another template, omega, background and prompt."""
    dog, cat, ground = map(ConceptUse, concepts)
    late = ConceptUse(concepts[1], window=(0.3, 0.7), strength=0.7, negative_prompt="ugly")
    first, second = ({"features": features} for features in templates)
    return [
        FusionPlan.build(pipe, [dog], masks[:1], prompt=PROMPT, **first),
        FusionPlan.build(pipe, [dog, late], masks, prompt=PROMPT, suppression=0.3, **first),
        FusionPlan.build(
            pipe, [cat], masks[1:], prompt="a red cat, mountain", background=ground, guidance=3.0, **second
        ),
    ]


def alone(pipe, plan, **options):
    scheduler = ddim_scheduler(pipe.scheduler)
    return sample_fusion(pipe.unet, plan.features.z_T, scheduler, plan, **options)


class Eager:
    """In the place of captured graphs: says which there would be, and that nothing they read or write has moved."""

    def __init__(self):
        self.places = {}

    def best(self, forward):
        return forward

    def follow(self, unet):
        pass

    def run(self, kind, call, written):
        places = tuple(tensor.data_ptr() for tensor in written)
        assert self.places.setdefault(kind, places) == places
        call()


@pytest.mark.parametrize("held", [False, True], ids=["", "as-for-graphs"])
def test_plans_take_turns(tiny_pipe, plans, held):
    expected = [alone(tiny_pipe, plan) for plan in plans]
    scheduler = ddim_scheduler(tiny_pipe.scheduler)
    sampler = FusionSampler(tiny_pipe.unet, scheduler, plans[0], capacity=2)
    eager = sampler._graphs = Eager() if held else None
    with sampler:
        contexts = [sampler._state.context_reads[path].kv.keys.data_ptr() for path in plans[0].keys_values]
        for i in (0, 1, 2, 1, 0):
            found = sampler(plans[i].features.z_T, plans[i])
            torch.testing.assert_close(found, expected[i], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(sampler(plans[0].features.z_T), expected[0], rtol=1e-10, atol=1e-10)
        assert contexts == [sampler._state.context_reads[path].kv.keys.data_ptr() for path in plans[0].keys_values]
    if held:  # both kinds of features, those of the ResNets, none
        assert sorted(len(paths) for _, paths in eager.places) == [0, 2, 2 + 2 * 2]
        assert {rows for rows, _ in eager.places} == {((0, 0), (1, 0))}
    assert not any(type(p).__module__.startswith("weaver") for p in tiny_pipe.unet.attn_processors.values())


def test_fresh_noise_each_time(tiny_pipe, plans):
    expected = [alone(tiny_pipe, plans[0], eta=0.5, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    sampler = FusionSampler(tiny_pipe.unet, ddim_scheduler(tiny_pipe.scheduler), plans[0], eta=0.5)
    sampler._graphs = Eager()
    with sampler:
        for seed, picture in zip((1, 2), expected, strict=True):
            found = sampler(plans[0].features.z_T, generator=torch.Generator().manual_seed(seed))
            torch.testing.assert_close(found, picture, rtol=1e-10, atol=1e-10)


def test_variants_take_turns(tiny_pipe, plans):
    pairs = [stack_plans([plans[i], plans[j]]) for i, j in ((0, 1), (1, 0))]
    with FusionSampler(tiny_pipe.unet, ddim_scheduler(tiny_pipe.scheduler), pairs[0], capacity=2) as sampler:
        first, second = (sampler(pair.features.z_T, pair) for pair in pairs)
    torch.testing.assert_close(first, second.flip(0), rtol=1e-10, atol=1e-10)


def test_plans_of_another_shape_are_refused_and_change_nothing(tiny_pipe, plans, masks, concepts, templates):
    expected = alone(tiny_pipe, plans[0])
    uses = [ConceptUse(concept) for concept in concepts[:2]]
    every = ("to_k", "to_v", "to_q", "to_out.0", "to_out.0.bias")
    others = {
        "steps differ": FusionPlan.build(tiny_pipe, prompt=PROMPT, steps=4),
        "size differ": FusionPlan.build(tiny_pipe, prompt=PROMPT, steps=STEPS, height=48),
        "variants differ": stack_plans(plans[:2]),
        "room for 1 concepts": FusionPlan.build(tiny_pipe, uses, masks, prompt=PROMPT, features=templates[0]),
        "inject features of other kinds": FusionPlan.build(tiny_pipe, prompt=PROMPT, steps=STEPS),
        "changes to_q or to_out": FusionPlan.build(
            tiny_pipe, [ConceptUse(make_concept(tiny_pipe, 1, "dog", changed=every))], masks[:1], prompt=PROMPT,
            features=templates[0],
        ),
        "negative row": FusionPlan.build(tiny_pipe, prompt=PROMPT, guidance=1.0, features=templates[0]),
    }  # fmt: skip
    with FusionSampler(tiny_pipe.unet, ddim_scheduler(tiny_pipe.scheduler), plans[0]) as sampler:
        for reason, plan in others.items():
            with pytest.raises(WeaverError, match=reason):
                sampler(templates[0].z_T, plan)
        with pytest.raises(WeaverError, match="z has 2 pictures, 1 are drawn at once"):
            sampler(templates[0].z_T.expand(2, -1, -1, -1))
        assert torch.equal(sampler(templates[0].z_T), expected)


def test_the_first_plan_has_its_room_after_smaller_ones(tiny_pipe, plans):
    small, large, _ = plans
    empty = FusionPlan.build(tiny_pipe, prompt=PROMPT, features=small.features)
    z, turns = small.features.z_T, (empty, small, large)
    expected = [alone(tiny_pipe, plan) for plan in turns]
    with FusionSampler(tiny_pipe.unet, ddim_scheduler(tiny_pipe.scheduler), large) as sampler:
        for plan, picture in zip(turns, expected, strict=True):
            torch.testing.assert_close(sampler(z, plan), picture, rtol=1e-9, atol=1e-9)


def test_it_draws_within_its_block_only(tiny_pipe, plans):
    sampler = FusionSampler(tiny_pipe.unet, ddim_scheduler(tiny_pipe.scheduler), plans[0])
    z = plans[0].features.z_T
    with pytest.raises(WeaverError, match="within its `with` block only"):
        sampler(z)
    with pytest.raises(WeaverError, match="takes another plan within its block"):
        sampler.take(plans[1])
    with sampler:
        sampler(z)
    with pytest.raises(WeaverError, match="within its `with` block only"):
        sampler(z)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": "2"}, "capacity is '2', expected a number"),
        ({"capacity": -5}, "capacity is -5"),
        ({"capacity": True}, "capacity is True"),
        ({"pictures": 0}, "pictures is 0, expected 1 or more"),
        ({"pictures": 1.5}, "pictures is 1.5"),
    ],
)
def test_numbers_that_cannot_be(tiny_pipe, plans, options, message):
    with pytest.raises(WeaverError, match=message):
        FusionSampler(tiny_pipe.unet, ddim_scheduler(tiny_pipe.scheduler), plans[0], **options)


def test_a_block_that_is_not_entered_leaves_nothing(tiny_pipe, plans, monkeypatch):
    sampler = FusionSampler(tiny_pipe.unet, ddim_scheduler(tiny_pipe.scheduler), plans[0])
    before = dict(tiny_pipe.unet.attn_processors)
    monkeypatch.setattr(sampler, "_hold", lambda plan: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sampler.__enter__()
    assert tiny_pipe.unet.attn_processors == before


@pytest.mark.parametrize("capacity", [None, 3], ids=["", "with-room"])
def test_other_masks_for_a_concept_that_changes_queries_and_outputs(tiny_pipe, masks, templates, capacity):
    every = ("to_k", "to_v", "to_q", "to_out.0", "to_out.0.bias")
    use = ConceptUse(make_concept(tiny_pipe, 1, "dog", changed=every))
    again = ConceptUse(make_concept(tiny_pipe, 2, "dog", changed=every))
    first, second, third = (
        FusionPlan.build(tiny_pipe, [of], masks[i : i + 1], prompt=PROMPT, suppression=0.1, features=templates[0])
        for i, of in ((0, use), (1, use), (0, again))
    )
    turns = (first, second, third, first)
    expected = [alone(tiny_pipe, plan) for plan in turns]
    sampler = FusionSampler(tiny_pipe.unet, ddim_scheduler(tiny_pipe.scheduler), first, capacity=capacity)
    with sampler:
        for plan, picture in zip(turns, expected, strict=True):
            torch.testing.assert_close(sampler(templates[0].z_T, plan), picture, rtol=1e-9, atol=1e-9)


def test_plans_of_another_unet_are_refused_and_change_nothing(tiny_pipe):
    """Other weights, other heads, another type; the texts are of one type."""
    one, heads, half = make_pipeline(seed=7), make_pipeline(), make_pipeline()
    heads.unet = type(heads.unet).from_config(heads.unet.config, attention_head_dim=4).double()
    half.unet.to(torch.float32)
    plan, *others = (
        FusionPlan.build(pipe, prompt=PROMPT, steps=2, height=32, width=32) for pipe in (tiny_pipe, one, heads, half)
    )
    z, messages = torch.ones(1, 4, 16, 16).double(), ("of the same shape", "is of another shape", "after moving")
    with FusionSampler(tiny_pipe.unet, ddim_scheduler(tiny_pipe.scheduler), plan) as sampler:
        expected = sampler(z)
        for other, message in zip(others, messages, strict=True):
            with pytest.raises(WeaverError, match=f"the sampler of another: the plan is .*{message}"):
                sampler(z, other)
        assert torch.equal(sampler(z), expected)


def test_graphs_need_a_gpu(tiny_pipe, plans):
    with pytest.raises(WeaverError, match="graphs need a CUDA device, the U-Net is on cpu"):
        FusionSampler(tiny_pipe.unet, ddim_scheduler(tiny_pipe.scheduler), plans[0], graphs=True)


@pytest.fixture
def forget():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@torch._dynamo.config.patch(recompile_limit=32)  # sizes of layers, times whether they are injected into
def test_repeated_blocks_compile_in_one_graph_and_not_again_for_other_plans(tiny_pipe, plans, forget):
    """Steps in and past the windows, other contexts and other masks; recompiling fails."""
    compiled = copy.deepcopy(tiny_pipe.unet)
    compiled.compile_repeated_blocks(fullgraph=True, backend="eager")

    def draw(unet, plan):
        return sample_fusion(unet, plan.features.z_T, ddim_scheduler(tiny_pipe.scheduler), plan)

    first, second, third = plans
    assert torch.equal(draw(compiled, second), draw(tiny_pipe.unet, second))
    assert torch.equal(draw(compiled, first), draw(tiny_pipe.unet, first))  # of fewer contexts: sizes may vary now
    with torch.compiler.set_stance("fail_on_recompile"):
        for plan in (third, second):
            assert torch.equal(draw(compiled, plan), draw(tiny_pipe.unet, plan))


class Compiling(Eager):
    """The same, compiled as a whole, into what PyTorch runs as it is."""

    def best(self, forward):
        return compile_whole(forward, backend="eager")


def test_the_whole_unet_compiles_with_all_a_plan_adds_once_for_each_set_of_sites(tiny_pipe, masks, forget):
    pipe, graphs = shallow(tiny_pipe, levels=3), torch._dynamo.utils.counters["stats"]
    people = [make_concept(pipe, number, word) for number, word in enumerate(("dog", "cat", "mountain"), start=1)]
    plans = make_plans(pipe, people, masks, make_templates(pipe))
    expected = [alone(pipe, plan) for plan in plans]
    sampler = FusionSampler(pipe.unet, ddim_scheduler(pipe.scheduler), plans[0], capacity=2)
    sampler._graphs, before = Compiling(), graphs["unique_graphs"]
    with sampler:
        for i in (0, 1, 2, 1, 0):
            found = sampler(plans[i].features.z_T, plans[i])
            torch.testing.assert_close(found, expected[i], rtol=1e-9, atol=1e-9)
            assert graphs["unique_graphs"] - before == 3  # ResNets and attention injected into, ResNets, nothing
    assert len(sampler._graphs.places) == 3


def test_the_whole_unet_compiles_with_projections_of_a_concept_s_own(tiny_pipe, masks, forget):
    pipe = shallow(tiny_pipe)
    every = ("to_k", "to_v", "to_q", "to_out.0", "to_out.0.bias")
    use = ConceptUse(make_concept(pipe, 1, "dog", changed=every))
    plan = FusionPlan.build(pipe, [use], masks[:1], prompt=PROMPT, suppression=0.1, steps=2)
    z, scheduler = torch.ones(1, 4, 16, 16).double(), ddim_scheduler(pipe.scheduler)
    expected = sample_fusion(pipe.unet, z, scheduler, plan)
    sampler = FusionSampler(pipe.unet, scheduler, plan)
    sampler._graphs = Compiling()
    with sampler:
        torch.testing.assert_close(sampler(z), expected, rtol=1e-9, atol=1e-9)
