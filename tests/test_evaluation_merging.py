"""The rivals, each against its own equations: merged weights, and the score mix."""

from __future__ import annotations

import pytest
import torch
from conftest import make_concept, make_whole

from weaver import ConceptUse, FusionPlan, attach, collect_features, ddim_scheduler, invert
from weaver.concepts.concept import attn2_projections
from weaver.concepts.encoding import encode
from weaver.concepts.prompts import derive_prompt
from weaver.errors import WeaverError
from weaver.evaluation.merging import averaged, closed_form, merge, merged_unet, target_features, with_tokens
from weaver.evaluation.mixing import sample_score_mix
from weaver.layers import InjectionSites

PROMPT = "a dog and a cat, night background"


def test_the_closed_form_gives_each_concept_s_words_what_its_own_weight_gives():
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 12, generator=rng).double()
    own = [weight + torch.randn(5, 12, generator=rng).double() for _ in range(2)]
    targets = [torch.randn(2, 12, generator=rng).double() for _ in range(2)]
    regular = torch.randn(60, 12, generator=rng).double()
    merged = closed_form(weight, own, targets, regular)
    for w, features in zip(own, targets, strict=True):
        torch.testing.assert_close(features @ merged.T, features @ w.T)
    # Least of all that do: the error's gradient lies in the span of the constraints, whose complement has none.
    gradient = (merged - weight) @ regular.T @ regular
    basis = torch.linalg.qr(torch.cat(targets).T)[0]
    assert (gradient - gradient @ basis @ basis.T).abs().max() < 1e-9 * gradient.abs().max()


def test_a_concept_that_is_merged_twice_is_merged_once():
    rng = torch.Generator().manual_seed(1)
    weight, own = torch.randn(2, 5, 12, generator=rng).double()
    features, regular = torch.randn(2, 12, generator=rng).double(), torch.randn(60, 12, generator=rng).double()
    once = closed_form(weight, [own], [features], regular)
    torch.testing.assert_close(closed_form(weight, [own, own], [features, features], regular), once)


def test_changes_are_averaged_over_all_concepts(tiny_pipe, concepts):
    lone = make_whole(tiny_pipe, 7, "fox", ["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"])
    found = averaged([*concepts[:2], lone])
    path = next(iter(concepts[0].deltas))
    expected = sum(concept.deltas[path] for concept in (*concepts[:2], lone)) / 3
    torch.testing.assert_close(found[path], expected)
    (outside,) = lone.outside
    factors = lone.outside[outside]
    torch.testing.assert_close(found[outside], factors.up @ factors.down / 3)


def test_a_merged_unet_of_one_concept_is_that_concept_everywhere(tiny_pipe):
    convolution = "up_blocks.1.resnets.0.conv1"
    concept = make_whole(tiny_pipe, 3, "dog", [convolution, "up_blocks.2.attentions.0.proj_in"])
    prompt = derive_prompt("a dog", concept)
    text = encode(tiny_pipe, prompt, concept).text
    z, t = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2)).double(), torch.tensor(500)
    with torch.no_grad():
        merged = merged_unet(tiny_pipe.unet, averaged([concept]))(z, t, encoder_hidden_states=text).sample
        plan = FusionPlan.build(tiny_pipe, [concept], torch.ones(1, 32, 32), prompt="a dog", height=32, width=32)
        with attach(tiny_pipe.unet, plan, rows=["fused"]) as state:
            state.set_step(0, torch.tensor([500]))
            fused = tiny_pipe.unet(z, t, encoder_hidden_states=plan.text[1:2]).sample
    assert (merged - fused).abs().max() < 1e-5 * fused.abs().max()  # a product of factors in float32, and two of them
    assert convolution in averaged([concept])


def test_a_pipeline_with_tokens_reads_them_as_the_concept_s_prompt_is_read(tiny_pipe, concepts):
    known = with_tokens(tiny_pipe, concepts[:2])
    for concept in concepts[:2]:
        prompt = derive_prompt(PROMPT, concept)
        expected = encode(tiny_pipe, prompt, concept).text
        assert torch.equal(encode(known, prompt).text, expected)
    assert not torch.equal(encode(tiny_pipe, prompt).text, expected)
    assert known.unet is tiny_pipe.unet and len(tiny_pipe.tokenizer) < len(known.tokenizer)


