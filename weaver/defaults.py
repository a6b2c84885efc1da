"""What a run uses where nobody said otherwise. The paper publishes none of these values; they are ours."""

from __future__ import annotations

from dataclasses import dataclass

from weaver.layers import EMBEDDED, InjectionSites, sites_for

__all__ = ["Defaults", "defaults_for"]


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
