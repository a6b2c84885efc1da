"""A plan is whole and right, or one error that says everything that is wrong."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack

import pytest
import torch
from PIL import Image

from weaver import WeaverError
from weaver.concepts import concept as concept_module
from weaver.features import collect_features
from weaver.fusion import ConceptUse, FusionPlan, attach, contexts
from weaver.inversion import invert
from weaver.layers import PAPER

PROMPT = "a dog and a cat, mountain"


@pytest.fixture(scope="module")
def masks():
    masks = torch.zeros(2, 32, 32)
    masks[0, :, :16] = 1
    masks[1, :, 20:] = 1
    return masks


@pytest.fixture(scope="module")
def features(tiny_pipe):
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    return collect_features(tiny_pipe, invert(tiny_pipe, z, PROMPT, 3), PAPER, reconstruct=False)


def build(pipe, uses, masks, **arguments):
    return FusionPlan.build(pipe, uses, masks, **({"prompt": PROMPT} | arguments))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps: is 0, expected a whole number from 1 to 999"),
        ({"steps": 2.5}, "steps: is 2.5"),
        ({"steps": 1001}, "steps: is 1001, expected a whole number from 1 to 999"),
        ({"height": 30}, "size: is 32x30, expected multiples of 8"),
        ({"suppression": -0.1}, "suppression: is -0.1"),
        ({"suppression": float("nan")}, "suppression: is nan"),
        ({"masks": None}, "no masks for the 2 concepts"),
        ({"masks": torch.zeros(1, 32, 32)}, r"expected \[2 or 3, height, width\]"),
        ({"masks": torch.ones(2, 40, 32)}, "masks are 40 x 32, expected the picture's 32 x 32 or the latents' 16 x 16"),
        ({"guidance": float("nan")}, "guidance: is nan, expected a finite number, 0 or more"),
        ({"guidance": "7"}, "guidance: is '7'"),
        ({"masks": torch.ones(2, 32, 32)}, "the masks of c1 and c2 overlap in 1024 pixels: use compose_masks"),
        ({"masks": torch.tensor([0.6, 0.6, 0.0])[:, None, None].expand(3, 32, 32)}, "masks of c1 and c2 overlap"),
        ({"masks": torch.full((2, 32, 32), -1.0)}, r"outside 0..1 \(-1 to -1\); the mask of c2 has values"),
        ({"masks": torch.full((3, 32, 32), 0.3)}, "sum to 0.9"),
        ({"masks": torch.full((2, 32, 32), float("nan"))}, "mask of c1 has values outside 0..1"),
        ({"prompt": "a cat, mountain"}, "names 'dog' 0 times"),
        ({"first": {"prompt": "a dog"}}, "the prompt of c1: 'a dog' lacks the concept's token '<v1>'; put it before"),
        ({"first": {"prompt": "a <v1> dog, <v2> cat"}}, "the prompt of c1: .* holds another concept's token '<v2>'"),
        ({"first": {"concept": None, "prompt": "a <v2> cat"}}, "the prompt of region .* holds another concept's token"),
        ({"prompt": "a dog and a <v2> cat"}, "prompt: 'a dog and a <v2> cat' holds '<v2>', the token of c2"),
        ({"negative_prompt": "<v1> dog"}, "negative_prompt: '<v1> dog' holds '<v1>'"),
        ({"first": {"strength": -1.0}}, "strength of c1 is -1.0"),
        ({"first": {"strength": float("inf")}}, "strength of c1 is inf"),
        ({"first": {"window": (0.5, 0.5)}}, "window of c1"),
        ({"first": {"window": (0.0, 1.5)}}, "window of c1"),
        ({"first": {"scale": float("nan")}}, "scale of c1"),
        ({"first": {"concept": None}}, "needs a prompt"),
        ({"first": {"strength": None}}, r"strength of c1 is None, expected 0 to 2 \(1 is all of it"),
        ({"first": {"strength": "1"}}, "strength of c1 is '1', expected 0 to 2"),
        ({"first": {"strength": 2.5}}, "strength of c1 is 2.5, expected 0 to 2"),
        ({"first": {"scale": "1"}}, "scale of c1 is '1', expected a finite number"),
        ({"first": {"window": 0.5}}, r"window of c1 is 0.5, expected \(start, end\)"),
        ({"first": {"window": ("0", "1")}}, r"window of c1 is \('0', '1'\), expected \(start, end\)"),
        ({"first": {"prompt": ["a <v1> dog"]}}, "concepts: a use's prompt: is .*, expected one string"),
        ({"first": {"negative_prompt": 7}}, "concepts: a use's negative_prompt: is 7, expected one string"),
        ({"first": {"concept": "dog"}}, "concepts: 'dog' is a str, no Concept and no ConceptUse"),
        ({"background": "mountain"}, "background: 'mountain' is a str, no Concept and no ConceptUse"),
        ({"prompt": ["a dog"]}, r"prompt: is \['a dog'\], expected one string"),
        ({"prompt": None}, "prompt: is None, expected one string"),
        ({"negative_prompt": 3}, "negative_prompt: is 3, expected one string"),
        ({"negative_prompt": ["ugly"]}, r"negative_prompt: is \['ugly'\], expected one string"),
        ({"features": "stored"}, "features: is 'stored', expected what `collect_features` gives, or None"),
        ({"masks": [Image.new("L", (32, 32), 255)] * 2}, r"mask of c1 has values outside 0..1 \(255 to 255\)"),
        ({"masks": [torch.ones(32, 32), torch.ones(8, 8)]}, r"masks of different sizes: \(8, 8\), \(32, 32\)"),
        ({"masks": Image.new("1", (32, 32))}, "masks: is a Image, expected an array .* or a list"),
        ({"masks": ["left", "right"]}, r"masks: is \['left', 'right'\], expected numbers from 0 to 1"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else None,
)
def test_bad_input(tiny_pipe, concepts, masks, change, message):
    change = dict(change)
    with pytest.raises(WeaverError, match=message):
        first = dataclasses.replace(ConceptUse(concepts[0]), **change.pop("first", {}))
        build(tiny_pipe, [first, ConceptUse(concepts[1])], change.pop("masks", masks), **change)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"height": 33}, "size: is 32x33, expected multiples of 8 pixels"),
        ({"height": "32"}, "size: is 32x'32', expected multiples of 8 pixels, as whole numbers"),
        ({"height": 0}, "size: is 32x0, expected multiples of 8 pixels"),
    ],
    ids=["odd", "text", "zero"],
)
@pytest.mark.parametrize("injected", [False, True], ids=["noise", "template"])
def test_a_wrong_size_is_one_reason_and_no_others_follow(tiny_pipe, concepts, masks, features, size, message, injected):
    with pytest.raises(WeaverError) as caught:
        build(tiny_pipe, concepts[:2], masks, features=features if injected else None, **size)
    assert str(caught.value) == f"Cannot build the fusion plan: {message}"


def test_concepts_by_themselves_are_used_with_the_defaults(tiny_pipe, concepts, masks):
    uses = build(tiny_pipe, [ConceptUse(c) for c in concepts[:2]], masks, background=ConceptUse(concepts[4]))
    plan = build(tiny_pipe, concepts[:2], masks, background=concepts[4])
    assert plan.prompts == uses.prompts
    assert all(torch.equal(plan.weights[key], uses.weights[key]) for key in uses.weights)


def test_one_concept_is_no_list_of_concepts(tiny_pipe, concepts, masks):
    with pytest.raises(WeaverError, match="concepts: is a ConceptUse, expected a list of concepts; prompt: is None"):
        build(tiny_pipe, ConceptUse(concepts[0]), masks, prompt=None)
    with pytest.raises(WeaverError, match="the U-Net is a NoneType"):
        build(object(), [], None)


def test_an_empty_mask_is_an_error(tiny_pipe, concepts, masks):
    empty = masks.clone()
    empty[1] = 0
    with pytest.raises(WeaverError, match="the mask of c2 is empty"):
        build(tiny_pipe, [ConceptUse(c) for c in concepts[:2]], empty)
    full = torch.ones(1, 32, 32)
    with pytest.raises(WeaverError, match="the mask of c5 is empty"):
        build(tiny_pipe, [ConceptUse(concepts[0])], full, background=ConceptUse(concepts[4]))


def test_a_concept_of_another_base_is_an_error(tiny_pipe, concepts_v, masks):
    with pytest.raises(WeaverError, match="'c1' belongs to another base model"):
        build(tiny_pipe, [ConceptUse(c) for c in concepts_v[:2]], masks)


def test_features_of_another_size_or_number_of_steps_are_an_error(tiny_pipe, concepts, masks, features):
    uses = [ConceptUse(c) for c in concepts[:2]]
    with pytest.raises(WeaverError, match="size: is 48x32, the template's features are for 32x32"):
        build(tiny_pipe, uses, torch.nn.functional.pad(masks, (0, 16)), features=features, width=48)
    with pytest.raises(WeaverError, match="inverted in 3"):
        build(tiny_pipe, uses, masks, features=features, steps=4)
    plan = build(tiny_pipe, uses, masks, features=features)
    assert (plan.steps, plan.size, plan.pixels) == (3, (16, 16), (32, 32))


def test_all_reasons_come_at_once(tiny_pipe, concepts, concepts_v):
    uses = [ConceptUse(concepts[0], strength=-1.0, prompt="a dog"), ConceptUse(concepts_v[1], window=(1.0, 0.0))]
    with pytest.raises(WeaverError) as error:
        build(tiny_pipe, uses, torch.zeros(2, 32, 32), steps=0, suppression=-1.0)
    message = str(error.value)
    for reason in (
        "steps: is 0",
        "suppression",
        "strength of c1",
        "window of c2",
        "another base",
        "mask of c1",
        "<v1>",
    ):
        assert reason in message
    assert "\n" not in message


@pytest.mark.parametrize("hook", ["_hf_hook", "_diffusers_hook"])
def test_a_model_that_is_moved_to_its_device_at_each_call_is_an_error(tiny_pipe, hook):
    setattr(tiny_pipe.unet.conv_in, hook, object())
    try:
        with pytest.raises(WeaverError, match=r"CPU offload.*remove_all_hooks"):
            build(tiny_pipe, [], None)
    finally:
        delattr(tiny_pipe.unet.conv_in, hook)


@pytest.mark.parametrize("name", ["to_k", "to_v"])
def test_hooks_that_contexts_would_leave_out_are_an_error(tiny_pipe, name):
    """Keys and values are made of the weights, before any forward."""
    path = f"mid_block.attentions.0.transformer_blocks.0.attn2.{name}"
    handle = tiny_pipe.unet.get_submodule(path).register_forward_hook(lambda module, args, output: 0 * output)
    try:
        with pytest.raises(WeaverError, match=f"{path} has forward hooks, which are never called"):
            build(tiny_pipe, [], None)
    finally:
        handle.remove()


def test_other_models_are_an_error(tiny_pipe):
    config = tiny_pipe.unet.config["addition_embed_type"]
    tiny_pipe.unet.register_to_config(addition_embed_type="text_time")
    try:
        with pytest.raises(WeaverError, match="added conditioning"):
            build(tiny_pipe, [], None)
    finally:
        tiny_pipe.unet.register_to_config(addition_embed_type=config)


def test_two_concepts_of_one_class_word_take_one_word_each(tiny_pipe, concepts, masks):
    other = dataclasses.replace(concepts[1], word="dog")
    plan = build(tiny_pipe, [ConceptUse(concepts[0]), ConceptUse(other)], masks, prompt="a dog and a dog")
    assert plan.prompts[2:] == ("a <v1> dog and a dog", "a dog and a <v2> dog")


def test_a_prompt_names_its_own_concept_alone(tiny_pipe, concepts, masks):
    """The paper's prompts (section 3.5), whoever stands last and whatever is written by hand."""
    ball = "a dog and a cat playing with a ball, mountain background"
    uses = [ConceptUse(concepts[0]), ConceptUse(concepts[1])]
    plan = build(tiny_pipe, uses, masks, prompt=ball, background=ConceptUse(concepts[4]))
    own = (
        "a <v1> dog playing with a ball, mountain background",
        "a <v2> cat playing with a ball, mountain background",
        "a dog and a cat playing with a ball, <v5> mountain background",
    )
    assert plan.prompts == ("", ball, *own)
    written = [ConceptUse(concepts[0], "a <v1> dog"), ConceptUse(None, "a fox")]
    assert build(tiny_pipe, written, masks, prompt=ball).prompts[2:] == ("a <v1> dog", "a fox")


