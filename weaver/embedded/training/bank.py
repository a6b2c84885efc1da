"""A bank of training scenes on disk: pictures, labels and captions drawn once, by all cores."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from weaver.embedded import backgrounds, captions, drawings, repaint, world
from weaver.embedded.drawings import HELPER_VENDORS, LINE_DRAWINGS
from weaver.embedded.training import vary
from weaver.embedded.training.vary import vary_drawing
from weaver.embedded.world import draw_scene

__all__ = ["HELD_OUT_SCENES", "LATENTS", "Bank", "drop_latents", "load_bank", "make_bank", "to_pixels"]

HELD_OUT_SCENES = 256  # the last scenes of a bank are never trained on
LATENTS = "latents-"
"""What the names of files with latents begin with."""
_CHUNK = 500


@dataclass(frozen=True)
class Bank:
    """Pictures [n, 64, 64, 3] and labels [n, 64, 64] uint8, training captions [n] and the animals' words by scene.

    `card` is what it was drawn with: number of scenes, seed, whether for helpers, and the hash of the code that draws.
    """

    pictures: np.ndarray
    labels: np.ndarray
    captions: list[str]
    words: list[list[str]]
    card: dict[str, object]


def to_pixels(pictures: np.ndarray) -> torch.Tensor:
    """uint8 [n, h, w, 3] to float [n, 3, h, w] in [-1, 1]."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def _draw_chunk(seed: int, for_helpers: bool) -> tuple[np.ndarray, np.ndarray, list[str], list[list[str]]]:
    rng = random.Random(seed)
    torch.set_num_threads(1)
    options = {"vendors": (*HELPER_VENDORS, *LINE_DRAWINGS), "alter": vary_drawing} if for_helpers else {}
    scenes = [draw_scene(rng, **options) for _ in range(_CHUNK)]
    return (
        np.stack([np.asarray(scene.image) for scene in scenes]),
        np.stack([scene.labels for scene in scenes]),
        [scene.training_caption(rng) for scene in scenes],
        [[animal.word for animal in scene.objects] for scene in scenes],
    )


def _world_hash() -> str:
    """SHA-256 of the code that draws."""
    modules = (backgrounds, captions, drawings, repaint, vary, world)
    return hashlib.sha256(b"".join(Path(module.__file__).read_bytes() for module in modules)).hexdigest()


def make_bank(folder: Path, scenes: int, seed: int = 0, *, for_helpers: bool = False) -> Path:
    """Draw at least `scenes` scenes into `folder` and return it; an existing one is kept if it is what would be drawn.

    `for_helpers` takes the drawings of more vendors, bent and marked anew, for the segmenter to learn shapes.
    """
    chunks = -(-scenes // _CHUNK)
    card = {"scenes": chunks * _CHUNK, "seed": seed, "for_helpers": for_helpers, "world": _world_hash()}
    if (folder / "bank.json").exists() and json.loads((folder / "bank.json").read_text())["card"] == card:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bank.json").unlink(missing_ok=True)  # it tells what is there, so it comes last
    drop_latents(folder)
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        first = seed * 100_000
        parts = pool.starmap(_draw_chunk, [(first + i, for_helpers) for i in range(chunks)])
    np.save(folder / "pictures.npy", np.concatenate([part[0] for part in parts]))
    np.save(folder / "labels.npy", np.concatenate([part[1] for part in parts]))
    captions = [caption for part in parts for caption in part[2]]
    words = [words for part in parts for words in part[3]]
    (folder / "bank.json").write_text(json.dumps({"card": card, "captions": captions, "words": words}))
    return folder


def drop_latents(folder: Path, keep: Path | None = None) -> None:
    """Remove a bank's latents, all but `keep`: they are of other pictures or another autoencoder."""
    for file in folder.glob(f"{LATENTS}*"):
        if file != keep:
            file.unlink(missing_ok=True)


def load_bank(folder: Path) -> Bank:
    """Open a bank; the arrays are mapped, not read."""
    texts = json.loads((folder / "bank.json").read_text())
    pictures = np.load(folder / "pictures.npy", mmap_mode="r")
    labels = np.load(folder / "labels.npy", mmap_mode="r")
    return Bank(pictures, labels, texts["captions"], texts["words"], texts["card"])
