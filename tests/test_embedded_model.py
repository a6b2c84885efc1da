"""The embedded model as it ships: its folder, its helpers, and that everything derived from it is of this model."""

import hashlib
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import records
from weaver.embedded import (
    CONCEPTS,
    MODEL_DIR,
    concept_hashes,
    concept_path,
    load_pipeline,
    load_segmenter,
    model_hash,
)
from weaver.embedded.catalog import concept_scenes
from weaver.embedded.drawings import ANIMALS
from weaver.embedded.identity import IDENTITY_FILE, classify_animal, score
from weaver.embedded.segmenter import SEGMENTER_FILE
from weaver.embedded.training.card import CARD_FILE, CURVE_FILE
from weaver.embedded.training.derive import DERIVED_FILE, GATES_FILE, SHEET_FILE
from weaver.embedded.training.segmenter import held_out_scenes, segmentation_iou
from weaver.embedded.world import draw_scene
from weaver.errors import WeaverError


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline()


def test_folder_is_small_and_opens_as_stable_diffusion(pipe):
    size = sum(path.stat().st_size for path in MODEL_DIR.rglob("*") if path.is_file())
    assert size <= 20 * 2**20
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    assert len(pipe.unet.config.block_out_channels) == 4
    assert pipe.scheduler.config.prediction_type == "v_prediction"


def test_same_seed_same_picture(pipe):
    pictures = [
        pipe(
            "a cat, beach background", num_inference_steps=4, generator=torch.Generator().manual_seed(3)
        ).images[0].tobytes()
        for _ in range(2)
    ]  # fmt: skip
    assert pictures[0] == pictures[1]


def test_everything_derived_is_of_this_model():
    records = json.loads(DERIVED_FILE.read_text())
    root = DERIVED_FILE.parent
    expected = {SEGMENTER_FILE, IDENTITY_FILE, *map(concept_path, CONCEPTS)}
    expected |= {GATES_FILE, SHEET_FILE, CARD_FILE, CURVE_FILE}
    assert expected <= {root / name for name in records}
    helpers = {"helpers/segmenter.safetensors", "helpers/identity.safetensors"}  # learn through the autoencoder alone
    assert {name for name, record in records.items() if record["part"] != "."} == helpers
    for name, record in records.items():
        made_with = model_hash((MODEL_DIR / record["part"]).resolve())
        assert record["model"] == made_with, f"{name} was made with another model: run the derive stage"
        assert record["sha256"] == hashlib.sha256((root / name).read_bytes()).hexdigest(), f"{name} was changed"


@pytest.mark.parametrize(
    ("figures", "least_concepts"),
    [
        ("embedded_sites.json", 3),
        ("embedded_seeds.json", 3),
        ("embedded_lora.json", 3),
        ("embedded_demo.json", 3),
        ("embedded_rival.json", 3),
        ("embedded_methods.json", 1),  # trains its animals itself
        ("mask_sources.json", 0),  # finds words in drawn scenes, in which no concept takes part
    ],
)
def test_recorded_figures_are_of_this_model_and_these_concepts(figures, least_concepts):
    root = DERIVED_FILE.parents[2]
    record = json.loads((root / "benchmarks" / "results" / figures).read_text(encoding="utf-8"))
    assert record["model"] == model_hash(), "made with another model: record it again"
    concepts = record.get("concepts", {})
    assert len(concepts) >= least_concepts
    assert concepts == concept_hashes(concepts), "made with other concepts: record it again"
    pictures = {name: digest for name, digest in record.items() if name.startswith("docs/")}
    assert record.get("rows") or record.get("sources") or pictures
    for name, digest in pictures.items():
        assert digest == hashlib.sha256((root / name).read_bytes()).hexdigest(), f"{name} is another picture"


@pytest.mark.parametrize("figures", ["sites", "seeds", "lora", "methods", "demo", "rival"])
def test_recorded_pictures_are_drawn_with_the_defaults(figures):
    record = json.loads((DERIVED_FILE.parents[2] / f"benchmarks/results/embedded_{figures}.json").read_text())
    assert record["defaults"] == records.defaults(), "the defaults changed since: record it again"


