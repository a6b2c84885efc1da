"""`attach` on every form of SDXL's pipeline: same arguments, and each row has its text and its pooled embedding."""

from __future__ import annotations

import dataclasses
import inspect
from functools import partial

import pytest
import torch
from conftest import make_concept
from diffusers import (
    EulerDiscreteScheduler,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from paper_reference import encode
from pipeline_forms import STEPS, controlnet_of, draw, full_mask, make

from weaver import ConceptUse, FusionPlan, WeaverError, attach, sample_fusion
from weaver.concepts.concept import attn2_projections
from weaver.features import collect_features
from weaver.inversion import invert
from weaver.layers import InjectionSites
from weaver.schedule import ddim_scheduler

PROMPT, NEGATIVE, OWN = "a dog and a cat, mountain", "ugly", "a cat, white"
SITES = InjectionSites("some", resnets=(1,), attentions=(1, 4), resnet_window=1.0, attention_window=0.5)
PIPELINES = [
    StableDiffusionXLPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
]
ALL = pytest.mark.parametrize("kind", PIPELINES, ids=lambda kind: kind.__name__.removeprefix("StableDiffusionXL"))
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture(scope="module")
def controlnet(tiny_sdxl):
    return controlnet_of(tiny_sdxl.unet)


@pytest.fixture(scope="module")
def features(tiny_sdxl):
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    return collect_features(tiny_sdxl, invert(tiny_sdxl, z, "a fox", STEPS), SITES)


def region(pipe, **arguments):
    """A plan whose one region, with a prompt of its own, is the whole picture."""
    arguments = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "steps": STEPS} | arguments
    return FusionPlan.build(pipe, [ConceptUse(None, prompt=OWN)], full_mask(), **arguments)


def embeddings(pipe, text, pooled=PROMPT, negative=NEGATIVE):
    """A call's arguments: the text of one prompt with the pooled embedding of another, and the negative prompt's."""
    (negative_text, negative_pooled), (_, pooled) = encode(pipe, negative), encode(pipe, pooled)
    found = {"prompt_embeds": encode(pipe, text)[0], "pooled_prompt_embeds": pooled}
    found |= {"negative_prompt_embeds": negative_text, "negative_pooled_prompt_embeds": negative_pooled}
    return {name: tensor.detach() for name, tensor in found.items()}


