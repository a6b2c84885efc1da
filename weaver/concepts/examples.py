"""Pictures and captions as training reads them: latents, encoded once, and token ids."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from weaver.concepts.images import TrainingSet
from weaver.concepts.prompts import encode_text, tokenize
from weaver.defaults import model_size
from weaver.latents import encode_image
from weaver.pictures import fit

__all__ = ["Examples", "encode_captions", "encode_fixed_captions", "pick", "prepare"]

_AT_ONCE = 8  # pictures in one pass of the autoencoder


@dataclass(frozen=True)
class Examples:
    """Pictures as latents [n, C, h, w]; captions as ids [n, L], their lengths and the positions of the token.

    `region` [n, 1, h, w] is how much of each cell of the latents the loss counts; None is all of it everywhere.
    """

    latents: torch.Tensor
    ids: torch.Tensor
    lengths: list[int]
    positions: list[list[int]]
    region: torch.Tensor | None = None


@torch.no_grad()
def prepare(
    pipe,
    data: TrainingSet,
    token: str | None = None,
    *,
    vectors: int = 1,
    flip: bool = False,
    at_once: int | None = None,
) -> Examples:
    """Encode pictures at the model's own size, and read captions with room for the token's `vectors`.

    `flip` adds every picture mirrored; `at_once` is how many the autoencoder is given in one pass.
    """
    at_once = at_once or _AT_ONCE
    size = model_size(pipe)
    images = [fit(image.convert("RGB"), size) for image in data.images]
    masks = [mask and fit(mask, size, Image.Resampling.BOX) for mask in data.all_masks()]
    captions = list(data.captions)
    if flip:
        mirror = Image.Transpose.FLIP_LEFT_RIGHT
        images += [image.transpose(mirror) for image in images]
        masks += [mask and mask.transpose(mirror) for mask in masks]
        captions *= 2
    read = [tokenize(pipe, caption, token, vectors) for caption in captions]
    latents = torch.cat([encode_image(pipe.vae, images[i : i + at_once]) for i in range(0, len(images), at_once)])
    device = pipe._execution_device
    return Examples(
        latents=latents.to(device, torch.float32),
        ids=torch.cat([ids for ids, _, _ in read]).to(device),
        lengths=[length for _, _, length in read],
        positions=[positions for _, positions, _ in read],
        region=_region(masks, latents.shape[-2:]).to(device) if any(masks) else None,
    )


def _region(masks: list[Image.Image | None], size: tuple[int, int]) -> torch.Tensor:
    """The share of each cell [n, 1, h, w] that lies inside the masks; without one, all of it."""
    full = Image.new("L", (1, 1), 255)
    cells = [np.asarray((mask or full).resize((size[1], size[0]), Image.Resampling.BOX)) for mask in masks]
    return torch.from_numpy(np.stack(cells)).float()[:, None] / 255


def encode_captions(encoder, examples: Examples, picks: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Encode the captions of `picks` [b] with the token's vectors [V, C]; differentiable in those. [b, L, C]."""
    rows = picks.tolist()
    places = [(row, position) for row, pick in enumerate(rows) for position in examples.positions[pick]]
    return encode_text(encoder, examples.ids[picks], [examples.lengths[pick] for pick in rows], places, vectors)


@torch.no_grad()
def encode_fixed_captions(encoder, examples: Examples) -> torch.Tensor:
    """Encode every caption, each different one once: nothing in them is learned. Returns [n, L, C]."""
    ids, index = torch.unique(examples.ids, dim=0, return_inverse=True)
    lengths = dict(zip(index.tolist(), examples.lengths, strict=True))
    text = [encode_text(encoder, row[None], [lengths[i]]) for i, row in enumerate(ids)]
    return torch.cat(text)[index]


def pick(count: int, batch: int, generator: torch.Generator) -> torch.Tensor:
    """Draw `batch` of `count` pictures, none twice before each was drawn once."""
    rounds = math.ceil(batch / count)
    return torch.cat([torch.randperm(count, generator=generator) for _ in range(rounds)])[:batch]
