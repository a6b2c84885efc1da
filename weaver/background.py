"""The template's background kept: in latents while the picture is drawn, and in the picture itself, to the last bit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from weaver.masks.pyramid import mask_pyramid
from weaver.masks.shapes import soften

__all__ = ["KeptBackground", "default_seam", "laid_over"]


@dataclass(frozen=True, eq=False)
class KeptBackground:
    """The template's way from noise to its latents, put in the place of what is drawn in the background at every step.

    What is drawn of the concepts is then drawn before the template's own background and goes together with it, as in
    Blended Latent Diffusion (arXiv 2206.02779), where the noised template takes the place of its inversion.

    Parameters
    ----------
    latents : [steps + 1, C, h, w] of an `Inversion`, the template's own first
    ground : [h, w] bool, the cells that are background and nothing else. Others are drawn as they come: mixed with the
        template's, they would show the colours of what stood there
    """

    latents: torch.Tensor
    ground: torch.Tensor

    @classmethod
    def build(cls, latents: torch.Tensor, masks: torch.Tensor) -> KeptBackground:
        """Of an inversion's latents, and masks [N + 1, height, width] that sum to one, the background last."""
        size = tuple(latents.shape[-2:])
        return cls(latents, (mask_pyramid(masks, [size])[size][-1] == 1).to(latents.device))

    def put_into(self, z: torch.Tensor, step: int) -> torch.Tensor:
        """Latents [n, C, h, w] after step number `step`, from 0, with the template's in the background."""
        return torch.where(self.ground, self.latents[-2 - step].to(z), z)


def laid_over(template: Image.Image, image: Image.Image, masks: torch.Tensor, seam: int) -> Image.Image:
    """The template, with `image` in the place of what is not background.

    Parameters
    ----------
    template, image : of one size
    masks : [N + 1, height, width] in 0..1 that sum to one, the background last
    seam : width in pixels of a transition that is added to the masks' own edges, half of it on either side; 0 for none

    Returns a new RGB picture. Where the background's softened mask is one, which it is for every pixel that is more
    than ``seam // 2`` pixels away from all other masks, it is `template` to the last bit.
    """
    ground = (soften(masks[-1:], seam) if seam else masks[-1:])[0].numpy()[..., None]
    over, under = (np.asarray(picture.convert("RGB"), dtype=np.float32) for picture in (image, template))
    return Image.fromarray((over + ground * (under - over)).round().clip(0, 255).astype(np.uint8))


def default_seam(size: tuple[int, int]) -> int:
    """Pixels over which a picture of `size` (height, width) goes over into the template where masks are hard."""
    return min(size) // 32