@ALL
@pytest.mark.parametrize("guidance", [1.0, 5.0], ids=["no-guidance", "guidance"])
def test_a_region_that_is_the_whole_picture_is_its_prompt(kind, guidance, tiny_sdxl, controlnet):
    """With p_base's pooled embedding, and what a ControlNet makes of p_base: only the U-Net's text is the region's."""
    pipe = make(kind, tiny_sdxl, controlnet)
    options = {"guidance_scale": guidance, "num_images_per_prompt": 2}
    own, controlled = embeddings(tiny_sdxl, OWN), hasattr(pipe, "controlnet")

    def to_region(unet, args, kwargs):
        text = kwargs["encoder_hidden_states"].clone()
        text[-2:] = own["prompt_embeds"]
        return args, kwargs | {"encoder_hidden_states": text}

    if controlled:
        handle = pipe.unet.register_forward_pre_hook(to_region, with_kwargs=True)
        expected = draw(pipe, prompt=PROMPT, negative_prompt=NEGATIVE, **options)
        handle.remove()
    else:
        expected = draw(pipe, **own, **options)
    with attach(pipe, region(tiny_sdxl)):
        found = draw(pipe, prompt=PROMPT, negative_prompt=NEGATIVE, **options)
    torch.testing.assert_close(found, expected, **CLOSE)
    for other in (embeddings(tiny_sdxl, PROMPT), embeddings(tiny_sdxl, OWN, pooled=OWN)):
        assert (draw(pipe, **other, **options) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("kind", PIPELINES[:3], ids=lambda kind: kind.__name__.removeprefix("StableDiffusionXL"))
@pytest.mark.parametrize("guidance", [1.0, 5.0], ids=["no-guidance", "guidance"])
def test_a_concept_on_the_whole_picture_is_the_model_with_its_weights(kind, guidance, tiny_sdxl, concepts_sdxl):
    """And with its token in both encoders; under guidance the negative row keeps the untuned weights."""
    pipe, concept = make(kind, tiny_sdxl), concepts_sdxl[0]
    own = f"a {concept.token} {concept.word}"
    plan = FusionPlan.build(tiny_sdxl, [ConceptUse(concept, prompt=own)], full_mask(), prompt=PROMPT, steps=STEPS)
    with attach(pipe, plan):
        found = draw(pipe, prompt=PROMPT, guidance_scale=guidance)
    own_text, given = encode(tiny_sdxl, own, concept)[0], {"prompt": PROMPT, "guidance_scale": guidance}

    def tuned(attn, args, kwargs, output, change):
        """Add the deltas' part in the fused row, which is the last."""
        added = torch.nn.functional.linear(own_text, change.double())
        return torch.cat([output[:-1], output[-1:] + added])

    def to_own(unet, args, kwargs):
        text = kwargs["encoder_hidden_states"]
        return args, kwargs | {"encoder_hidden_states": torch.cat([text[:-1], own_text])}

    handles = [pipe.unet.register_forward_pre_hook(to_own, with_kwargs=True)]
    for path, linear in attn2_projections(pipe.unet).items():
        change = concept.deltas[path]
        hook = lambda *call, change=change: tuned(*call, change)  # noqa: E731
        handles.append(linear.register_forward_hook(hook, with_kwargs=True))
    with torch.no_grad():
        expected = draw(pipe, **given)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(found, expected, **CLOSE)


@ALL
def test_features_of_the_template_are_injected(kind, tiny_sdxl, controlnet, concepts_sdxl, features):
    """Image-to-image begins in the middle of the template's steps and takes the features of those."""
    pipe = make(kind, tiny_sdxl, controlnet)
    pipe.scheduler = ddim_scheduler(tiny_sdxl.scheduler)
    drawn = []
    for given in (features, None):
        plan = FusionPlan.build(
            tiny_sdxl, [ConceptUse(concepts_sdxl[0])], full_mask(), prompt=PROMPT, steps=STEPS, features=given
        )
        with attach(pipe, plan):
            drawn.append(draw(pipe, prompt=PROMPT))
    assert (drawn[0] - drawn[1]).abs().max() > 1e-3


@pytest.mark.parametrize("guidance", [5.0, 1.0])
@pytest.mark.parametrize("injected", [True, False], ids=["template", "noise"])
def test_sample_fusion_gives_the_pipelines_numbers(tiny_sdxl, concepts_sdxl, features, guidance, injected):
    masks = torch.zeros(2, 32, 32)
    masks[0, 8:, :16] = masks[1, :20, 16:] = 1
    plan = FusionPlan.build(
        tiny_sdxl,
        [ConceptUse(concepts_sdxl[0], window=(0.0, 0.7)), ConceptUse(concepts_sdxl[1], strength=0.8)],
        masks,
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        suppression=0.2,
        guidance=guidance,
        features=features if injected else None,
        steps=STEPS,
    )
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1)).double()
    z = features.z_T if injected else z
    ours = sample_fusion(tiny_sdxl.unet, z, ddim_scheduler(tiny_sdxl.scheduler), plan)
    with attach(tiny_sdxl, plan):
        theirs = tiny_sdxl(**plan.pipeline_arguments() | {"latents": z, "output_type": "latent"}).images
        several = sample_fusion_pair(tiny_sdxl, plan, z)
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(several, ours.expand_as(several), rtol=1e-10, atol=1e-10)


def sample_fusion_pair(pipe, plan, z):
    arguments = plan.pipeline_arguments() | {"latents": z.repeat(2, 1, 1, 1), "output_type": "latent"}
    return pipe(**arguments, num_images_per_prompt=2).images


