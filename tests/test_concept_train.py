"""Custom Diffusion training: what is learned, what is left alone, and that it is learned."""

import copy
import re
import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from weaver.concepts.concept import ConceptError, attn2_hash, attn2_projections
from weaver.concepts.encoding import encode
from weaver.concepts.images import TrainingSet
from weaver.concepts.objective import Objective
from weaver.concepts.prior import class_pictures
from weaver.concepts.prompts import PromptError
from weaver.concepts.settings import TrainSettings
from weaver.concepts.train import train_concept
from weaver.concepts.training_state import added
from weaver.errors import WeaverError
from weaver.layers import transformer_linears
from weaver_kernels import LowRank

FAST = TrainSettings(steps=2, learning_rate=1e-3, batch=1, prior_batch=1, prior_images=2, prior_steps=1)
ALONE = replace(FAST, prior_batch=0)
NAMES = {"token": "<v1>", "word": "cat"}


def pictures(count=2, seed=0, size=(32, 32)):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for _ in range(count)]


PRIOR = TrainingSet(tuple(pictures(3, seed=9)), ("a cat", "a dog, beach background", "a cat"))


def with_tiny_autoencoder(pipe):
    """The same pipeline around an autoencoder that encodes to latents, not to a distribution."""
    from diffusers import AutoencoderTiny

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
            latent_channels=4,
        )
    vae.register_to_config(block_out_channels=(8, 8))
    other = copy.copy(pipe)
    other.vae = vae.to(pipe.unet.dtype)
    return other


def equal(a, b):
    groups = [(x.deltas | x.embeddings) for x in (a, b)]
    return all(torch.equal(value, groups[1][key]) for key, value in groups[0].items())


@pytest.fixture(scope="module")
def made(tiny_pipe):
    """Learned with prior pictures that the base model makes."""
    return train_concept(tiny_pipe, pictures(), **NAMES, settings=FAST)


@pytest.fixture(scope="module")
def alone(tiny_pipe):
    """Learned without prior pictures."""
    return train_concept(tiny_pipe, pictures(), **NAMES, settings=ALONE)


def test_more_steps_of_class_pictures_than_the_schedule_has_are_told(tiny_pipe):
    with pytest.raises(WeaverError, match="prior_steps: is 1000, expected a whole number from 1 to 999"):
        train_concept(tiny_pipe, pictures(), **NAMES, settings=replace(FAST, prior_steps=1000))


