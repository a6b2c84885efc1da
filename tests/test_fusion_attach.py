"""What `attach` installs, whom it follows, and that it leaves nothing behind."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from conftest import make_pipeline
from diffusers import PNDMScheduler, StableDiffusionInstructPix2PixPipeline, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor

from weaver import WeaverError
from weaver.features import collect_features
from weaver.fusion import ConceptUse, FusionPlan, attach
from weaver.inversion import invert
from weaver.layers import InjectionSites
from weaver.schedule import ddim_scheduler

STEPS = 3
PROMPT = "a dog and a cat, mountain"
SITES = InjectionSites("both", resnets=(4,), attentions=(4, 7), resnet_window=0.7, attention_window=0.7)


@pytest.fixture(scope="module")
def masks():
    masks = torch.zeros(2, 32, 32)
    masks[0, 4:28, 2:14] = 1
    masks[1, 4:28, 18:30] = 1
    return masks


@pytest.fixture(scope="module")
def plan(tiny_pipe, concepts, masks):
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    features = collect_features(tiny_pipe, invert(tiny_pipe, z, PROMPT, STEPS), SITES)
    uses = [ConceptUse(concept) for concept in concepts[:2]]
    return FusionPlan.build(tiny_pipe, uses, masks, prompt=PROMPT, suppression=0.3, features=features)


@pytest.fixture(scope="module")
def plan_from_noise(tiny_pipe, concepts, masks):
    uses = [ConceptUse(concepts[0], window=(0.0, 0.5)), ConceptUse(concepts[1])]
    return FusionPlan.build(tiny_pipe, uses, masks, prompt=PROMPT, steps=STEPS)


def state_of(unet):
    """Everything that attaching could touch: processors, hooks, weights, attributes."""
    return {
        path: (
            module.__dict__.get("processor"),
            list(module._forward_hooks),
            list(module._forward_pre_hooks),
            module.training,
            sorted(set(module.__dict__) | set(module._modules)),
        )
        for path, module in unet.named_modules()
    }, {name: tensor.clone() for name, tensor in unet.state_dict().items()}


def assert_same(before, after):
    assert before[0] == after[0]
    assert all(torch.equal(before[1][name], after[1][name]) for name in before[1])


def draw(pipe, plan, **arguments):
    return pipe(**(plan.pipeline_arguments() | {"output_type": "latent"} | arguments)).images


def test_restores_everything(tiny_pipe, plan):
    before = state_of(tiny_pipe.unet)
    plain = draw(tiny_pipe, plan)
    with attach(tiny_pipe, plan):
        fused = draw(tiny_pipe, plan)
        assert state_of(tiny_pipe.unet)[0] != before[0]
    assert_same(before, state_of(tiny_pipe.unet))
    assert torch.equal(plain, draw(tiny_pipe, plan)) and not torch.allclose(plain, fused)


def test_what_it_held_is_freed_when_it_is_left(tiny_pipe, plan):
    """Without waiting for Python's garbage collection: on a GPU it is a step's features and all keys and values."""
    with attach(tiny_pipe, plan) as state:
        draw(tiny_pipe, plan)
        held = weakref.ref(state)
    del state
    assert held() is None


def test_restores_after_an_exception_and_draws_the_same_again(tiny_pipe, plan):
    before = state_of(tiny_pipe.unet)

    def stop(pipe, step, timestep, arguments):
        if step == 1:
            raise RuntimeError("stopped in the middle")
        return arguments

    with pytest.raises(RuntimeError, match="middle"), attach(tiny_pipe, plan):
        draw(tiny_pipe, plan, callback_on_step_end=stop)
    assert_same(before, state_of(tiny_pipe.unet))
    with attach(tiny_pipe, plan):
        whole = draw(tiny_pipe, plan)
        with pytest.raises(RuntimeError, match="middle"):
            draw(tiny_pipe, plan, callback_on_step_end=stop)
        assert torch.equal(whole, draw(tiny_pipe, plan))


def test_nested_attach_is_an_error_and_the_outer_one_stays(tiny_pipe, plan, plan_from_noise):
    with attach(tiny_pipe, plan):
        first = draw(tiny_pipe, plan)
        with pytest.raises(WeaverError, match="already attached"), attach(tiny_pipe, plan_from_noise):
            pass
        assert torch.equal(first, draw(tiny_pipe, plan))


class Foreign(AttnProcessor2_0):
    calls = 0

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        Foreign.calls += 1
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)


UP = "up_blocks.1.attentions.{}.transformer_blocks.0.{}"


@pytest.mark.parametrize("path", [UP.format(0, "attn2"), UP.format(1, "attn1")], ids=["cross", "injected"])
def test_foreign_processors_are_an_error(tiny_pipe, plan, path):
    attention = tiny_pipe.unet.get_submodule(path)
    own, attention.processor = attention.processor, Foreign()
    try:
        with pytest.raises(WeaverError, match=f"{path} has a Foreign"), attach(tiny_pipe, plan):
            pass
        assert isinstance(attention.processor, Foreign)
    finally:
        attention.processor = own


def test_self_attention_that_is_not_injected_keeps_its_processor(tiny_pipe, plan):
    kept, replaced = (tiny_pipe.unet.get_submodule(UP.format(i, "attn1")) for i in (0, 1))
    own = kept.processor, replaced.processor
    kept.processor, replaced.processor = Foreign(), AttnProcessor()
    Foreign.calls = 0
    try:
        with attach(tiny_pipe, plan):
            assert isinstance(kept.processor, Foreign)
            draw(tiny_pipe, plan)
        assert Foreign.calls == STEPS and type(replaced.processor) is AttnProcessor
    finally:
        kept.processor, replaced.processor = own


def test_an_xformers_processor_of_cross_attention_rests_and_is_put_back(tiny_pipe, plan):
    """As `enable_xformers_memory_efficient_attention` leaves it; not run here, where there is no xformers."""
    expected = undisturbed(tiny_pipe, plan)
    cross = tiny_pipe.unet.get_submodule(UP.format(0, "attn2"))
    own, cross.processor = cross.processor, XFormersAttnProcessor()
    chosen = cross.processor
    try:
        with attach(tiny_pipe, plan):
            assert torch.equal(draw(tiny_pipe, plan), expected)
        assert cross.processor is chosen
    finally:
        cross.processor = own


def test_fused_projections_are_an_error_until_they_are_not(tiny_pipe, plan):
    pipe = copy.copy(tiny_pipe)
    pipe.unet = copy.deepcopy(tiny_pipe.unet)
    pipe.register_modules(unet=pipe.unet)
    pipe.fuse_qkv_projections(vae=False)
    with pytest.raises(WeaverError, match=r"of \d+ such\) has fused projections .*unfuse_qkv") as error:
        with attach(pipe, plan):
            pass
    assert str(error.value).count("fused projections") == 1
    pipe.unfuse_qkv_projections(vae=False)
    with attach(pipe, plan):
        assert torch.equal(draw(pipe, plan), undisturbed(tiny_pipe, plan))


def undisturbed(pipe, plan):
    with attach(pipe, plan):
        return draw(pipe, plan)


def test_processors_changed_within_the_block_are_an_error(tiny_pipe, plan):
    with attach(tiny_pipe, plan):
        tiny_pipe.unet.set_attn_processor(AttnProcessor())
        with pytest.raises(WeaverError, match="another processor than attach"):
            draw(tiny_pipe, plan)


def test_other_text_from_a_callback_is_an_error(tiny_pipe, plan):
    def change(pipe, step, timestep, tensors):
        return {"prompt_embeds": tensors["prompt_embeds"] * 2}

    arguments = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with attach(tiny_pipe, plan), pytest.raises(WeaverError, match="other prompts"):
        draw(tiny_pipe, plan, **arguments)


def test_a_loop_of_ones_own_says_every_step(tiny_pipe, plan_from_noise):
    plan, scheduler = plan_from_noise, ddim_scheduler(tiny_pipe.scheduler)
    scheduler.set_timesteps(3)
    z = torch.zeros(1, 4, *plan.size).double()
    with torch.no_grad(), attach(tiny_pipe.unet, plan, rows=["fused"]) as state:
        state.set_step(0, scheduler.timesteps)
        tiny_pipe.unet(z, scheduler.timesteps[0], plan.text[1:2])
        with pytest.raises(WeaverError, match="call set_step"):
            tiny_pipe.unet(z, scheduler.timesteps[1], plan.text[1:2])
        for step in (3, -1, 0.5):
            with pytest.raises(WeaverError, match="expected 0 to 2"):
                state.set_step(step, scheduler.timesteps)
        with pytest.raises(WeaverError, match="the scheduler's tensor"):
            state.set_step(0, scheduler.timesteps.tolist())


@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_several_images_a_prompt_are_what_each_is_alone(tiny_pipe, plan, guidance):
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3)).double()
    with attach(tiny_pipe, plan):
        together = draw(tiny_pipe, plan, num_images_per_prompt=2, latents=noise, guidance_scale=guidance)
        alone = torch.cat([draw(tiny_pipe, plan, latents=z[None], guidance_scale=guidance) for z in noise])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)


def test_two_runs_under_one_attach_are_equal(tiny_pipe, plan_from_noise):
    with attach(tiny_pipe, plan_from_noise):
        runs = [draw(tiny_pipe, plan_from_noise, generator=torch.Generator().manual_seed(2)) for _ in range(2)]
    assert torch.equal(*runs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_embeds": None, "prompt": "a fox, night"}, "other prompts"),
        ({"prompt_embeds": None, "prompt": "a dog and the cat, mountain"}, "other prompts"),
        ({"prompt_embeds": None, "prompt": "a dog and a cat, beach"}, "other prompts"),
        ({"negative_prompt_embeds": None, "negative_prompt": "ugly"}, "other prompts"),
        ({"prompt_embeds": None, "negative_prompt_embeds": None, "prompt": [PROMPT, "a fox"]}, "other prompts"),
        ({"height": 48, "latents": None}, "24 x 16, the plan is for 16 x 16"),
        ({"num_inference_steps": 4}, "num_inference_steps=3"),
    ],
    ids=["prompt", "article", "last-word", "negative", "several-prompts", "size", "steps"],
)
def test_a_call_that_is_not_the_plans_is_an_error(tiny_pipe, plan, arguments, message):
    if isinstance(arguments.get("prompt"), list):
        arguments = arguments | {"latents": plan.features.z_T.repeat(2, 1, 1, 1)}
    with pytest.raises(WeaverError, match=message), attach(tiny_pipe, plan):
        draw(tiny_pipe, plan, **arguments)


def test_text_may_differ_by_rounding_and_no_position_by_more(tiny_pipe, plan):
    """One word of many changes the mean over a prompt by less than a hundredth, and its own position by a third."""
    text = plan.text[1:2]
    word = text.clone()
    word[:, 5] *= 1.3
    with attach(tiny_pipe, plan):
        draw(tiny_pipe, plan, prompt_embeds=text.half().to(text))
        with pytest.raises(WeaverError, match="other prompts"):
            draw(tiny_pipe, plan, prompt_embeds=word)


def test_prompts_as_text_are_taken(tiny_pipe, plan):
    with attach(tiny_pipe, plan):
        texts = {"prompt": PROMPT, "prompt_embeds": None, "negative_prompt_embeds": None}
        assert torch.equal(draw(tiny_pipe, plan, **texts), draw(tiny_pipe, plan))


def test_another_scheduler_from_noise(tiny_pipe, plan_from_noise):
    """PNDM calls the U-Net twice at one timestep, and windows follow the scheduler's own count."""
    own = tiny_pipe.scheduler
    tiny_pipe.scheduler = PNDMScheduler.from_config(own.config, skip_prk_steps=True)
    try:
        with attach(tiny_pipe, plan_from_noise) as state:
            seen = []
            hook = tiny_pipe.unet.register_forward_hook(lambda *_: seen.append(state._step))
            draw(tiny_pipe, plan_from_noise, num_inference_steps=5, generator=torch.Generator().manual_seed(0))
            hook.remove()
    finally:
        tiny_pipe.scheduler = own
    assert seen == [(i, 6) for i in range(6)]


