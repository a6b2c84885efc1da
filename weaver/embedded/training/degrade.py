"""Pictures as a sampler leaves them: the helpers must read what the model paints, not only clean drawings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import Tensor

from weaver.embedded.training.loop import autocast

__all__ = ["degrade"]


@torch.no_grad()
def degrade(pixels: Tensor, vae: AutoencoderTiny, generator: torch.Generator) -> Tensor:
    """A third of the pictures through the autoencoder with latent noise, a third softened, a third as they are.

    `pixels` is [B, 3, h, w] in [-1, 1]; the result has the same shape and range.
    """
    result = pixels.clone()
    fate = torch.randint(0, 3, (len(pixels),), generator=generator)
    decoded, softened = fate == 0, fate == 1
    if decoded.any():
        strength = 0.4 * torch.rand(int(decoded.sum()), 1, 1, 1, generator=generator).to(vae.device)
        with autocast(vae.device):
            latents = vae.encode(pixels[decoded].to(vae.device, memory_format=torch.channels_last)).latents
            noise = torch.randn(latents.shape, generator=generator).to(vae.device)
            result[decoded] = vae.decode(latents + strength * noise).sample.clamp(-1, 1).to(pixels)
    if softened.any():
        amount = torch.rand(int(softened.sum()), 1, 1, 1, generator=generator)
        blurred = F.avg_pool2d(F.pad(pixels[softened], (1, 1, 1, 1), mode="replicate"), 3, 1)
        noise = 0.05 * torch.randn(blurred.shape, generator=generator)
        result[softened] = (pixels[softened].lerp(blurred, amount) + noise).clamp(-1, 1)
    return result
