"""Train the identity classifier on crops of every vendor's drawings, repainted ones and backgrounds."""

from __future__ import annotations

import multiprocessing
import os
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from PIL import Image
from safetensors.torch import save_file

from weaver.embedded.backgrounds import BACKGROUNDS, HELD_OUT_BACKGROUNDS
from weaver.embedded.crops import crop_region
from weaver.embedded.drawings import DRAWINGS
from weaver.embedded.identity import IDENTITIES, REPAINTED, IdentityNetwork, load_identity
from weaver.embedded.training.bank import to_pixels
from weaver.embedded.training.degrade import degrade
from weaver.embedded.training.loop import LoopSettings, device_from_environment, train
from weaver.embedded.world import Scene, draw_scene

__all__ = ["identity_accuracy", "measure_identity", "train_identity"]

_SCALE = 14.0  # cosines times this are the logits
_MARGIN = 0.2  # a crop must be nearer to its own identity than to others by this much
_CHUNK = 200


def _draw_scene(rng: random.Random) -> Scene:
    ground = rng.choice([*BACKGROUNDS, *HELD_OUT_BACKGROUNDS])
    varied = rng.random() < 0.35
    return draw_scene(rng, background=ground, vendors=tuple(DRAWINGS), varied=varied)


def _regions(scene: Scene) -> list[tuple[tuple[str, str], np.ndarray, bool]]:
    """(identity, mask, whether it is the background) of everything a scene shows."""
    regions = []
    for index, animal in enumerate(scene.objects):
        source = REPAINTED if animal.repainted else animal.vendor
        regions.append(((source, animal.word), scene.mask(index), False))
    word = HELD_OUT_BACKGROUNDS.get(scene.background, (scene.background,))[0]
    source = REPAINTED if scene.background_repainted else scene.background
    if (source, word) in IDENTITIES:
        regions.append(((source, word), scene.labels == 0, True))
    return regions


def _loosen(mask: np.ndarray, rng: random.Random) -> np.ndarray:
    """The mask moved by at most a pixel and grown or shrunk by at most one: no segmenter is exact."""
    moved = np.roll(mask, (rng.randint(-1, 1), rng.randint(-1, 1)), (0, 1))
    change = rng.randint(-1, 1)
    if change:
        shifts = [np.roll(moved, (dy, dx), (0, 1)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        moved = np.logical_or.reduce(shifts) if change > 0 else np.logical_and.reduce(shifts)
    return moved if moved.any() else mask


def _draw_chunk(task: tuple[int, str | None]) -> tuple[torch.Tensor, torch.Tensor]:
    """Crops [n, 3, 40, 40] and identity numbers [n] of one chunk of scenes."""
    torch.set_num_threads(1)
    seed, vae_folder = task
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    scenes = [_draw_scene(rng) for _ in range(_CHUNK)]
    pixels = to_pixels(np.stack([np.asarray(scene.image) for scene in scenes]))
    if vae_folder is not None:
        pixels = degrade(pixels, AutoencoderTiny.from_pretrained(vae_folder).float(), generator)
    pictures = pixels.add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()
    crops, numbers = [], []
    for scene, picture in zip(scenes, pictures, strict=True):
        for identity, mask, whole in _regions(scene):
            mask = _loosen(mask, rng) if vae_folder is not None else mask
            crops.append(crop_region(Image.fromarray(picture), mask, whole=whole))
            numbers.append(IDENTITIES.index(identity))
    return torch.stack(crops), torch.tensor(numbers)


def _draw_crops(scenes: int, vae_folder: Path | None, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    tasks = [(seed + i, None if vae_folder is None else str(vae_folder)) for i in range(-(-scenes // _CHUNK))]
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        parts = pool.map(_draw_chunk, tasks)
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


@torch.no_grad()
def identity_accuracy(network: IdentityNetwork, crops: torch.Tensor, numbers: torch.Tensor) -> float:
    """Share of the crops of drawings (repainted ones left out) whose nearest identity is the true one."""
    plain = torch.tensor([IDENTITIES[number][0] != REPAINTED for number in numbers.tolist()])
    found = torch.cat([network(part).argmax(1).cpu() for part in crops[plain].split(256)])
    return (found == numbers[plain]).float().mean().item()


def measure_identity(scenes: int = 600, seed: int = 500_000) -> float:
    """Accuracy of the shipped classifier on fresh, clean renders."""
    return identity_accuracy(load_identity(), *_draw_crops(scenes, None, seed))


def train_identity(
    vae_folder: Path, file: Path, minutes: float, scenes: int = 8000, batch: int = 64, seed: int = 0
) -> None:
    """Draw crops of `scenes` scenes, train for `minutes` and save the weights in fp16 to `file`."""
    device = device_from_environment()
    crops, numbers = _draw_crops(scenes, vae_folder, seed * 1_000_000)
    held_crops, held_numbers = _draw_crops(600, None, seed * 1_000_000 + 700_000)
    torch.manual_seed(seed)
    network = IdentityNetwork().to(device)
    draw = torch.Generator().manual_seed(seed + 1)
    weights = torch.bincount(numbers, minlength=len(IDENTITIES)).float().clamp(min=1).rsqrt()

    def loss_of(step: int) -> torch.Tensor:
        chosen = torch.multinomial(weights[numbers], batch, replacement=True, generator=draw)
        inputs = crops[chosen]
        mirrored = torch.rand(batch, generator=draw) < 0.5
        inputs[mirrored] = inputs[mirrored].flip(-1)
        inputs = inputs * (1 + 0.1 * torch.randn(batch, 3, 1, 1, generator=draw))
        own = F.one_hot(numbers[chosen], len(IDENTITIES)).to(device)
        cosines = network(inputs.clamp(-1, 1).to(device))
        return F.cross_entropy(_SCALE * (cosines - _MARGIN * own), numbers[chosen].to(device))

    def save() -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.half().cpu().contiguous() for name, tensor in network.state_dict().items()}, file)

    train(
        list(network.parameters()),
        loss_of,
        LoopSettings(minutes, 2e-3, batch, ema_decay=0.995, report_every=200),
        save=save,
        evaluate=lambda: {"held_out_accuracy": identity_accuracy(network, held_crops.to(device), held_numbers)},
    )