def test_the_base_is_left_as_it_was_bit_for_bit(tiny_pipe):
    modules = {"unet": tiny_pipe.unet, "text": tiny_pipe.text_encoder, "vae": tiny_pipe.vae}
    before = {(n, key): value.clone() for n, m in modules.items() for key, value in m.state_dict().items()}
    flags = {(n, key): p.requires_grad for n, m in modules.items() for key, p in m.named_parameters()}
    words, processors = len(tiny_pipe.tokenizer), dict(tiny_pipe.unet.attn_processors)
    train_concept(tiny_pipe, pictures(), **NAMES, prior=PRIOR, settings=FAST)
    for name, module in modules.items():
        assert all(torch.equal(value, before[name, key]) for key, value in module.state_dict().items())
        assert all(p.requires_grad == flags[name, key] for key, p in module.named_parameters())
        assert all(p.grad is None for p in module.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
        assert not module.training
    assert len(tiny_pipe.tokenizer) == words
    assert tiny_pipe.unet.attn_processors == processors


def test_only_keys_values_and_the_token_receive_gradients(tiny_pipe, monkeypatch):
    optimised, ungrown, others = set(), set(), []

    class Spy(torch.optim.AdamW):
        def step(self, closure=None):
            given = [p for group in self.param_groups for p in group["params"]]
            optimised.update(map(id, given))
            ungrown.update(id(p) for p in given if p.grad is None)
            others.extend(
                name
                for module in (tiny_pipe.unet, tiny_pipe.text_encoder, tiny_pipe.vae)
                for name, p in module.named_parameters()
                if p.grad is not None
            )
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    concept = train_concept(tiny_pipe, pictures(), **NAMES, prior=PRIOR, settings=FAST)
    assert len(optimised) == len(attn2_projections(tiny_pipe.unet)) + 1 == 33
    assert not ungrown and not others
    assert concept.deltas.keys() == attn2_projections(tiny_pipe.unet).keys()
    assert all(delta.abs().sum() > 0 for delta in concept.deltas.values())


def test_the_token_starts_as_its_class_word_and_moves(tiny_pipe):
    ids = tiny_pipe.tokenizer("cat", add_special_tokens=False).input_ids
    start = tiny_pipe.text_encoder.get_input_embeddings().weight[ids].float()
    slow = replace(ALONE, token_learning_rate=1e-9, vectors=2)
    vectors = train_concept(tiny_pipe, pictures(), **NAMES, settings=slow).embeddings["text_encoder"]
    torch.testing.assert_close(vectors, start.expand(2, -1))
    vectors = train_concept(tiny_pipe, pictures(), **NAMES, settings=ALONE).embeddings["text_encoder"]
    assert vectors.shape == (1, 16) and not torch.allclose(vectors, start)


@pytest.mark.parametrize(
    ("prediction", "autoencoder", "rank", "layers"),
    [
        ("epsilon", "kl", 0, "keys-values"),
        ("v", "tiny", 0, "keys-values"),
        ("epsilon", "kl", 4, "keys-values"),
        ("epsilon", "kl", 2, "all"),
    ],
)
def test_what_is_learned_lowers_the_loss(tiny_pipe, tiny_pipe_v, prediction, autoencoder, rank, layers):
    """Measured apart from training, with the concept's weights written into a copy of the model."""
    pipe = tiny_pipe if prediction == "epsilon" else tiny_pipe_v
    pipe = pipe if autoencoder == "kl" else with_tiny_autoencoder(pipe)
    settings = replace(ALONE, steps=40, rank=rank, layers=layers, learning_rate=5e-3, batch=2)
    images = pictures(1)
    concept = train_concept(pipe, images, **NAMES, settings=settings, progress=False)
    unet = copy.deepcopy(pipe.unet)
    base = loss_of(pipe, unet, images[0], encode(pipe, "a cat cat").text)
    with torch.no_grad():
        changes = dict(concept.deltas) | dict(concept.outside)
        assert changes.keys() >= transformer_linears(unet).keys() if layers == "all" else not concept.outside
        for path, delta in changes.items():
            assert isinstance(delta, LowRank) == bool(rank) and (not rank or delta.down.shape[0] == rank)
            unet.get_submodule(path).weight += (delta.up.float() @ delta.down.float()) if rank else delta
    learned = loss_of(pipe, unet, images[0], encode(pipe, "a <v1> cat", concept).text)
    assert learned < 0.97 * base


@torch.no_grad()
def loss_of(pipe, unet, image, text):
    from diffusers import DDPMScheduler

    from weaver.latents import encode_image

    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    z = encode_image(pipe.vae, image).expand(16, -1, -1, -1)
    t = torch.arange(16) * 60 + 30
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(7)).to(z)
    velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(z, noise, t) if velocity else noise
    predicted = unet(scheduler.add_noise(z, noise, t), t, encoder_hidden_states=text.expand(16, -1, -1)).sample
    return (predicted - target).square().mean().item()


def test_training_adds_what_a_reader_of_the_deltas_adds(tiny_pipe, alone):
    """The hooks of training and weights with the delta added are one and the same model."""
    concept = alone
    z, text = torch.ones(1, 4, 16, 16, dtype=torch.float64), encode(tiny_pipe, "a <v1> cat", concept).text
    unet = copy.deepcopy(tiny_pipe.unet)
    with torch.no_grad():
        with added(tiny_pipe.unet, concept.deltas):
            hooked = tiny_pipe.unet(z, 300, encoder_hidden_states=text).sample
        for path, delta in concept.deltas.items():
            unet.get_submodule(path).weight += delta
        torch.testing.assert_close(unet(z, 300, encoder_hidden_states=text).sample, hooked)


def test_same_seed_same_concept(tiny_pipe, made, alone):
    torch.manual_seed(2)
    assert equal(made, train_concept(tiny_pipe, pictures(), **NAMES, settings=FAST))
    assert not equal(alone, train_concept(tiny_pipe, pictures(), **NAMES, settings=replace(ALONE, seed=1)))


def test_prior_preservation_takes_part(tiny_pipe, made, alone):
    given = train_concept(tiny_pipe, pictures(), **NAMES, prior=PRIOR, settings=FAST)
    weightless = train_concept(tiny_pipe, pictures(), **NAMES, prior=PRIOR, settings=replace(FAST, prior_weight=0.0))
    assert not equal(given, weightless) and not equal(given, made)
    recorded = [concept.settings["prior"] for concept in (given, made, alone)]
    assert recorded == ["given", "made by the base model", "none"]


def test_what_it_was_trained_with_is_recorded(tiny_pipe, tmp_path):
    concept = train_concept(tiny_pipe, pictures(), **NAMES, name="tuxedo", settings=ALONE)
    read = type(concept).load(concept.save(tmp_path / "c.safetensors"))
    assert (read.name, read.token, read.word) == ("tuxedo", "<v1>", "cat")
    assert read.base_hash == attn2_hash(tiny_pipe.unet)
    assert read.settings["steps"] == 2 and read.settings["learning_rate"] == 1e-3 and read.settings["seed"] == 0
    assert read.settings["pictures"] == 2 and read.settings["captions"] == ["a <v1> cat"]
    assert read.versions["torch"] == torch.__version__.split("+")[0] or read.versions["torch"] == torch.__version__
    read.check_base(tiny_pipe)


