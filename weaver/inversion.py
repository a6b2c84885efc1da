"""From a picture to the noise that draws it again: deterministic DDIM inversion (Concept Weaver, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import DDIMInverseScheduler
from PIL import Image

from weaver.cache import Cache, inversion_identity
from weaver.concepts.encoding import encode
from weaver.conditioning import added_reasons, make_time_ids, time_id_reasons, unet_arguments
from weaver.errors import raise_if
from weaver.graphs import CUDAGraphs, graph_reasons
from weaver.latents import encode_image, vae_scale_factor
from weaver.limits import size_reasons, step_reasons
from weaver.replay import forward_until
from weaver.schedule import invertible

__all__ = ["Inversion", "invert"]


@dataclass(frozen=True, eq=False)
class Inversion:
    """The way of a picture's latents to noise.

    Parameters
    ----------
    latents : [steps + 1, C, h, w], from the picture's own (index 0) to z_T (index -1)
    timesteps : [steps] integers as the reverse pass takes them, falling
    prompt : the source prompt p_src, and `text` [1, L, C] its encoding
    identity : what it follows from (`weaver.cache`), where it was made with a cache
    cached : whether it was taken from there
    pooled, time_ids : SDXL's pooled embedding [1, P] of p_src and time ids [1, 6]; None for models without
    """

    latents: torch.Tensor
    timesteps: torch.Tensor
    prompt: str
    text: torch.Tensor
    identity: Mapping | None = None
    cached: bool = False
    pooled: torch.Tensor | None = None
    time_ids: torch.Tensor | None = None

    @property
    def unet_arguments(self) -> dict:
        """What the U-Net's forward takes besides latents and timestep, for one row."""
        return unet_arguments(self.text, self.pooled, self.time_ids)

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


@torch.no_grad()
def invert(
    pipe,
    image: Image.Image | torch.Tensor,
    prompt: str,
    steps: int = 50,
    *,
    time_ids: Sequence[float] | None = None,
    cache: Cache | None = None,
    graphs: CUDAGraphs | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Inversion:
    """Invert a picture under the source prompt, by DDIM without guidance (arXiv 2010.02502, section 4.3).

    Noise and velocity prediction both work: the scheduler's `prediction_type` says which.

    Parameters
    ----------
    pipe : a `StableDiffusionPipeline` or a `StableDiffusionXLPipeline`; it is only read
    image : a picture whose sides are multiples of 8 pixels, or latents [1, C, h, w] in the U-Net's scale
    prompt : what the picture shows, p_src
    steps : 1 to `weaver.schedule.most_steps(pipe.scheduler)`
    time_ids : for SDXL: original height and width, top and left of the crop, target height and width, which fusion then
        has too; None is the picture's own size, uncropped
    cache : where the result is looked for, and kept; a model with adapters, FreeU or hooks in any part that is run
        here is inverted without it
    graphs : replay the steps from these CUDA graphs
    progress : called after each step with (done, steps)

    Raises `WeaverError` with every reason, when picture or steps can't be used.
    """
    reasons = _reasons(pipe, image, steps) + time_id_reasons(time_ids) + graph_reasons(pipe.unet, graphs)
    raise_if(reasons, "Cannot invert the picture")
    unet, (text, pooled) = pipe.unet, encode(pipe, prompt)
    added = (pooled, make_time_ids(pipe, _pixels(pipe, image), text, time_ids))
    text = text.to(unet.dtype)
    scheduler = DDIMInverseScheduler.from_config(pipe.scheduler.config, **invertible(pipe.scheduler))
    scheduler.set_timesteps(steps, device=text.device)
    timesteps = scheduler.timesteps.flip(0)
    identity = None if cache is None else inversion_identity(pipe, image, prompt, steps, added[1])
    if identity and (kept := cache.get(identity)):
        if progress:
            progress(steps, steps)
        return Inversion(kept["latents"].to(text.device), timesteps, prompt, text, identity, True, *added)
    z = encode_image(pipe.vae, image) if isinstance(image, Image.Image) else image
    z = z.to(device=text.device, dtype=unet.dtype)
    path, arguments = [z], unet_arguments(text, *added)
    if graphs is not None:
        graphs.follow(unet)
    for done, t in enumerate(scheduler.timesteps, start=1):
        output = forward_until(unet, (), z, t, arguments, whole=True, graphs=graphs)[1]
        z = scheduler.step(output, t, z, return_dict=False)[0]
        path.append(z)
        if progress:
            progress(done, steps)
    inversion = Inversion(torch.cat(path), timesteps, prompt, text, identity, False, *added)
    if identity:
        cache.put(identity, {"latents": inversion.latents})
    return inversion


def _pixels(pipe, image: Image.Image | torch.Tensor) -> tuple[int, int]:
    """Height and width of a picture, or of the picture that latents are of."""
    if isinstance(image, Image.Image):
        return image.height, image.width
    factor = vae_scale_factor(pipe.vae)
    return image.shape[-2] * factor, image.shape[-1] * factor


def _reasons(pipe, image, steps) -> list[str]:
    reasons = added_reasons(pipe) + step_reasons(pipe, steps)
    if isinstance(image, Image.Image):
        reasons += size_reasons(pipe, (image.height, image.width))
    elif not isinstance(image, torch.Tensor):
        reasons.append(f"the picture is a {type(image).__name__}, expected a PIL image or a tensor of latents")
    elif image.ndim != 4 or image.shape[:2] != (1, pipe.unet.config.in_channels):
        reasons.append(
            f"the latents have shape {tuple(image.shape)}, expected [1, {pipe.unet.config.in_channels}, h, w]"
        )
    return reasons
