"""Custom Diffusion training of SDXL: two text encoders, a pooled embedding and time ids, by the same path."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from jobs import TRAINED, job_of
from PIL import Image
from test_concept_train import ALONE, FAST, NAMES, PRIOR, pictures

from benchmarks.timing import host_peak
from weaver.concepts.changes import parts_of
from weaver.concepts.concept import Concept, attn2_projections
from weaver.concepts.encoding import encode
from weaver.concepts.examples import prepare
from weaver.concepts.framing import Framing
from weaver.concepts.images import TrainingSet, load_images
from weaver.concepts.settings import TrainSettings
from weaver.concepts.train import train_concept
from weaver.concepts.views import with_views
from weaver.errors import WeaverError
from weaver.job.inputs import training_pictures
from weaver.latents import encode_image
from weaver.memory.ledger import Ledger
from weaver.memory.plans import MemoryPlan
from weaver.memory.shapes import load_shapes
from weaver.memory.training import training_peaks

ENCODERS = ("text_encoder", "text_encoder_2")


def tensors(concept: Concept) -> list[torch.Tensor]:
    parts = [part for key in sorted(concept.deltas) for part in parts_of(concept.deltas[key]).values()]
    return parts + [concept.embeddings[name] for name in sorted(concept.embeddings)]


def same(a: Concept, b: Concept) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


@pytest.fixture(scope="module")
def sdxl_folder(sdxl, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdxl")
    sdxl.save_pretrained(folder)
    return folder


def test_only_keys_values_and_the_two_tokens_receive_gradients(tiny_sdxl, monkeypatch):
    parts = [tiny_sdxl.unet, tiny_sdxl.vae, *(getattr(tiny_sdxl, name) for name in ENCODERS)]
    before = [p.clone() for part in parts for p in part.parameters()]
    optimised, ungrown, others = set(), set(), []

    class Spy(torch.optim.AdamW):
        def step(self, closure=None):
            given = [p for group in self.param_groups for p in group["params"]]
            optimised.update(map(id, given))
            ungrown.update(id(p) for p in given if p.grad is None or not p.grad.any())
            others.extend(p for part in parts for p in part.parameters() if p.grad is not None)
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    concept = train_concept(tiny_sdxl, pictures(), **NAMES, prior=PRIOR, settings=FAST)
    projections = attn2_projections(tiny_sdxl.unet)
    assert len(optimised) == len(projections) + 2 and not ungrown and not others
    assert concept.deltas.keys() == projections.keys() and tuple(concept.embeddings) == ENCODERS
    assert [tuple(concept.embeddings[name].shape) for name in ENCODERS] == [(1, 16), (1, 24)]
    concept.check_base(tiny_sdxl)
    after = [p for part in parts for p in part.parameters()]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert not any(m._forward_hooks for part in parts[:2] for m in part.modules())
    assert not any(part.get_input_embeddings()._forward_hooks for part in parts[2:])
    assert not any(m.training for part in parts for m in part.modules())


def test_the_tokens_start_as_their_class_word_in_each_encoder(tiny_sdxl):
    slow = replace(ALONE, token_learning_rate=1e-9, vectors=2)
    concept = train_concept(tiny_sdxl, pictures(), **NAMES, settings=slow)
    for name, tokenizer in zip(ENCODERS, (tiny_sdxl.tokenizer, tiny_sdxl.tokenizer_2), strict=True):
        (number,) = tokenizer("cat", add_special_tokens=False).input_ids
        start = getattr(tiny_sdxl, name).get_input_embeddings().weight[number].float()
        torch.testing.assert_close(concept.embeddings[name], start.expand(2, -1))


def written_in(pipe, concept: Concept):
    """A pipeline whose weights and token are the concept's, as the library has them: to be used without ours."""
    pipe = copy.copy(pipe)
    for suffix in ("", "_2"):
        tokenizer = copy.deepcopy(getattr(pipe, f"tokenizer{suffix}"))
        encoder = copy.deepcopy(getattr(pipe, f"text_encoder{suffix}"))
        tokenizer.add_tokens(concept.token)
        encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        encoder.get_input_embeddings().weight.data[-1] = concept.embeddings[f"text_encoder{suffix}"][0]
        setattr(pipe, f"tokenizer{suffix}", tokenizer)
        setattr(pipe, f"text_encoder{suffix}", encoder)
    pipe.unet = copy.deepcopy(pipe.unet)
    for path, delta in concept.deltas.items():
        change = delta if isinstance(delta, torch.Tensor) else delta.up.double() @ delta.down.double()
        pipe.unet.get_submodule(path).weight.data += change
    return pipe