def test_a_run_in_two_parts_is_the_run(tiny_sdxl, concepts_sdxl, features):
    """`denoising_end`, then image-to-image from `denoising_start`: windows and features are the whole schedule's."""
    use = ConceptUse(concepts_sdxl[0], window=(0.25, 0.75))
    plan = FusionPlan.build(tiny_sdxl, [use], full_mask(), prompt=PROMPT, features=features)
    arguments = plan.pipeline_arguments() | {"output_type": "latent"}
    second = make(StableDiffusionXLImg2ImgPipeline, tiny_sdxl)
    with attach(tiny_sdxl, plan):
        whole = tiny_sdxl(**arguments).images
        half = tiny_sdxl(**arguments, denoising_end=0.5).images
    taken = inspect.signature(second.__call__).parameters
    rest = {name: value for name, value in arguments.items() if name in taken and name != "latents"}
    with attach(second, plan):
        found = second(**rest, image=half, denoising_start=0.5).images
    torch.testing.assert_close(found, whole, **CLOSE)
    assert (half - whole).abs().max() > 1e-3


def test_a_callback_may_end_guidance(tiny_sdxl):
    """As the library's documentation does it: from the third step on there is only the fused row."""

    def end_guidance(pipe, step, timestep, given):
        if step == 1:
            pipe._guidance_scale = 0.0
            given = {name: tensor.chunk(2)[-1] for name, tensor in given.items()}
        return given

    names = ["prompt_embeds", "add_text_embeds", "add_time_ids"]
    options = {"callback_on_step_end": end_guidance, "callback_on_step_end_tensor_inputs": names}
    expected = draw(tiny_sdxl, **embeddings(tiny_sdxl, OWN), **options)
    with attach(tiny_sdxl, region(tiny_sdxl)):
        found = draw(tiny_sdxl, prompt=PROMPT, negative_prompt=NEGATIVE, **options)
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("size", [(32, 48), (56, 40)], ids=str)
def test_any_scheduler_shape_and_size_conditioning_from_plain_noise(tiny_sdxl, size):
    pipe = make(StableDiffusionXLPipeline, tiny_sdxl)
    pipe.scheduler = EulerDiscreteScheduler.from_config(tiny_sdxl.scheduler.config)
    options = {"height": size[0], "width": size[1], "original_size": (90, 70), "crops_coords_top_left": (4, 8)}
    plan = FusionPlan.build(
        tiny_sdxl,
        [ConceptUse(None, prompt=OWN)],
        torch.ones(1, *size),
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        height=size[0],
        width=size[1],
    )
    expected = draw(pipe, **embeddings(tiny_sdxl, OWN), **options)
    with attach(pipe, plan):
        found = draw(pipe, prompt=PROMPT, negative_prompt=NEGATIVE, **options)
    torch.testing.assert_close(found, expected, **CLOSE)
    other = draw(pipe, **embeddings(tiny_sdxl, OWN), **options | {"original_size": size})
    assert (other - expected).abs().max() > 1e-3


@pytest.mark.parametrize("zeros", [True, False], ids=["zeros", "empty"])
def test_no_negative_prompt_is_what_the_pipeline_makes_of_it(tiny_sdxl, zeros):
    pipe = make(StableDiffusionXLPipeline, tiny_sdxl, force_zeros_for_empty_prompt=zeros)
    plan = region(pipe, negative_prompt=None, guidance=5.0)  # the pipeline's own
    assert plan.prompts == (None if zeros else "", PROMPT, OWN)
    with attach(pipe, plan):
        found = draw(pipe, prompt=PROMPT)
        close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)  # texts encoded together round otherwise
        close(found, draw(pipe, **plan.pipeline_arguments()))
        if zeros:
            with pytest.raises(WeaverError, match="negative None"):
                draw(pipe, prompt=PROMPT, negative_prompt="")
        else:
            close(found, draw(pipe, prompt=PROMPT, negative_prompt=""))


