"""What can be known before the first sampling step: why a model and its settings can't fuse."""

from __future__ import annotations

from collections.abc import Sequence

from weaver.defaults import setting_reasons
from weaver.fusion.attach import installable_reasons
from weaver.fusion.contexts import ConceptUse, use_reasons
from weaver.fusion.inputs import amount_reasons
from weaver.fusion.support import unet_reasons
from weaver.layers import InjectionSites, site_reasons

__all__ = ["fusion_reasons"]


def fusion_reasons(
    pipe,
    uses: Sequence[ConceptUse] = (),
    *,
    size: tuple[int, int],
    steps: int,
    sites: InjectionSites,
    guidance: float,
    suppression: float,
    base_hash: str | None = None,
) -> list[str]:
    """Everything that stands against a fusion, short of its prompts and masks; empty when nothing does.

    Parameters
    ----------
    uses : of all concepts, the background's too; those that are still to be trained are left out
    size : (height, width) of the picture in pixels
    sites : where features will be injected
    guidance, suppression : omega and lambda
    base_hash : `attn2_hash` of the pipeline's U-Net where it is known
    """
    if reasons := unet_reasons(pipe.unet):
        return [f"model: {reason}" for reason in reasons]
    return [
        *setting_reasons(pipe, size, steps),
        *amount_reasons(suppression, guidance),
        *site_reasons(pipe.unet, sites),
        *(f"model: {reason}" for reason in installable_reasons(pipe.unet, sites)),
        *use_reasons(pipe, uses, base_hash),
    ]
