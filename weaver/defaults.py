"""What a run uses where nobody said otherwise. The paper publishes none of these values; they are ours."""

from __future__ import annotations

from dataclasses import dataclass, replace

from weaver.errors import WeaverError
from weaver.latents import vae_scale_factor
from weaver.layers import EMBEDDED, InjectionSites, sites_for
from weaver.models import is_embedded

__all__ = ["Defaults", "default_dilation", "default_sites", "defaults_for", "embedded_defaults", "model_size"]


@dataclass(frozen=True)
class Defaults:
    """Default settings of one kind of model.

    Parameters
    ----------
    guidance : omega, of fusion
    template_guidance : classifier-free guidance of a picture from its prompt alone, such as a template
    suppression : lambda
    sites : injection sites and windows; None for a U-Net that no table is known for (`default_sites` tells so)
    woven_sites : injection sites and windows under which woven scenes are learned (`weaver.concepts.woven`). Concepts
        that ship with the package were learned under these, before the fusion's windows were swept
    eta : of the fusion's DDIM steps. The paper's is 0. The embedded model's 0.5 is what the sweep found at lambda 0.2;
        in drawn templates with true masks 0 gets as many animals right and keeps more of the background
    dilation : by which part of a picture's shorter side masks grow, see `default_dilation`
    """

    guidance: float
    template_guidance: float
    suppression: float
    sites: InjectionSites | None
    woven_sites: InjectionSites | None
    eta: float = 0.0
    dilation: float = 1 / 64


def defaults_for(pipe) -> Defaults:
    """Defaults of a pipeline: Plug-and-Play's guidance for Stable Diffusion (SDXL too), the embedded model's swept."""
    if is_embedded(pipe):
        return embedded_defaults()
    try:
        sites = sites_for(pipe.unet)
    except WeaverError:
        sites = None
    return Defaults(guidance=7.5, template_guidance=7.5, suppression=0.2, sites=sites, woven_sites=sites)


def default_sites(pipe) -> InjectionSites:
    """Injection sites of a pipeline. Raises `WeaverError` for a U-Net that no table is known for."""
    return defaults_for(pipe).sites or sites_for(pipe.unet)


def embedded_defaults() -> Defaults:
    """Of the embedded model: all but sites and the template's guidance as `weaver evaluate --sweep` chose it, recorded
    in `weaver/evaluation/chosen.json`; sites tie with most of `benchmarks/embedded_sites.py`.
    """
    woven = replace(EMBEDDED, resnet_window=0.5, attention_window=0.5)
    return Defaults(guidance=2.0, template_guidance=3.0, suppression=0.2, sites=EMBEDDED, woven_sites=woven, eta=0.5)


def default_dilation(size: tuple[int, int], share: float = 1 / 64) -> int:
    """Whole pixels that masks grow by on a picture of `size`: a `share` of its shorter side."""
    return int(min(size) * share)


def model_size(pipe) -> tuple[int, int]:
    """(height, width) in pixels of the pictures a pipeline was trained on."""
    sample, factor = pipe.unet.config.sample_size, vae_scale_factor(pipe.vae)
    height, width = (sample, sample) if isinstance(sample, int) else sample
    return height * factor, width * factor
