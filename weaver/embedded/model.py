"""Open the embedded Stable Diffusion pipeline."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

import torch

from weaver.models import quietly

__all__ = ["MODEL_DIR", "load_pipeline", "model_hash"]

MODEL_DIR = Path(__file__).parent / "weights"


def load_pipeline(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32):
    """The embedded `StableDiffusionPipeline`: 64x64 pictures, latents [8, 16, 16], v-prediction, 8.6 M parameters.

    Parameters
    ----------
    device : where to put it.
    dtype : the weights are stored in float16; float32 is right on CPUs.
    """
    with quietly():  # the libraries' notices are of what this model does without
        from diffusers import StableDiffusionPipeline

        pipe = StableDiffusionPipeline.from_pretrained(MODEL_DIR, dtype=dtype, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


@lru_cache(maxsize=4)
def model_hash(folder: Path = MODEL_DIR) -> str:
    """SHA-256 over all weight files of the embedded model, in order of their paths; 64 hexadecimal digits.

    Everything derived from the model records it: concepts, helpers, figures.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors"), key=lambda path: path.relative_to(folder).as_posix()):
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