def test_nothing_in_a_plan_can_be_changed(tiny_pipe, concepts, masks, features):
    plan = build(tiny_pipe, [ConceptUse(c) for c in concepts[:2]], masks, features=features)
    for mapping in (plan.keys_values, plan.weights, plan.sizes, plan.features.tensors[0]):
        with pytest.raises(TypeError):
            mapping[next(iter(mapping))] = None
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.guidance = 1.0


def test_the_base_is_hashed_once_and_not_when_its_hash_is_known(tiny_pipe, concepts, masks, monkeypatch):
    hashed = []
    for module in (contexts, concept_module):
        monkeypatch.setattr(module, "attn2_hash", lambda unet: hashed.append(1) or concepts[0].base_hash)
    uses = [ConceptUse(c) for c in concepts[:2]]
    build(tiny_pipe, uses, masks)
    assert len(hashed) == 1
    build(tiny_pipe, uses, masks, base_hash=concepts[0].base_hash)
    assert len(hashed) == 1
    with pytest.raises(WeaverError, match="'c1' belongs to another base model"):
        build(tiny_pipe, uses, masks, base_hash="0" * 64)


def test_masks_may_come_in_latent_cells_and_with_their_background(tiny_pipe, concepts, masks):
    uses = [ConceptUse(c) for c in concepts[:2]]
    full = torch.cat([masks, 1 - masks.sum(0, keepdim=True)])
    kinds = [masks, full, masks[:, ::2, ::2], masks.numpy(), masks.bool(), list(masks), [*masks.numpy()]]
    kinds.append([Image.fromarray(mask.bool().numpy()) for mask in masks])
    plans = [build(tiny_pipe, uses, kind) for kind in kinds]
    for plan in plans[1:]:
        assert all(torch.equal(plan.weights[key], plans[0].weights[key]) for key in plans[0].weights)


