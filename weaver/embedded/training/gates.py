"""The gates a trained model must pass before it ships, measured on scenes it never saw."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from tqdm.auto import tqdm

from weaver.embedded.backgrounds import BACKGROUNDS
from weaver.embedded.drawings import ANIMALS
from weaver.embedded.identity import classify_animal
from weaver.embedded.segmenter import Segmenter
from weaver.embedded.training.autoencoder import decode_psnr
from weaver.embedded.training.bank import to_pixels
from weaver.embedded.training.segmenter import held_out_scenes, segmentation_iou
from weaver.embedded.world import Scene, draw_scene
from weaver.features import collect_features, reconstruction_psnr
from weaver.inversion import invert
from weaver.layers import InjectionSites
from weaver.pictures import grid

__all__ = ["GUIDANCE", "Gate", "measure_gates", "sample_sheet", "sample_pictures"]

GUIDANCE = 3.0
_SAMPLING_STEPS = 30
_LEAST_AREA = 0.01  # of the picture, for an animal to count as shown


@dataclass(frozen=True)
class Gate:
    """One figure and the least it must reach."""

    name: str
    value: float
    least: float
    unit: str = ""

    @property
    def passed(self) -> bool:
        return self.value >= self.least


def _unseen_scenes(count: int, seed: int = 991_000) -> list[Scene]:
    return [draw_scene(random.Random(seed + index)) for index in range(count)]


def _inversion_psnr(pipe: StableDiffusionPipeline, scenes: list[Scene], steps: int) -> float:
    nothing = InjectionSites("none")
    values = []
    for scene in tqdm(scenes, desc="inversion", disable=None):
        inversion = invert(pipe, scene.image, scene.caption, steps)
        values.append(reconstruction_psnr(pipe, inversion, collect_features(pipe, inversion, nothing)))
    return float(np.mean(values))


def sample_pictures(pipe: StableDiffusionPipeline, prompts: list[str], seed: int = 0) -> list[Image.Image]:
    """One picture a prompt, 30 DDIM steps at guidance 3."""
    pictures = []
    for start in range(0, len(prompts), 16):
        part = prompts[start : start + 16]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        pictures += pipe(
            part, num_inference_steps=_SAMPLING_STEPS, guidance_scale=GUIDANCE, generator=generators
        ).images
    return pictures


def _shows(segmenter: Segmenter, picture: Image.Image, words: tuple[str, ...]) -> bool:
    """Whether every word's region is there and reads as that animal, no pixel counted twice."""
    masks = segmenter.segment(picture, list(ANIMALS))
    owner = np.where(masks.max(0) > 0.5, masks.argmax(0), -1)
    for word in words:
        mask = owner == ANIMALS.index(word)
        if mask.sum() < _LEAST_AREA * mask.size or classify_animal(picture, mask) != word:
            return False
    return True


def _single_accuracy(pipe: StableDiffusionPipeline, segmenter: Segmenter, repeats: int) -> float:
    cases = list(itertools.product(ANIMALS, BACKGROUNDS)) * repeats
    pictures = sample_pictures(pipe, [f"a {animal}, {ground} background" for animal, ground in cases])
    hits = 0
    for (animal, _), picture in zip(cases, pictures, strict=True):
        mask = segmenter.segment(picture, list(ANIMALS)).max(0) > 0.5
        hits += bool(mask.any()) and classify_animal(picture, mask) == animal
    return hits / len(cases)


def _pair_accuracy(pipe: StableDiffusionPipeline, segmenter: Segmenter) -> float:
    grounds = list(BACKGROUNDS)
    pairs = list(itertools.permutations(ANIMALS, 2))
    prompts = [f"a {a} and a {b}, {grounds[i % len(grounds)]} background" for i, (a, b) in enumerate(pairs)]
    pictures = sample_pictures(pipe, prompts, seed=5000)
    return sum(_shows(segmenter, picture, pair) for pair, picture in zip(pairs, pictures, strict=True)) / len(pairs)


def measure_gates(pipe: StableDiffusionPipeline, segmenter: Segmenter, identity_accuracy: float) -> list[Gate]:
    """All gates of the model and of its helpers."""
    scenes = _unseen_scenes(256)
    pixels = to_pixels(np.stack([np.asarray(scene.image) for scene in scenes]))
    return [
        Gate("autoencoder, 256 unseen scenes", decode_psnr(pipe.vae, pixels), 30.0, "dB"),
        Gate("50-step DDIM inversion, 64 unseen scenes", _inversion_psnr(pipe, scenes[:64], 50), 25.0, "dB"),
        Gate("single animals classified as prompted", _single_accuracy(pipe, segmenter, 4), 0.90),
        Gate("pairs that show both animals", _pair_accuracy(pipe, segmenter), 0.75),
        Gate("segmenter IoU, held-out drawings, told the prompt", segmentation_iou(segmenter, held_out_scenes()), 0.85),
        Gate("identity accuracy, unseen renders", identity_accuracy, 0.98),
    ]


def sample_sheet(pipe: StableDiffusionPipeline, columns: int = 8, zoom: int = 3) -> Image.Image:
    """Samples of singles, coloured singles, pairs and larger groups, row by row."""
    rng = random.Random(3)
    grounds, colours = list(BACKGROUNDS), ("red", "blue", "white", "black", "green", "purple")
    prompts = [f"a {ANIMALS[i % 6]}, {grounds[i % 4]} background" for i in range(2 * columns)]
    prompts += [f"a {colours[i % 6]} {rng.choice(ANIMALS)}, {grounds[i % 4]} background" for i in range(columns)]
    for count in (2, 2, 3, 4):
        for index in range(columns):
            names = [f"a {animal}" for animal in (rng.choice(ANIMALS) for _ in range(count))]
            prompts.append(f"{', '.join(names[:-1])} and {names[-1]}, {grounds[index % 4]} background")
    pictures = sample_pictures(pipe, prompts, seed=100)
    sheet = grid([pictures[i : i + columns] for i in range(0, len(pictures), columns)])
    return sheet.resize((sheet.width * zoom, sheet.height * zoom), Image.Resampling.BICUBIC)