def test_the_output_and_the_model_are_as_ever(tiny_sdxl):
    before = dict(tiny_sdxl.unet.attn_processors)
    with attach(tiny_sdxl, region(tiny_sdxl)):
        output = tiny_sdxl(PROMPT, negative_prompt=NEGATIVE, num_inference_steps=1)
    assert type(output).__name__ == "StableDiffusionXLPipelineOutput" and output.images[0].size == (32, 32)
    assert tiny_sdxl.unet.attn_processors == before and not tiny_sdxl.unet._forward_pre_hooks


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": "a fox, night"}, "other prompts than the plan's"),
        ({"prompt_2": "a fox, night"}, "other prompts"),
        ({"negative_prompt": None}, "other prompts"),
        ({"negative_original_size": (64, 64), "negative_target_size": (32, 32)}, "leave out negative_original_size"),
        ({"original_size": (64, 64)}, r"time ids \[32, 32, 0, 0, 32, 32\].*called with \[64, 64, 0, 0, 32, 32\]"),
        ({"height": 48}, "24 x 16, the plan is for 16 x 16"),
        ({"num_inference_steps": 3}, "num_inference_steps=4"),
    ],
    ids=["prompt", "second-encoder", "negative", "negative-size", "size-conditioning", "size", "steps"],
)
def test_a_call_that_is_not_the_plans_is_an_error(tiny_sdxl, features, arguments, message):
    given = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "num_inference_steps": STEPS} | arguments
    with pytest.raises(WeaverError, match=message), attach(tiny_sdxl, region(tiny_sdxl, features=features)):
        tiny_sdxl(**given)


@pytest.mark.parametrize("name", ["pooled_prompt_embeds", "negative_pooled_prompt_embeds"])
def test_another_pooled_embedding_is_an_error(tiny_sdxl, name):
    plan = region(tiny_sdxl)
    arguments = plan.pipeline_arguments()
    with attach(tiny_sdxl, plan):
        tiny_sdxl(**arguments | {name: arguments[name] * (1 + 1e-5), "num_inference_steps": 1})
        with pytest.raises(WeaverError, match="other prompts"):
            tiny_sdxl(**arguments | {name: encode(tiny_sdxl, "a fox")[1].detach()})


def test_time_ids_of_an_inversion_are_the_fusions(tiny_sdxl):
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    inversion = invert(tiny_sdxl, z, "a fox", 2, time_ids=(90, 70, 4, 8, 32, 32))
    plan = region(tiny_sdxl, features=collect_features(tiny_sdxl, inversion, SITES), steps=2)
    arguments = plan.pipeline_arguments()
    assert (arguments["original_size"], arguments["crops_coords_top_left"]) == ((90, 70), (4, 8))
    with attach(tiny_sdxl, plan):
        theirs = tiny_sdxl(**arguments, output_type="latent").images
        with pytest.raises(WeaverError, match="called with"):
            tiny_sdxl(**arguments | {"crops_coords_top_left": (0, 0)})
    ours = sample_fusion(tiny_sdxl.unet, inversion.z_T, ddim_scheduler(tiny_sdxl.scheduler), plan)
    assert torch.equal(ours, theirs)


def test_concepts_that_do_not_fit_are_one_clear_error(tiny_pipe, tiny_sdxl, concepts_sdxl):
    whole = concepts_sdxl[0]
    lacking = dataclasses.replace(whole, embeddings={"text_encoder": whole.embeddings["text_encoder"]})
    for concept, message in [
        (lacking, "'c1' belongs to another base model: its token has no embedding for text_encoder_2"),
        (make_concept(tiny_pipe, 7, "dog"), "'c7' belongs to another base model: .* weights do not fit the U-Net"),
    ]:
        with pytest.raises(WeaverError, match=message) as error:
            FusionPlan.build(tiny_sdxl, [ConceptUse(concept)], full_mask(), prompt=PROMPT)
        assert str(error.value).count("another base model") == 1


def test_models_that_take_other_conditions_are_an_error(tiny_sdxl):
    """The refiner's time ids are five: its last is an aesthetic score, which the negative row has otherwise."""
    config = tiny_sdxl.unet.config
    before = config["projection_class_embeddings_input_dim"]
    tiny_sdxl.unet.register_to_config(projection_class_embeddings_input_dim=before - 4)
    try:
        with pytest.raises(WeaverError, match="takes 5 time ids, expected 6.*refiner"):
            region(tiny_sdxl)
    finally:
        tiny_sdxl.unet.register_to_config(projection_class_embeddings_input_dim=before)
