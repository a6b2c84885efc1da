"""What can be known before the first sampling step: why a model and its settings can't fuse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from weaver.concepts.concept import Concept
from weaver.fusion.attach import installable_reasons
from weaver.fusion.contexts import ConceptUse, use_reasons
from weaver.fusion.inputs import amount_reasons
from weaver.fusion.support import model_reasons
from weaver.layers import InjectionSites, site_reasons
from weaver.limits import size_reasons, step_reasons

__all__ = ["argument_reasons", "fusion_reasons"]


def argument_reasons(concepts, background, size) -> list[str]:
    """Which arguments of `weave` are of another kind than it takes; empty when none is."""
    reasons, kinds = [], (Concept, ConceptUse)
    if isinstance(concepts, Sequence) and not isinstance(concepts, str):
        odd = [entry for entry in concepts if not isinstance(entry, kinds)]
        reasons += [f"concepts: {entry!r} is a {type(entry).__name__}, no Concept and no ConceptUse" for entry in odd]
    else:
        reasons.append(f"concepts: is a {type(concepts).__name__}, expected a list of concepts")
    if background is not None and not isinstance(background, kinds):
        reasons.append(f"background: is a {type(background).__name__}, expected a Concept or a ConceptUse")
    if size is not None and not (isinstance(size, Sequence) and len(size) == 2):
        reasons.append(f"size: is {size!r}, expected (height, width) in pixels")
    return reasons


def fusion_reasons(
    pipe,
    uses: Sequence[ConceptUse] = (),
    *,
    size: tuple[int, int],
    steps: int,
    sites: InjectionSites,
    amounts: Mapping[str, float],
    base_hash: str | None = None,
) -> list[str]:
    """Everything that stands against a fusion, short of its prompts and masks; empty when nothing does.

    Parameters
    ----------
    uses : of all concepts, the background's too; those that are still to be trained are left out
    size : (height, width) of the picture in pixels
    sites : where features will be injected
    amounts : omega and lambda, by what to call them
    base_hash : `attn2_hash` of the pipeline's U-Net where it is known
    """
    if reasons := model_reasons(pipe):
        return [f"model: {reason}" for reason in reasons]
    return [
        *step_reasons(pipe, steps),
        *size_reasons(pipe, size),
        *amount_reasons(amounts),
        *site_reasons(pipe.unet, sites),
        *(f"model: {reason}" for reason in installable_reasons(pipe.unet, sites)),
        *use_reasons(pipe, uses, base_hash),
    ]
