"""Train the word-conditioned segmenter on the generator's own masks."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from safetensors.torch import save_file

from weaver.embedded.drawings import ANIMALS, HELD_OUT_VENDORS
from weaver.embedded.segmenter import Segmenter, word_probabilities
from weaver.embedded.training.bank import HELD_OUT_SCENES, Bank, to_pixels
from weaver.embedded.training.degrade import degrade
from weaver.embedded.training.loop import LoopSettings, autocast, device_from_environment, train
from weaver.embedded.world import Scene, draw_scene
from weaver.masks.components import tidy

__all__ = ["GATE_SEED", "held_out_scenes", "segmentation_iou", "train_segmenter"]

GATE_SEED = 77  # of the scenes that the gate is measured on
_WATCHED_SEED = 78  # of those watched in training, so that the gate's are new to whoever chooses when to stop


def held_out_scenes(
    count: int = 200, seed: int = GATE_SEED, vendors: tuple[str, ...] = HELD_OUT_VENDORS
) -> list[Scene]:
    """Scenes never trained on, in held-out drawings or those of other vendors."""
    rng = random.Random(seed)
    return [draw_scene(rng, vendors=vendors, varied=False) for _ in range(count)]


def segmentation_iou(segmenter: Segmenter, scenes: list[Scene], *, described: bool = True) -> float:
    """Mean intersection over union over every word that stands in each scene, in masks as `segmenter_masks` makes them.

    `described` tells the scene's caption, as a template's prompt is told; otherwise every word is sought by itself.
    """
    values = []
    for scene in scenes:
        words = sorted({animal.word for animal in scene.objects})
        sure = segmenter.segment(scene.image, words, scene.caption if described else None)
        for index, word in enumerate(words):
            mask = tidy(torch.from_numpy((sure[index] > 0.5) & (sure.argmax(0) == index))).numpy()
            truth = np.isin(scene.labels, [i + 1 for i, animal in enumerate(scene.objects) if animal.word == word])
            values.append((mask & truth).sum() / (mask | truth).sum())
    return float(np.mean(values))


def _word_masks(labels: np.ndarray, words: list[list[str]]) -> torch.Tensor:
    """True masks [B, words, 64, 64] from label maps [B, 64, 64] and each scene's animals."""
    masks = torch.zeros(len(labels), len(ANIMALS), *labels.shape[1:])
    for row, animals in enumerate(words):
        for index, word in enumerate(animals):
            masks[row, ANIMALS.index(word)] += torch.from_numpy(labels[row] == index + 1)
    return masks


def train_segmenter(
    bank: Bank, vae: AutoencoderTiny, file: Path, minutes: float, batch: int = 24, seed: int = 0
) -> None:
    """Train for `minutes` on clean and degraded scenes and save the weights in fp16 to `file`."""
    device = device_from_environment()
    torch.manual_seed(seed)
    segmenter = Segmenter().to(device)
    vae = vae.to(device, memory_format=torch.channels_last)
    draw = torch.Generator().manual_seed(seed + 1)
    count = len(bank.captions) - HELD_OUT_SCENES
    scenes = held_out_scenes(seed=_WATCHED_SEED)

    def loss_of(step: int) -> torch.Tensor:
        chosen = torch.randint(0, count, (batch,), generator=draw).numpy()
        pixels = degrade(to_pixels(bank.pictures[chosen]), vae, draw)
        truth = _word_masks(np.asarray(bank.labels[chosen]), [bank.words[i] for i in chosen]).to(device)
        with autocast(device):
            logits = segmenter(pixels.to(device))
        logits = logits.float()
        predicted = word_probabilities(logits)
        overlap = 2 * (predicted * truth).sum((2, 3)) + 1
        dice = 1 - overlap / (predicted.sum((2, 3)) + truth.sum((2, 3)) + 1)
        owner = torch.where(truth.any(1), truth.argmax(1) + 1, 0)  # 0 is the background
        return F.cross_entropy(F.pad(logits, (0, 0, 0, 0, 1, 0)), owner) + 0.3 * dice.mean()

    def save() -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.half().cpu().contiguous() for name, tensor in segmenter.state_dict().items()}, file)

    train(
        list(segmenter.parameters()),
        loss_of,
        LoopSettings(minutes, 3e-3, batch, ema_decay=0.995, report_every=200),
        save=save,
        evaluate=lambda: {
            "held_out_iou": segmentation_iou(segmenter, scenes, described=False),
            "described_iou": segmentation_iou(segmenter, scenes),
        },
    )
