"""A job for the tiny model: a folder with all that it reads, and the job with changes."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from weaver.concepts.concept import Concept, attn2_hash, attn2_projections
from weaver.job import Job
from weaver.job.parse import job_from_mapping

SIDE = 32
TRAINED = {
    "name": "tom",
    "word": "cat",
    "train": {"images": "pictures", "token": "<v1>", "steps": 2, "prior_images": 2, "prior_steps": 1},
    "mask": {"file": "left.png"},
}


def named_concept(pipe, name: str, word: str, token: str, seed: int = 0, base_hash: str | None = None) -> Concept:
    """A concept with random weights, large enough to be seen."""
    generator = torch.Generator().manual_seed(seed)
    deltas = {
        path: 0.5 * torch.randn(linear.weight.shape, generator=generator)
        for path, linear in attn2_projections(pipe.unet).items()
    }
    width = pipe.text_encoder.get_input_embeddings().weight.shape[1]
    vectors = {"text_encoder": torch.randn(1, width, generator=generator)}
    return Concept(name, token, word, base_hash or attn2_hash(pipe.unet), vectors, deltas)


def picture(seed: int, side: int = SIDE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8))


def write_folder(pipe, folder) -> None:
    """A model folder with concept files, pictures and masks beside it."""
    pipe.save_pretrained(folder / "model")
    named_concept(pipe, "tom", "cat", "<v1>", 1).save(folder / "tom.safetensors")
    named_concept(pipe, "rex", "dog", "<v2>", 2).save(folder / "rex.safetensors")
    named_concept(pipe, "hills", "mountain", "<v3>", 3).save(folder / "hills.safetensors")
    named_concept(pipe, "stranger", "cat", "<v1>", 4, base_hash="0" * 64).save(folder / "stranger.safetensors")
    (folder / "pictures").mkdir()
    for seed in range(2):
        picture(seed).save(folder / "pictures" / f"{seed}.png")
    (folder / "captions").mkdir()
    picture(0).save(folder / "captions" / "0.png")
    (folder / "captions" / "0.txt").write_text("a cat, untold which")
    picture(5).save(folder / "template.png")
    left = np.zeros((SIDE, SIDE), np.uint8)
    left[8:24, 2:14] = 255
    Image.fromarray(left).save(folder / "left.png")
    Image.fromarray(np.zeros_like(left)).save(folder / "empty.png")
    Image.fromarray(left[:20]).save(folder / "flat.png")
    Image.fromarray(left.repeat(2, 0).repeat(2, 1)).save(folder / "large.png")
    (folder / "broken.png").write_bytes((folder / "template.png").read_bytes()[:200])
    (folder / "broken.safetensors").write_bytes(b"no tensors")


def job_of(folder, **changes) -> Job:
    """Two concepts on a template from the prompt, with fields changed."""
    mapping = {
        "model": "model",
        "prompt": "a cat and a dog, mountain background",
        "steps": 3,
        "template": {"steps": 2, "model": "same"},
        "concepts": [
            {"file": "tom.safetensors", "mask": {"file": "left.png"}},
            {"file": "rex.safetensors", "mask": {"box": [0.5, 0.2, 1, 0.8]}},
        ],
    }
    return job_from_mapping(mapping | changes, folder=folder, source="job.yaml")