@torch.no_grad()
def loss_of(pipe, image, prompt: str) -> float:
    """The loss on one picture of the model's size, through the library's own prompts, time ids and noise."""
    from diffusers import DDPMScheduler

    text, _, pooled, _ = pipe.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    z = encode_image(pipe.vae, image).expand(16, -1, -1, -1)
    t = torch.arange(16) * 60 + 30
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(7)).to(z)
    ids = pipe._get_add_time_ids((32, 32), (0, 0), (32, 32), text.dtype, 10).expand(16, -1)
    added = {"text_embeds": pooled.expand(16, -1), "time_ids": ids}
    velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(z, noise, t) if velocity else noise
    found = pipe.unet(scheduler.add_noise(z, noise, t), t, text.expand(16, -1, -1), added_cond_kwargs=added).sample
    return (found - target).square().mean().item()


@pytest.mark.parametrize("rank", [0, 4], ids=["matrices", "lora"])
def test_what_is_learned_lowers_the_loss_of_the_stock_pipeline(tiny_sdxl, rank):
    settings = replace(ALONE, steps=30, rank=rank, learning_rate=5e-3, batch=2)
    images = pictures(1)
    concept = train_concept(tiny_sdxl, images, **NAMES, settings=settings, progress=False)
    stock = written_in(tiny_sdxl, concept)
    text, _, pooled, _ = stock.encode_prompt("a <v1> cat", device="cpu", do_classifier_free_guidance=False)
    ours = encode(tiny_sdxl, "a <v1> cat", concept)
    torch.testing.assert_close(ours.text, text)
    torch.testing.assert_close(ours.pooled, pooled)
    assert loss_of(stock, images[0], "a <v1> cat") < 0.97 * loss_of(tiny_sdxl, images[0], "a cat cat")


def time_ids_of(pipe, images, **settings) -> set[tuple[float, ...]]:
    """All time ids that the U-Net is given while it learns from pictures without any others."""
    seen = set()
    hook = pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(map(tuple, kwargs["added_cond_kwargs"]["time_ids"].tolist())),
        with_kwargs=True,
    )
    try:
        train_concept(pipe, images, **NAMES, settings=replace(ALONE, batch=3, steps=4, **settings))
    finally:
        hook.remove()
    return seen


def test_pictures_are_told_to_be_what_they_are(tiny_sdxl):
    """Resized to cover 32 x 32: 50 x 90 to 32 x 57.6, 96 x 48 to 64 x 32; cut about their centres."""
    images = pictures(1) + pictures(1, size=(50, 90)) + pictures(1, size=(96, 48))
    expected = {(32, 32, 0, 0, 32, 32), (50, 90, 0, 13, 32, 32), (96, 48, 16, 0, 32, 32)}
    assert time_ids_of(tiny_sdxl, images) == expected
    given = TrainingSet(tuple(pictures(1)), ("a <v1> cat",), framings=(Framing(64, 100, 0, 4, 0, 14),))
    assert time_ids_of(tiny_sdxl, given, flip=True) == {(64, 100, 0, 4, 32, 32), (64, 100, 0, 14, 32, 32)}
    with pytest.raises(WeaverError, match="2 pictures and 1 framings"):
        TrainingSet(tuple(pictures(2)), ("a <v1> cat",) * 2, framings=(None,))


def test_views_are_told_to_be_crops_or_whole_pictures():
    """A point of the photograph lies in a closer view where its time ids say; a canvas is larger than what is on it."""
    photograph = Image.new("RGB", (60, 40))
    data = with_views(TrainingSet((photograph,), ("a <v1> cat",)), "<v1>", (32, 32), 40)
    assert data.framings[0] == Framing(40, 60, 0, 8, 0, 8)  # resized to 32 x 48
    kinds = set()
    for mask, framing in list(zip(data.masks, data.framings, strict=True))[1:]:
        closer = mask.getextrema() == (255, 255)
        kinds.add(closer)
        if closer:
            scale = (framing.top + 32 + framing.bottom) / 32
            assert 1.2 <= scale <= 1.4 and (framing.height, framing.width) == (40, 60)
            assert framing.left + 32 + framing.right == pytest.approx(scale * 48)
            assert framing.left >= scale * 8 and framing.top >= 0
        else:
            shown = mask.getbbox()
            assert framing[2:] == (0, 0, 0, 0) and framing.height == framing.width
            assert framing.height == pytest.approx(32 * 40 / (shown[3] - shown[1]), rel=0.06)  # 40 pixels high there
    assert kinds == {True, False}


