"""Pictures and captions as training reads them: latents, encoded once, token ids, and SDXL's time ids."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from weaver.concepts.encoding import Encoding, encode_ids
from weaver.concepts.images import TrainingSet
from weaver.concepts.prompts import TokenIds, read_prompts
from weaver.conditioning import make_time_ids
from weaver.defaults import model_size
from weaver.errors import WeaverError
from weaver.latents import encode_image
from weaver.pictures import fit

__all__ = ["Examples", "encode_captions", "encode_fixed_captions", "pick", "prepare"]

_AT_ONCE = 8  # pictures in one pass of the autoencoder


@dataclass(frozen=True)
class Examples:
    """Pictures and captions, n of each.

    Parameters
    ----------
    latents : [n, C, h, w]
    captions : as each of the pipeline's tokenizers reads them, by its text encoder's name
    time_ids : [n, 6], what part of a photograph SDXL is told that each picture is; None for other models
    region : [n, 1, h, w], how much of each cell of the latents the loss counts; None is all of it everywhere
    """

    latents: torch.Tensor
    captions: Mapping[str, TokenIds]
    time_ids: torch.Tensor | None
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
    framings = [
        framing.fitted(image.size[::-1], size) for framing, image in zip(data.all_framings(), data.images, strict=True)
    ]
    masks = [mask and fit(mask, size, Image.Resampling.BOX) for mask in data.all_masks()]
    if gone := [number for number, mask in enumerate(masks) if mask and not mask.getbbox()]:
        raise WeaverError(
            f"{data.called(gone[0])}: nothing of its mask is left where it is cut about its centre to "
            f"{size[1]} x {size[0]} pixels: cut the picture so that the concept stands in the middle"
        )
    captions = list(data.captions)
    if flip:
        mirror = Image.Transpose.FLIP_LEFT_RIGHT
        images += [image.transpose(mirror) for image in images]
        framings += [framing.mirrored() for framing in framings]
        masks += [mask and mask.transpose(mirror) for mask in masks]
        captions *= 2
    read = read_prompts(pipe, captions, token, vectors)
    latents = torch.cat([encode_image(pipe.vae, images[i : i + at_once]) for i in range(0, len(images), at_once)])
    region = _region(masks, latents.shape[-2:]) if any(masks) else None
    if region is not None and (gone := (region.sum((1, 2, 3)) == 0).nonzero().flatten().tolist()):
        cells = f"{latents.shape[-1]} x {latents.shape[-2]}"
        raise WeaverError(
            f"{data.called(gone[0] % len(data.images))}: its mask is too small: nothing of it is left in the {cells} "
            "cells that the model draws: cut the picture closer about the concept, or mask more of it"
        )
    device = pipe._execution_device
    told = latents.new_empty(0, dtype=pipe.unet.dtype, device=device)
    time_ids = [make_time_ids(pipe, size, told, framing.time_ids(size)) for framing in framings]
    return Examples(
        latents=latents.to(device, torch.float32),
        captions={name: ids.to(device) for name, ids in read.items()},
        time_ids=None if time_ids[0] is None else torch.cat(time_ids),
        region=None if region is None else region.to(device),
    )


def _region(masks: list[Image.Image | None], size: tuple[int, int]) -> torch.Tensor:
    """The share of each cell [n, 1, h, w] that lies inside the masks; without one, all of it."""
    full = Image.new("L", (1, 1), 255)
    cells = [np.asarray((mask or full).resize((size[1], size[0]), Image.Resampling.BOX)) for mask in masks]
    return torch.from_numpy(np.stack(cells)).float()[:, None] / 255


def encode_captions(
    encoders: Mapping[str, torch.nn.Module],
    examples: Examples,
    picks: torch.Tensor,
    vectors: Mapping[str, torch.Tensor],
) -> Encoding:
    """Encode the captions of `picks` [b] with the token's vectors by encoder [V, C]; differentiable in those."""
    return encode_ids(encoders, {name: ids.rows(picks) for name, ids in examples.captions.items()}, vectors)


@torch.no_grad()
def encode_fixed_captions(encoders: Mapping[str, torch.nn.Module], examples: Examples) -> Encoding:
    """Encode all n captions, each different one once: nothing in them is learned."""
    captions = examples.captions
    _, index = torch.unique(torch.cat([read.ids for read in captions.values()], 1), dim=0, return_inverse=True)
    different = {number: row for row, number in enumerate(index.tolist())}
    rows = [torch.tensor([different[number]]) for number in sorted(different)]
    found = [encode_ids(encoders, {name: read.rows(row) for name, read in captions.items()}, {}) for row in rows]
    return Encoding.joined(found).rows(index)


def pick(count: int, batch: int, generator: torch.Generator) -> torch.Tensor:
    """Draw `batch` of `count` pictures, none twice before each was drawn once."""
    rounds = math.ceil(batch / count)
    return torch.cat([torch.randperm(count, generator=generator) for _ in range(rounds)])[:batch]