def test_merged_pipelines_differ_in_keys_and_values(tiny_pipe, concepts):
    prompts = {concept.name: derive_prompt(PROMPT, concept) for concept in concepts[:2]}
    mean, form = (merge(tiny_pipe, prompts, concepts[:2], how) for how in ("averaged", "closed-form"))
    base = attn2_projections(tiny_pipe.unet)
    projections = attn2_projections(form.unet)
    for concept in concepts[:2]:
        features = target_features(tiny_pipe, prompts[concept.name], concept)
        assert len(features) == 2  # token and word
        for path, linear in projections.items():
            own = base[path].weight + concept.deltas[path].double()
            assert (features @ (linear.weight - own).T).abs().max() < 1e-4 * (features @ own.T).abs().max()
    path = next(iter(projections))
    assert not torch.allclose(attn2_projections(mean.unet)[path].weight, projections[path].weight)
    with pytest.raises(WeaverError, match="merge is 'best'"):
        merge(tiny_pipe, prompts, concepts[:2], "best")


def test_what_one_prompt_can_t_name_is_told(tiny_pipe):
    from dataclasses import replace

    concept = make_concept(tiny_pipe, 1, "dog")
    double = replace(concept, embeddings={"text_encoder": torch.randn(2, 16)})
    with pytest.raises(WeaverError, match="c1 has 2 vectors"):
        with_tokens(tiny_pipe, [double])


@pytest.fixture(scope="module")
def template(tiny_pipe):
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5)).double()
    return invert(tiny_pipe, z, PROMPT, 4)


@pytest.mark.parametrize("with_background", [False, True], ids=["base background", "background concept"])
def test_the_score_mix_is_a_pass_of_each_concept_s_own_model(tiny_pipe, concepts, template, with_background):
    """`eps = sum_i M_i eps_i`, with every concept's weights merged into a U-Net of its own."""
    prompt = PROMPT.replace("night", "mountain")
    uses = [ConceptUse(concept, prompt=derive_prompt(prompt, concept)) for concept in concepts[:2]]
    ground = ConceptUse(concepts[4], prompt=derive_prompt(prompt, concepts[4])) if with_background else None
    masks = torch.zeros(3, 32, 32)
    masks[0, :, :12] = masks[1, :, 18:] = 1
    masks[2] = 1 - masks[:2].sum(0)
    features = collect_features(tiny_pipe, template, InjectionSites("none"))
    ours = sample_score_mix(tiny_pipe, uses, masks, features, prompt=prompt, background=ground, guidance=3.0)
    passes = [
        (merged_unet(tiny_pipe.unet, averaged([use.concept])), encode(tiny_pipe, use.prompt, use.concept).text)
        for use in [*uses, *([ground] if ground else [])]
    ]
    passes += [] if ground else [(tiny_pipe.unet, encode(tiny_pipe, prompt).text)]
    scheduler, z = ddim_scheduler(tiny_pipe.scheduler), template.z_T
    scheduler.set_timesteps(4)
    small = torch.nn.functional.avg_pool2d(masks.double(), 2)
    negative = encode(tiny_pipe, "").text
    with torch.no_grad():
        for t in scheduler.timesteps:
            mixed = sum(m * unet(z, t, encoder_hidden_states=text).sample
                        for m, (unet, text) in zip(small, passes, strict=True))  # fmt: skip
            plain = tiny_pipe.unet(z, t, encoder_hidden_states=negative).sample
            z = scheduler.step(plain + 3.0 * (mixed - plain), t, z).prev_sample
    assert (ours - z).abs().max() < 1e-6 * z.abs().max()


def test_the_score_mix_has_the_template_s_features_in_every_pass(tiny_pipe, concepts, template):
    masks = torch.zeros(2, 32, 32)
    masks[0, :, :16], masks[1, :, 16:] = 1, 1
    uses, drawn = [ConceptUse(concepts[0])], []
    for sites in (InjectionSites("none"), InjectionSites("all", (3, 4), (4, 5))):
        features = collect_features(tiny_pipe, template, sites)
        options = {"prompt": PROMPT, "guidance": 3.0}
        drawn.append(sample_score_mix(tiny_pipe, uses, masks, features, **options))
    assert not torch.allclose(*drawn)
