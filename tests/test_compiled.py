"""A compiled model gives what the same model gives as it is written, or says why it can't."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import make_concept, make_pipeline, shallow

from weaver import ConceptUse, WeaverError, weave
from weaver.compiled import compile_whole, hooks_run, is_compiled
from weaver.concepts.encoding import encode
from weaver.concepts.training_state import added
from weaver.fusion import FusionPlan, attach
from weaver.latents import image_to_tensor
from weaver.layers import PAPER, InjectionSites, cross_attention_paths

PROMPT = "a dog and a cat, mountain"


@pytest.fixture(autouse=True)
def _forget():
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=64):
        yield
    torch.compiler.reset()


@pytest.fixture
def compiled(tiny_pipe):
    pipe = make_pipeline()
    pipe.unet = copy.deepcopy(tiny_pipe.unet)
    pipe.unet.compile_repeated_blocks(backend="eager")
    return pipe


def test_a_whole_run_on_compiled_blocks(tiny_pipe):
    """Masks from attention, inversion, features, fusion, all kinds of features; and plain pictures around it."""
    eager = shallow(tiny_pipe, levels=3)
    compiled = copy.copy(eager)
    compiled.unet = copy.deepcopy(eager.unet)
    compiled.unet.compile_repeated_blocks(backend="eager")
    uses = [ConceptUse(make_concept(eager, number, word)) for number, word in ((1, "dog"), (2, "cat"))]
    sites = InjectionSites("some", resnets=(4,), attentions=(4, 7))
    plain = {"num_inference_steps": 2, "output_type": "latent"}

    def draw(pipe):
        found = [pipe(PROMPT, generator=torch.Generator().manual_seed(1), **plain).images]
        for features in ("stored", "replayed", "inversion"):
            options = {"steps": 3, "template_steps": 2, "sites": sites, "features": features}
            result = weave(pipe, PROMPT, uses, seed=3, **options)
            found += [image_to_tensor(result.image), *result.masks]
        return [*found, pipe(PROMPT, generator=torch.Generator().manual_seed(1), **plain).images]

    for ours, expected in zip(draw(compiled), draw(eager), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_deltas_and_vectors_reach_compiled_modules(tiny_pipe, compiled):
    path = cross_attention_paths(tiny_pipe.unet)[0] + ".to_k"
    weight = tiny_pipe.unet.get_submodule(path).weight
    z, text = torch.ones(1, 4, 16, 16).double(), torch.ones(1, 16, weight.shape[1]).double()
    t = torch.tensor(500)
    with torch.no_grad():
        compiled.unet(z, t, text)
        with added(compiled.unet, {path: torch.ones_like(weight)}):
            ours = compiled.unet(z, t, text).sample
        with added(tiny_pipe.unet, {path: torch.ones_like(weight)}):
            torch.testing.assert_close(ours, tiny_pipe.unet(z, t, text).sample, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("how", ["in place", "around", "its forward", "a ResNet"])
def test_what_leaves_out_the_hooks_is_an_error(tiny_pipe, concepts, how):
    pipe = make_pipeline()
    plan = FusionPlan.build(pipe, prompt=PROMPT, steps=2)
    assert not any(map(is_compiled, pipe.unet.modules()))
    unet = pipe.unet
    if how == "in place":
        unet.compile(backend="eager")
    elif how == "around":
        unet = torch.compile(unet, backend="eager")
    elif how == "its forward":
        unet.forward = torch.compile(unet.forward, backend="eager")
    else:
        from weaver.features import collect_features
        from weaver.inversion import invert

        z = torch.zeros(1, 4, 16, 16).double()
        plan = FusionPlan.build(pipe, prompt=PROMPT, features=collect_features(pipe, invert(pipe, z, PROMPT, 2), PAPER))
        unet.up_blocks[1].resnets[1].compile(backend="eager")
    assert sum(map(is_compiled, unet.modules())) == 1
    with pytest.raises(WeaverError, match="compile_repeated_blocks"), attach(unet, plan, rows=["negative", "fused"]):
        pass


def test_an_encoder_that_is_compiled_hears_of_a_concept_s_vectors(tiny_pipe, concepts):
    prompt = "a <v1> dog, mountain"
    expected = encode(tiny_pipe, prompt, concepts[0])
    pipe = make_pipeline()
    encode(pipe, prompt, concepts[0])
    pipe.text_encoder.compile(backend="eager")
    encode(pipe, "a dog")
    assert torch.equal(encode(pipe, prompt, concepts[0])[0], expected[0])


def test_each_forward_compiled_as_a_whole_has_variants_of_its_own():
    """Eight of one code object are the limit, and all closures of one place share it."""
    with torch._dynamo.config.patch(recompile_limit=2):
        for number in range(4):
            twice = compile_whole(lambda x, number=number: x * number, backend="eager")
            for size in (2, 3):
                assert torch.equal(twice(torch.ones(size)), torch.full((size,), float(number)))


def test_nothing_compiled_nothing_changed(tiny_pipe):
    stance = torch._dynamo.eval_frame._stance.stance
    with hooks_run(tiny_pipe.unet):
        assert torch._dynamo.eval_frame._stance.stance == stance
