"""From a picture to the noise that draws it again: deterministic DDIM inversion (Concept Weaver, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler
from PIL import Image

from weaver.concepts.prompts import encode_prompt
from weaver.errors import raise_if
from weaver.latents import encode_image, vae_scale_factor

__all__ = ["Inversion", "ddim_scheduler", "invert", "most_steps"]

# diffusers' Stable Diffusion pipelines take no other size.
_PIXEL_MULTIPLE = 8


@dataclass(frozen=True, eq=False)
class Inversion:
    """The way of a picture's latents to noise.

    Parameters
    ----------
    latents : [steps + 1, C, h, w], from the picture's own (index 0) to z_T (index -1)
    timesteps : [steps] integers as the reverse pass takes them, falling
    prompt : the source prompt p_src, and `text` [1, L, C] its encoding
    """

    latents: torch.Tensor
    timesteps: torch.Tensor
    prompt: str
    text: torch.Tensor

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    @property
    def z_0(self) -> torch.Tensor:
        """The picture's latents [1, C, h, w]."""
        return self.latents[:1]

    @property
    def z_T(self) -> torch.Tensor:
        """The noise [1, C, h, w] that the reverse pass starts from."""
        return self.latents[-1:]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the latents."""
        return tuple(self.latents.shape[-2:])


def ddim_scheduler(scheduler) -> DDIMScheduler:
    """The DDIM scheduler with another scheduler's noise schedule and prediction type.

    Latents are not clipped: clipping can't be inverted. Inversion, features and fusion with injection all use these
    timesteps; a pipeline that is to fuse with injected features gets it as `pipe.scheduler`.
    """
    return DDIMScheduler.from_config(scheduler.config, **_invertible(scheduler))


def most_steps(scheduler) -> int:
    """The most DDIM steps of a noise schedule: one for every training timestep that their offset leaves."""
    config = ddim_scheduler(scheduler).config
    offset = config.steps_offset if config.timestep_spacing == "leading" else 0
    return config.num_train_timesteps - offset


@torch.no_grad()
def invert(
    pipe,
    image: Image.Image | torch.Tensor,
    prompt: str,
    steps: int = 50,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Inversion:
    """Invert a picture under the source prompt, by DDIM without guidance (arXiv 2010.02502, section 4.3).

    Noise and velocity prediction both work: the scheduler's `prediction_type` says which.

    Parameters
    ----------
    pipe : a `StableDiffusionPipeline`; it is only read
    image : a picture whose sides are multiples of 8 pixels, or latents [1, C, h, w] in the U-Net's scale
    prompt : what the picture shows, p_src
    steps : 1 to `most_steps(pipe.scheduler)`
    progress : called after each step with (done, steps)

    Raises `WeaverError` with every reason, when picture or steps can't be used.
    """
    raise_if(_reasons(pipe, image, steps), "Cannot invert the picture")
    z = encode_image(pipe.vae, image) if isinstance(image, Image.Image) else image
    text = encode_prompt(pipe, prompt)
    unet = pipe.unet
    z, text = (x.to(device=text.device, dtype=unet.dtype) for x in (z, text))
    scheduler = DDIMInverseScheduler.from_config(pipe.scheduler.config, **_invertible(pipe.scheduler))
    scheduler.set_timesteps(steps, device=z.device)
    path = [z]
    for done, t in enumerate(scheduler.timesteps, start=1):
        output = unet(z, t, encoder_hidden_states=text, return_dict=False)[0]
        z = scheduler.step(output, t, z, return_dict=False)[0]
        path.append(z)
        if progress:
            progress(done, steps)
    return Inversion(torch.cat(path), scheduler.timesteps.flip(0), prompt, text)


def _invertible(scheduler) -> dict:
    """What DDIM and its inverse must agree on, where the scheduler's own configuration can't be inverted."""
    spacing = scheduler.config.get("timestep_spacing", "leading")
    fixed = {"clip_sample": False, "thresholding": False}
    return fixed | {"timestep_spacing": spacing if spacing in ("leading", "trailing") else "leading"}


def _reasons(pipe, image, steps) -> list[str]:
    reasons = []
    limit = most_steps(pipe.scheduler)
    if not isinstance(steps, int) or not 1 <= steps <= limit:
        reasons.append(f"steps is {steps!r}, expected a whole number from 1 to {limit}")
    if isinstance(image, Image.Image):
        multiple = max(_PIXEL_MULTIPLE, vae_scale_factor(pipe.vae))
        if image.width % multiple or image.height % multiple:
            reasons.append(
                f"the picture has {image.width} x {image.height} pixels, expected multiples of {multiple}: resize it"
            )
    elif not isinstance(image, torch.Tensor):
        reasons.append(f"the picture is a {type(image).__name__}, expected a PIL image or a tensor of latents")
    elif image.ndim != 4 or image.shape[:2] != (1, pipe.unet.config.in_channels):
        reasons.append(
            f"the latents have shape {tuple(image.shape)}, expected [1, {pipe.unet.config.in_channels}, h, w]"
        )
    return reasons
