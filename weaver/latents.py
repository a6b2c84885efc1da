"""Pictures, picture tensors and latents.

Both kinds of autoencoder are taken: `AutoencoderKL` (encodes to a distribution, whose mode is used, so that the
same picture always gives the same latents) and `AutoencoderTiny` (encodes to latents).
Shapes: pictures [B, 3, height, width] in -1..1, latents [B, C, h, w] in the scale the U-Net works in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image

from weaver.memory.resting import lent

__all__ = ["decode_latents", "encode_image", "image_to_tensor", "psnr", "tensor_to_images", "vae_scale_factor"]


def vae_scale_factor(vae) -> int:
    """Pixels per latent cell along one side, as diffusers' pipelines count it."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def image_to_tensor(images: Image.Image | Sequence[Image.Image], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """One picture or several of one size -> [B, 3, height, width] in -1..1."""
    if isinstance(images, Image.Image):
        images = [images]
    array = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(array).permute(0, 3, 1, 2).to(dtype) / 127.5 - 1


def tensor_to_images(x: torch.Tensor) -> list[Image.Image]:
    """[B, 3, height, width] in -1..1 (clamped) -> pictures of 8 bits, rounded to the nearest level."""
    levels = ((x.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(picture) for picture in levels.permute(0, 2, 3, 1).cpu().numpy()]


@torch.no_grad()
def encode_image(vae, image: Image.Image | Sequence[Image.Image] | torch.Tensor) -> torch.Tensor:
    """Encode pictures to latents [B, C, h, w], scaled for the U-Net, in the autoencoder's dtype and on its device.

    `image` is a picture, a list of pictures of one size, or a tensor [B, 3, height, width] in -1..1.
    """
    x, dtype = image if isinstance(image, torch.Tensor) else image_to_tensor(image), vae.dtype
    with lent(vae), _upcast(vae):
        encoded = vae.encode(x.to(device=vae.device, dtype=vae.dtype))
    z = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
    z = z.to(dtype)
    mean, deviation = _moments(vae, z)
    return (z - mean) * vae.config.scaling_factor / deviation


@torch.no_grad()
def decode_latents(vae, z: torch.Tensor) -> torch.Tensor:
    """Decode latents [B, C, h, w] to pictures [B, 3, height, width], about -1..1 and not clamped."""
    with lent(vae), _upcast(vae):
        z = z.to(device=vae.device, dtype=vae.dtype)
        mean, deviation = _moments(vae, z)
        return vae.decode(z * deviation / vae.config.scaling_factor + mean, return_dict=False)[0]


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two picture tensors in -1..1 (clamped); infinite when they are equal."""
    a, b = (x.detach().cpu().double().clamp(-1, 1) for x in (a, b))  # Apple's GPUs have no float64
    error = (a - b).div(2).square().mean()
    return float("inf") if error == 0 else float(-10 * torch.log10(error))


@contextmanager
def _upcast(vae) -> Iterator[None]:
    """Run in float32 an autoencoder whose configuration says that it overflows in float16, as SDXL's does.

    That is the library's default too: a Stable Diffusion model that says nothing of it is upcast as well.
    """
    if vae.dtype != torch.float16 or not getattr(vae.config, "force_upcast", False):
        yield
        return
    vae.float()
    try:
        yield
    finally:
        vae.half()  # exact: the weights were float16 before


def _moments(vae, z: torch.Tensor) -> tuple[torch.Tensor | float, torch.Tensor | float]:
    """Mean and standard deviation that latents are normalised by before they are scaled, [C, 1, 1] or one number."""
    mean, deviation = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))
    if mean is None or deviation is None:
        return getattr(vae.config, "shift_factor", None) or 0.0, 1.0
    return z.new_tensor(mean)[:, None, None], z.new_tensor(deviation)[:, None, None]