def test_the_name_is_the_token_without_brackets(alone):
    assert alone.name == "v1"


def test_pictures_of_other_sizes_and_captions_of_ones_own(tiny_pipe):
    images = pictures(1, size=(50, 90)) + pictures(1, size=(20, 20))
    captions = ["a <v1> cat, beach background", "a dog and a <v1> cat at night"]
    concept = train_concept(tiny_pipe, images, captions, **NAMES, settings=replace(ALONE, flip=True))
    assert concept.settings["captions"] == sorted(captions)


def test_progress_is_told_or_shown_on_terminals_only(tiny_pipe, capfd):
    told = []
    train_concept(tiny_pipe, pictures(), **NAMES, settings=FAST, progress=lambda *numbers: told.append(numbers))
    assert told == [(2, 4), (3, 4), (4, 4)]
    train_concept(tiny_pipe, pictures(), **NAMES, settings=ALONE)
    assert capfd.readouterr() == ("", "")


def test_progress_tells_the_running_mean_of_the_loss_to_those_who_take_it(tiny_pipe, monkeypatch):
    told, losses = [], []
    monkeypatch.setattr(Objective, "loss", lambda self, batch, real=Objective.loss: kept(losses, real(self, batch)))
    settings = replace(FAST, steps=4)
    train_concept(
        tiny_pipe, pictures(), **NAMES, settings=settings,
        progress=lambda done, total, loss=None: told.append((done, total, loss)),
    )  # fmt: skip
    assert [one[:2] for one in told] == [(done, 6) for done in (2, 3, 4, 5, 6)] and told[0][2] is None
    for count, (_, _, mean) in enumerate(told[1:], 1):
        assert mean == pytest.approx(np.average(losses[:count], weights=0.98 ** np.arange(count)[::-1]))


def kept(losses, found):
    losses.append(found.total.item())
    return found


def test_the_bar_shows_loss_and_time_left(tiny_pipe, monkeypatch, capfd):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    train_concept(tiny_pipe, pictures(), **NAMES, settings=replace(ALONE, steps=8))
    assert re.search(r"learning <v1> cat: +\d+%.*/8 \[00:0\d<00:0\d, .*loss \d\.\d{4}\]", capfd.readouterr().err)


@pytest.mark.parametrize("black", [{1, 2, 4}, set(range(100))], ids=["some", "all"])
def test_class_pictures_that_the_safety_checker_blacks_out_are_made_anew(tiny_pipe, black):
    made = []

    class Checked(type(tiny_pipe)):
        def __call__(self, *args, **kwargs):
            output = super().__call__(*args, **kwargs)
            numbers = range(len(made), len(made) + len(output.images))
            made.extend(output.images)
            output.nsfw_content_detected = [number in black for number in numbers]
            return output

    checked = Checked(**tiny_pipe.components, requires_safety_checker=False)
    settings, done = replace(FAST, prior_images=5), []
    if len(black) > 5:
        with pytest.raises(WeaverError, match="safety checker of Checked blacked out 8 of 8 pictures of 'a cat'"):
            class_pictures(checked, "cat", settings, done.append)
        return
    pictures = class_pictures(checked, "cat", settings, done.append)
    kept = [image.tobytes() for number, image in enumerate(made) if number not in black]
    assert [image.tobytes() for image in pictures.images] == kept and len(set(kept)) == done[-1] == 5