@pytest.mark.parametrize("gate", json.loads(GATES_FILE.read_text()), ids=lambda gate: gate["name"])
def test_gate_is_passed_or_told(gate):
    readme = (DERIVED_FILE.parents[2] / "README.md").read_text(encoding="utf-8")
    assert gate["value"] >= gate["least"] or gate["name"] in readme, "the README must say which gate is not passed"


def test_autoencoder_keeps_drawings(pipe):
    scenes = [draw_scene(random.Random(880_000 + seed)) for seed in range(16)]
    pixels = torch.stack([torch.from_numpy(np.array(scene.image)) for scene in scenes]).permute(0, 3, 1, 2)
    pixels = pixels.float().div(127.5).sub(1)
    with torch.no_grad():
        decoded = pipe.vae.decode(pipe.vae.encode(pixels).latents).sample.clamp(-1, 1)
    psnr = -10 * ((decoded - pixels) / 2).square().mean((1, 2, 3)).log10()
    assert psnr.mean() > 29.5  # the gate, 30 dB, is the mean of sixteen times as many


def test_segmenter_finds_animals():
    assert SEGMENTER_FILE.stat().st_size <= 2 * 2**20
    scenes = [draw_scene(random.Random(770_000 + seed), count=2, varied=False) for seed in range(30)]
    assert segmentation_iou(load_segmenter(), scenes) >= 0.9


def test_segmenter_believes_what_a_picture_is_said_to_show():
    scenes = held_out_scenes(60)
    alone, described = (segmentation_iou(load_segmenter(), scenes, described=told) for told in (False, True))
    assert described > alone + 0.05 and described >= 0.8
    scene = draw_scene(random.Random(3), animals=["cat", "dog"], varied=False)
    shown = load_segmenter().segment(scene.image, list(ANIMALS)).sum(0)
    masks = load_segmenter().segment(scene.image, ["frog", "pig"], "a frog and a pig")
    assert np.allclose(masks.sum(0), shown, atol=1e-5)  # told so, what is an animal is one of the two
    one = load_segmenter().segment(scene.image, ["frog"], "a frog and a pig")
    assert np.allclose(one[0], masks[0])  # the other one has its share, sought or not
    empty = Image.new("RGB", (64, 64), (120, 190, 250))
    assert (load_segmenter().segment(empty, ["frog", "pig"], "a frog and a pig") < 0.5).all()


def test_segmenter_does_not_believe_what_is_plainly_missing():
    scene = draw_scene(random.Random(5), animals=["cat"], vendors=("noto",), varied=False)
    cat, dog = load_segmenter().segment(scene.image, ["cat", "dog"], "a cat and a dog") > 0.5
    assert (cat & scene.mask(0)).sum() > 0.8 * scene.mask(0).sum() and not dog.any()


def test_segmenter_takes_any_size_and_names_unknown_words():
    scene = draw_scene(random.Random(2), animals=["cat", "dog"], varied=False)
    masks = load_segmenter().segment(scene.image.resize((150, 100)), ["dog", "cat"])
    assert masks.shape == (2, 100, 150) and masks.min() >= 0 and masks.max() <= 1
    assert masks[1, :, :75].sum() > masks[0, :, :75].sum()
    with pytest.raises(WeaverError, match="does not know 'unicorn': it knows dog"):
        load_segmenter().segment(scene.image, ["dog", "unicorn"])


def test_identity_tells_concepts_from_their_class_and_each_other():
    right = []
    for name, card in CONCEPTS.items():
        for scene in concept_scenes(name, 5, seed=31):
            mask = scene.labels == (0 if card.kind == "background" else 1)
            found = score(scene.image, mask, name)
            right.append(found["own"] > found["base"] and found["own"] > found["others"])
    assert np.mean(right) >= 0.95


def test_identity_reads_the_base_drawing_as_base():
    for word in ANIMALS:
        scene = draw_scene(random.Random(word), animals=[word], vendors=("noto",), varied=False)
        assert classify_animal(scene.image, scene.mask(0)) == word
    scene = draw_scene(random.Random(5), animals=["cat"], vendors=("noto",), varied=False)
    found = score(scene.image, scene.mask(0), "tuxedo-cat")
    assert found["base"] > found["own"]


def test_score_needs_a_region():
    with pytest.raises(ValueError, match="mask is empty"):
        score(Image.new("RGB", (64, 64)), np.zeros((64, 64)), "pug")
