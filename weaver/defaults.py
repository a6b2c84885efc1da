"""What a run uses where nobody said otherwise. The paper publishes none of these values; they are ours."""

from __future__ import annotations

from dataclasses import dataclass

from weaver.inversion import most_steps
from weaver.latents import vae_scale_factor
from weaver.layers import EMBEDDED, InjectionSites, sites_for

__all__ = ["Defaults", "default_dilation", "defaults_for", "model_size", "setting_reasons"]


@dataclass(frozen=True)
class Defaults:
    """Default settings of one kind of model.

    Parameters
    ----------
    guidance : omega, of fusion and of a template made by the same model
    suppression : lambda
    sites : injection sites and windows
    """

    guidance: float
    suppression: float
    sites: InjectionSites


def defaults_for(pipe) -> Defaults:
    """Defaults of a pipeline: Plug-and-Play's guidance for Stable Diffusion, swept values for the embedded model."""
    sites = sites_for(pipe.unet)
    if sites is EMBEDDED:
        return Defaults(guidance=3.0, suppression=0.0, sites=sites)
    return Defaults(guidance=7.5, suppression=0.2, sites=sites)


def default_dilation(size: tuple[int, int]) -> int:
    """Pixels that masks grow by on a picture of `size`: a 64th of its shorter side."""
    return min(size) // 64


def model_size(pipe) -> tuple[int, int]:
    """(height, width) in pixels of the pictures a pipeline was trained on."""
    sample, factor = pipe.unet.config.sample_size, vae_scale_factor(pipe.vae)
    height, width = (sample, sample) if isinstance(sample, int) else sample
    return height * factor, width * factor


def setting_reasons(pipe, size: tuple[int, int], steps: int) -> list[str]:
    """What is wrong with a picture's size (height, width) and the number of steps for a pipeline."""
    limit = most_steps(pipe.scheduler)
    multiple = max(8, vae_scale_factor(pipe.vae))
    reasons = []
    if not isinstance(steps, int) or not 1 <= steps <= limit:
        reasons.append(f"steps: is {steps!r}, expected 1 to {limit}")
    if any(side < multiple or side % multiple for side in size):
        reasons.append(f"size: is {size[1]}x{size[0]}, expected multiples of {multiple} pixels")
    return reasons