def test_texts_are_projected_once(tiny_pipe, concepts, masks):
    """No key or value projection of any cross-attention runs while drawing."""
    plan = build(tiny_pipe, [ConceptUse(c) for c in concepts[:2]], masks, steps=2)
    calls = []
    with attach(tiny_pipe, plan), ExitStack() as hooks:
        for path in plan.keys_values:
            for name in ("to_k", "to_v"):
                projection = getattr(tiny_pipe.unet.get_submodule(path), name)
                hooks.callback(projection.register_forward_hook(lambda *_: calls.append(1)).remove)
        tiny_pipe(**plan.pipeline_arguments(), output_type="latent")
    assert calls == []


def test_building_leaves_the_pipeline_as_it_was(tiny_pipe, concepts, masks):
    before = {name: tensor.clone() for name, tensor in tiny_pipe.unet.state_dict().items()}
    vocabulary = len(tiny_pipe.tokenizer)
    build(tiny_pipe, [ConceptUse(c) for c in concepts[:2]], masks)
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny_pipe.unet.state_dict().items())
    assert len(tiny_pipe.tokenizer) == vocabulary


def test_a_region_without_a_concept_is_the_base_model_under_its_prompt(tiny_pipe, masks):
    plan = build(tiny_pipe, [ConceptUse(None, "a fox")], torch.ones(1, 32, 32), steps=2)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1)).double()
    arguments = {"num_inference_steps": 2, "latents": noise, "output_type": "latent"}
    with attach(tiny_pipe, plan):
        ours = tiny_pipe(PROMPT, **arguments).images
    torch.testing.assert_close(ours, tiny_pipe("a fox", **arguments).images, rtol=1e-10, atol=1e-10)