def test_time_ids_are_none_of_stable_diffusions(tiny_pipe, tiny_sdxl):
    data = TrainingSet(tuple(pictures(2)), ("a <v1> cat",) * 2)
    assert prepare(tiny_pipe, data, "<v1>").time_ids is None
    found = prepare(tiny_sdxl, data, "<v1>")
    assert found.time_ids.shape == (2, 6) and tuple(found.captions) == ENCODERS


def test_prior_pictures_are_made_or_given(tiny_sdxl):
    made = train_concept(tiny_sdxl, pictures(), **NAMES, settings=FAST)
    again = train_concept(tiny_sdxl, pictures(), **NAMES, settings=FAST)
    given = train_concept(tiny_sdxl, pictures(), **NAMES, prior=PRIOR, settings=FAST)
    light = train_concept(tiny_sdxl, pictures(), **NAMES, prior=PRIOR, settings=replace(FAST, prior_weight=0.0))
    assert made.settings["prior"] == "made by the base model" and given.settings["prior"] == "given"
    assert same(made, again) and not same(made, given) and not same(given, light)


def test_an_interrupted_training_ends_as_a_whole_one(tiny_sdxl, tmp_path):
    settings, file = replace(FAST, steps=5, batch=2, views=1), tmp_path / "rex.checkpoint"

    def stop(done, total):
        if done == 3:
            raise KeyboardInterrupt

    given = {**NAMES, "prior": PRIOR, "settings": settings}
    with pytest.raises(KeyboardInterrupt):
        train_concept(tiny_sdxl, pictures(), **given, checkpoint=file, checkpoint_every=2, progress=stop)
    assert file.exists()
    seen = []
    again = train_concept(
        tiny_sdxl, pictures(), **given, checkpoint=file, progress=lambda done, total: seen.append(done)
    )
    assert seen == [3, 4, 5] and not file.exists()
    assert same(again, train_concept(tiny_sdxl, pictures(), **given))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_in_half_precision(tiny_sdxl, dtype):
    half = copy.copy(tiny_sdxl)
    for name in ("unet", "vae", *ENCODERS):
        setattr(half, name, copy.deepcopy(getattr(tiny_sdxl, name)).to(dtype))
    concept, whole = (train_concept(pipe, pictures(), **NAMES, settings=ALONE) for pipe in (half, tiny_sdxl))
    learned, expected = (torch.cat([x.flatten() for x in c.deltas.values()]).float() for c in (concept, whole))
    assert torch.cosine_similarity(learned, expected, dim=0) > 0.8
    assert half.vae.dtype == dtype


def test_the_refiner_is_refused(tiny_sdxl):
    config = tiny_sdxl.unet.config
    before = config["projection_class_embeddings_input_dim"]
    tiny_sdxl.unet.register_to_config(projection_class_embeddings_input_dim=before - 4)
    try:
        with pytest.raises(
            WeaverError, match="cannot train <v1> cat: the U-Net takes 5 time ids, .*use the base model"
        ):
            train_concept(tiny_sdxl, pictures(), **NAMES, settings=ALONE)
    finally:
        tiny_sdxl.unet.register_to_config(projection_class_embeddings_input_dim=before)


def test_the_estimate_is_within_15_percent_of_the_allocators_record(sdxl, sdxl_folder, job_folder):
    """Without the model's weights, which are there before."""
    job = job_of(job_folder, concepts=[TRAINED])
    model = load_shapes(str(sdxl_folder), device="cpu", dtype=torch.float32, fuses=False)
    told = training_peaks(job, model, MemoryPlan(), Ledger("cpu"))
    weights = sum(x.untyped_storage().nbytes() for x in model.tensors())
    spec = job.concepts[0]
    pictures_ = load_images(training_pictures(spec), spec.train.token, spec.word)
    settings = TrainSettings(**dict(spec.train.settings))
    names = {"token": spec.train.token, "word": spec.word}
    taken = host_peak(lambda: train_concept(sdxl, pictures_, **names, settings=settings))
    assert set(told) == {"class pictures", "training"}
    found = max(peak.total for peak in told.values()) - weights
    assert abs(found - taken) <= 0.15 * taken


def test_on_the_command_line(sdxl, sdxl_folder, job_folder, tmp_path, capsys):
    from weaver.cli import main

    out = tmp_path / "tom.safetensors"
    few = ["--steps", "2", "--prior-images", "2", "--prior-steps", "1", "--views", "1"]
    given = ["train", str(job_folder / "pictures"), "--word", "cat", "--model", str(sdxl_folder), "--out", str(out)]
    assert main([*given, *few]) == 0
    assert f"{out}: <v1> cat, learned from 2 pictures in " in capsys.readouterr().out
    concept = Concept.load(out)
    assert tuple(concept.embeddings) == ENCODERS
    concept.check_base(sdxl)