def test_from_noise_any_number_of_steps_will_do(tiny_pipe, plan_from_noise):
    with attach(tiny_pipe, plan_from_noise):
        images = draw(tiny_pipe, plan_from_noise, num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    assert torch.isfinite(images).all()


def test_rows_are_never_guessed(tiny_pipe, plan, plan_from_noise):
    text = plan.text[[0, 1]]
    z = plan.features.z_T.repeat(2, 1, 1, 1)
    timesteps = plan.features.timesteps
    with pytest.raises(WeaverError, match="pass rows="), attach(tiny_pipe.unet, plan):
        pass
    with pytest.raises(WeaverError, match="attach to pipe.unet"), attach(tiny_pipe, plan, rows=("fused",)):
        pass
    with pytest.raises(WeaverError, match="'source', expected"), attach(tiny_pipe.unet, plan, rows=("source", "fused")):
        pass
    with attach(tiny_pipe.unet, plan, rows=("negative", "fused")) as state, torch.no_grad():
        with pytest.raises(WeaverError, match="set_step"):
            tiny_pipe.unet(z, timesteps[0], text)
        state.set_step(0, timesteps)
        output = tiny_pipe.unet(z, timesteps[0], text).sample
        with pytest.raises(WeaverError, match="batch has 1 rows, 2 were declared"):
            tiny_pipe.unet(z[:1], timesteps[0], text[:1])
        with pytest.raises(WeaverError, match="features are for 3 DDIM steps"):
            state.set_step(0, timesteps[:2])
    with attach(tiny_pipe.unet, plan, rows=("fused", "negative")) as state, torch.no_grad():
        state.set_step(0, timesteps)
        turned = tiny_pipe.unet(z, timesteps[0], text).sample
    torch.testing.assert_close(output, turned.flip(0), rtol=1e-10, atol=1e-10)


def test_gradients_are_refused(tiny_pipe, plan):
    features = plan.features
    with attach(tiny_pipe.unet, plan, rows=("fused",)) as state:
        state.set_step(0, features.timesteps)
        with pytest.raises(WeaverError, match=r"inference only.*no_grad"):
            tiny_pipe.unet(features.z_T, features.timesteps[0], plan.text[1:2])


def test_weights_are_written_over_where_a_window_ends(tiny_pipe, plan_from_noise):
    """One `ContextPlan` a size for as long as the rows are the same, at the same addresses."""
    seen = []
    with attach(tiny_pipe, plan_from_noise) as state:

        def look(*_):
            contexts = {plan_from_noise.sizes[path]: reads.routes.plan for path, reads in state.context_reads.items()}
            seen.append((contexts, {size: made.weights[-1].clone() for size, made in contexts.items()}))

        hook = tiny_pipe.unet.register_forward_hook(look)
        for _ in range(2):
            draw(tiny_pipe, plan_from_noise, generator=torch.Generator().manual_seed(0))
        draw(tiny_pipe, plan_from_noise, guidance_scale=1.0, generator=torch.Generator().manual_seed(0))
        hook.remove()
    made = seen[0][0]
    assert set(made) == set(plan_from_noise.sizes.values())
    for step, (contexts, weights) in enumerate(seen[: 2 * STEPS]):
        assert contexts == made  # the same objects
        phase = plan_from_noise.phase_at(step % STEPS / STEPS)
        assert all(torch.equal(weights[size], plan_from_noise.weights[phase, size][1, 0]) for size in made)
    for contexts, _ in seen[2 * STEPS :]:
        assert all(len(contexts[size].weights) == 1 for size in made)


def test_inference_mode_and_no_grad_may_alternate(tiny_pipe, plan_from_noise):
    with attach(tiny_pipe, plan_from_noise):
        runs = []
        for mode in (torch.inference_mode, torch.no_grad):
            with mode():
                runs.append(draw(tiny_pipe, plan_from_noise, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(*runs)


def test_a_unet_called_before_its_pipeline_is_an_error(tiny_pipe, plan):
    fresh = StableDiffusionPipeline(**tiny_pipe.components, requires_safety_checker=False)
    with pytest.raises(WeaverError, match="before its pipeline"), attach(fresh, plan):
        tiny_pipe.unet(plan.features.z_T, plan.features.timesteps[0], plan.text[:1])


def test_other_pipelines_are_an_error(tiny_pipe, plan):
    other = StableDiffusionInstructPix2PixPipeline(**tiny_pipe.components, requires_safety_checker=False)
    with pytest.raises(WeaverError, match="rows of a StableDiffusionInstructPix2PixPipeline are not known"):
        with attach(other, plan):
            pass


def test_a_plan_for_another_unet_or_dtype_is_an_error(tiny_pipe, tiny_pipe_v, plan):
    tiny_pipe.unet.to(torch.float32)
    try:
        with pytest.raises(WeaverError, match="after moving the pipeline"), attach(tiny_pipe, plan):
            pass
    finally:
        tiny_pipe.unet.to(torch.float64)
    with pytest.raises(WeaverError, match="UNet2DConditionModel"), attach(tiny_pipe.vae, plan, rows=("fused",)):
        pass
    with pytest.raises(WeaverError, match="another U-Net of the same shape"), attach(make_pipeline(seed=7), plan):
        pass
    with pytest.raises(WeaverError, match="a NoneType: make it by FusionPlan.build"), attach(tiny_pipe, None):
        pass
    for rows in ([], 3, "fused"):
        with pytest.raises(WeaverError, match="expected what each row"), attach(tiny_pipe.unet, plan, rows=rows):
            pass