def test_contexts_that_are_equal_are_computed_once(tiny_pipe, concepts, masks):
    """A region under the base prompt is base; one concept twice is one only under one prompt and scale."""
    own = ConceptUse(concepts[0], "a <v1> dog")
    uses = [ConceptUse(None, PROMPT), own, own, dataclasses.replace(own, scale=0.5), ConceptUse(None, "a <v9> dog")]
    stripes = torch.zeros(5, 32, 32)
    for i, stripe in enumerate(stripes):
        stripe[:, 6 * i : 6 * i + 6] = 1
    plan = build(tiny_pipe, uses, stripes, steps=2)
    assert plan.same_as.tolist() == [0, 1, 1, 3, 3, 5, 6]
    seen = []
    with attach(tiny_pipe, plan) as state:
        largest = next(path for path, size in plan.sizes.items() if size == (16, 16))
        reads = state.context_reads[largest]
        hook = tiny_pipe.unet.register_forward_hook(lambda *_: seen.append(reads.routes.plan.weights[1]))
        try:
            tiny_pipe(**plan.pipeline_arguments(), output_type="latent")
        finally:
            hook.remove()
    assert (seen[0] != 0).any(-1).tolist() == [True, False, True, False, True, True]
    torch.testing.assert_close(seen[0].sum(0), torch.ones(256, dtype=torch.float64))


class Adapted(torch.nn.Module):
    """A projection with an adapter around it, as adapter libraries make them."""

    def __init__(self, linear):
        super().__init__()
        rng = torch.Generator().manual_seed(linear.out_features)
        self.base_layer = linear
        self.down = torch.randn(2, linear.in_features, generator=rng, dtype=torch.float64)
        self.up = torch.randn(linear.out_features, 2, generator=rng, dtype=torch.float64)

    def forward(self, x):
        return self.base_layer(x) + x @ self.down.T @ self.up.T


def test_an_adapter_of_the_base_model_counts(tiny_pipe, concepts, masks):
    """For every context, a concept's own change on top of it."""
    plain = build(tiny_pipe, [ConceptUse(c) for c in concepts[:2]], masks)
    path = next(iter(plain.keys_values))
    attention = tiny_pipe.unet.get_submodule(path)
    own = attention.to_k
    attention.to_k = Adapted(own)
    try:
        adapted = build(tiny_pipe, [ConceptUse(c) for c in concepts[:2]], masks)
        added = (attention.to_k(plain.text) - own(plain.text)).unflatten(-1, (attention.heads, -1))
    finally:
        attention.to_k = own
    torch.testing.assert_close(adapted.keys_values[path].keys, plain.keys_values[path].keys + added)
    torch.testing.assert_close(adapted.keys_values[path].values, plain.keys_values[path].values)
