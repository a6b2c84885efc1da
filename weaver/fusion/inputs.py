"""The plain inputs of a fusion plan, completed by defaults and checked: steps, size, masks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch

from weaver.defaults import model_size
from weaver.errors import told
from weaver.features import Features
from weaver.latents import vae_scale_factor
from weaver.layers import site_reasons
from weaver.limits import size_reasons, step_reasons
from weaver.masks.compose import MaskError, as_masks
from weaver.masks.pyramid import partition_reasons
from weaver.values import is_number

__all__ = ["amount_reasons", "eta_reasons", "full_masks", "steps_and_size", "string_reasons"]

_DEFAULT_STEPS = 50


def steps_and_size(
    pipe, features: Features | None, steps: int | None, height: int | None, width: int | None
) -> tuple[int, tuple[int, int] | None, list[str]]:
    """The number of steps, (h, w) of the latents, and what is wrong with them; None for a size that is none."""
    factor, own, reasons = vae_scale_factor(pipe.vae), model_size(pipe), []
    if features is not None and not isinstance(features, Features):
        reasons.append(f"features: is {told(features)}, expected what `collect_features` gives, or None")
        features = None
    if features is not None:
        own = (features.size[0] * factor, features.size[1] * factor)
    size = (own[0] if height is None else height, own[1] if width is None else width)
    wrong = size_reasons(pipe, size)
    if features is not None:
        reasons += site_reasons(pipe.unet, features.sites)
        if size != own and not wrong:
            reasons.append(f"size: is {size[1]}x{size[0]}, the template's features are for {own[1]}x{own[0]}")
        if steps is not None and steps != features.steps:
            reasons.append(f"steps: is {steps!r}, the template was inverted in {features.steps}: use the same number")
        steps = features.steps if steps is None else steps
    steps = _DEFAULT_STEPS if steps is None else steps
    reasons += step_reasons(pipe, steps) + wrong
    return steps, None if wrong else (size[0] // factor, size[1] // factor), reasons


def string_reasons(texts: Mapping[str, str | None], optional: Collection[str] = ()) -> list[str]:
    """Which texts, by what they are called, are none; the `optional` ones may be None."""
    return [
        f"{name}: is {told(text)}, expected one string"
        for name, text in texts.items()
        if not isinstance(text, str) and not (text is None and name in optional)
    ]


def amount_reasons(amounts: Mapping[str, float]) -> list[str]:
    """What is wrong with lambda and omega, by what they are called."""
    return [
        f"{name}: is {told(value)}, expected a finite number, 0 or more"
        for name, value in amounts.items()
        if not is_number(value) or value < 0
    ]


def eta_reasons(eta: float) -> list[str]:
    """What is wrong with DDIM's eta."""
    if is_number(eta) and 0 <= eta <= 1:
        return []
    return [f"eta: is {told(eta)}, expected 0 (deterministic) to 1"]


def full_masks(
    masks: torch.Tensor | np.ndarray | Sequence | None,
    names: Sequence[str],
    background: str | None,
    size: tuple[int, int] | None,
    factor: int,
) -> tuple[torch.Tensor | None, list[str]]:
    """Masks [N + 1, H, W] on the CPU with the background last, and what is wrong with them.

    `size` is (h, w) of the latents; masks of any size will do where it is None.
    """
    if masks is None or (isinstance(masks, list | tuple) and not masks):
        if names:
            return None, [f"no masks for the {len(names)} concepts ({', '.join(names)})"]
        masks = torch.zeros(0, *(size or (1, 1)))
    try:
        masks = as_masks(masks).float()
    except MaskError as error:
        return None, [str(error)]
    if masks.ndim != 3 or 0 in masks.shape[1:] or len(masks) not in (len(names), len(names) + 1):
        shape = tuple(masks.shape)
        return None, [f"masks have shape {shape}, expected [{len(names)} or {len(names) + 1}, height, width]"]
    pixels = size and (size[0] * factor, size[1] * factor)
    if size and tuple(masks.shape[1:]) not in (pixels, size):
        return None, [
            f"masks are {masks.shape[1]} x {masks.shape[2]}, expected the picture's {pixels[0]} x {pixels[1]} "
            f"or the latents' {size[0]} x {size[1]}: resize them"
        ]
    reasons = partition_reasons(masks, names)
    if len(masks) == len(names):
        masks = torch.cat([masks, 1 - masks.sum(0, keepdim=True)])
    if background is not None and not masks[-1].any():
        reasons.append(f"the mask of {background} is empty")
    return masks, reasons