def test_paper_defaults():
    settings = TrainSettings()
    assert (settings.steps, settings.learning_rate) == (500, 1e-5)
    assert TrainSettings(rank=4).learning_rate == 1e-4 and TrainSettings(rank=4, learning_rate=2.0).learning_rate == 2
    assert TrainSettings.embedded(steps=7).steps == 7
    assert TrainSettings.embedded().token_learning_rate > settings.learning_rate


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0, expected a whole number, 1 or more"),
        ({"steps": 0, "batch": -1}, "steps is 0.*batch is -1"),
        ({"accumulate": 0}, "accumulate is 0, expected a whole number, 1 or more"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0, expected a finite number, more than 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"steps": 2.5}, "steps is 2.5, expected a whole number, 1 or more"),
        ({"prior_steps": 0}, "prior_steps is 0, expected a whole number"),
        ({"prior_guidance": float("nan")}, "prior_guidance is nan, expected a finite number, 0 or more"),
        ({"prior_weight": float("inf")}, "prior_weight is inf, expected a finite number"),
        ({"optimiser": "sgd"}, "optimiser is 'sgd', expected adamw or muon"),
        ({"final_rate": 2.0}, "final_rate is 2.0, expected a number in 0..1"),
    ],
)
def test_impossible_settings(changes, message):
    with pytest.raises(WeaverError, match=message):
        TrainSettings(**changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": []}, "no pictures to learn from"),
        ({"captions": ["a <v1> cat"]}, "2 pictures and 1 captions"),
        ({"captions": ["a cat"] * 2}, "token '<v1>' is not in its prompt 'a cat'"),
        (
            {"prior": TrainingSet(tuple(pictures(1)), ("a <v1> cat",))},
            "token '<v1>' stands in 'a <v1> cat', a caption of",
        ),
        ({"word": " "}, "class word ' ' means nothing"),
        ({"token": "<rex> dog"}, "token '<rex> dog' is empty or has white space in it; write one such as '<v1>'"),
        ({"token": "<>"}, "token '<>' is empty"),
        ({"token": "cat", "captions": ["a cat cat"] * 2}, "token 'cat' stands in the class word 'cat'; .* '<cat>'"),
        (
            {"images": pictures(2, size=(32, 3))},
            r"cannot train .*picture 1 has 3 x 32 pixels \(as 1 more\), too few to learn from; .* 4 and more",
        ),
    ],
)
def test_unusable_input(tiny_pipe, arguments, message):
    with pytest.raises(WeaverError, match=message):
        train_concept(tiny_pipe, **{"images": pictures(), **NAMES, "settings": FAST} | arguments)


def test_a_scheduler_that_predicts_something_else(tiny_pipe):
    other = copy.copy(tiny_pipe)
    other.scheduler = type(tiny_pipe.scheduler).from_config(tiny_pipe.scheduler.config, prediction_type="sample")
    with pytest.raises(WeaverError, match="predicts 'sample'; expected 'epsilon' or 'v_prediction'"):
        train_concept(other, pictures(), **NAMES, settings=ALONE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_in_half_precision(tiny_pipe, alone, dtype):
    half = copy.copy(tiny_pipe)
    for name in ("unet", "text_encoder", "vae"):
        setattr(half, name, copy.deepcopy(getattr(tiny_pipe, name)).to(dtype))
    concept = train_concept(half, pictures(), **NAMES, settings=ALONE)
    learned = torch.cat([delta.flatten() for delta in concept.deltas.values()]).float()
    expected = torch.cat([delta.flatten() for delta in alone.deltas.values()]).float()
    assert torch.cosine_similarity(learned, expected, dim=0) > 0.8


def test_a_step_whose_gradients_overflow_does_not_move_the_schedule(tiny_pipe, monkeypatch):
    """Half precision begins with a scale that may be too large; a step left out is none of the learning rate's."""
    half = copy.copy(tiny_pipe)
    for name in ("unet", "text_encoder", "vae"):
        setattr(half, name, copy.deepcopy(getattr(tiny_pipe, name)).half())
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**60))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        concept = train_concept(half, pictures(), **NAMES, settings=ALONE)
    assert not any(delta.any() for delta in concept.deltas.values())  # both steps were left out
    word = tiny_pipe.tokenizer.convert_tokens_to_ids("cat</w>")
    embedding = half.text_encoder.get_input_embeddings().weight[word]
    assert torch.equal(concept.embeddings["text_encoder"][0], embedding.float())


def test_checkpointing_learns_the_same_and_is_put_back(tiny_pipe, alone):
    unet, calls = tiny_pipe.unet, []
    handle = unet.up_blocks[1].resnets[1].register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        concept = train_concept(tiny_pipe, pictures(), **NAMES, settings=replace(ALONE, checkpointing=True))
    finally:
        handle.remove()
    assert len(calls) == 2 * ALONE.steps  # forward, and again in the backward pass
    assert not unet.is_gradient_checkpointing
    for path, delta in concept.deltas.items():
        torch.testing.assert_close(delta, alone.deltas[path])


def test_divergence_is_told_and_cleaned_up(tiny_pipe):
    with pytest.raises(ConceptError, match=r"training diverged at step \d+ of 20: lower the learning rate"):
        train_concept(tiny_pipe, pictures(), **NAMES, settings=replace(ALONE, steps=20, learning_rate=1e37))
    assert not any(module._forward_hooks for module in tiny_pipe.unet.modules())
    assert any(p.requires_grad for p in tiny_pipe.unet.parameters())


def test_errors_are_one_kind():
    assert issubclass(ConceptError, WeaverError) and issubclass(PromptError, WeaverError)
