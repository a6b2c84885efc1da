"""The plain inputs of a fusion plan, completed by defaults and checked: steps, size, masks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real

import numpy as np
import torch

from weaver.defaults import model_size
from weaver.features import Features
from weaver.latents import vae_scale_factor
from weaver.layers import site_reasons
from weaver.limits import size_reasons, step_reasons
from weaver.masks.compose import partition_reasons

__all__ = ["amount_reasons", "eta_reasons", "full_masks", "steps_and_size"]

_DEFAULT_STEPS = 50


def steps_and_size(
    pipe, features: Features | None, steps: int | None, height: int | None, width: int | None
) -> tuple[int, tuple[int, int], list[str]]:
    """The number of steps, (h, w) of the latents, and what is wrong with them."""
    factor, reasons = vae_scale_factor(pipe.vae), []
    if features is not None:
        reasons += site_reasons(pipe.unet, features.sites)
        own = (features.size[0] * factor, features.size[1] * factor)
        height, width = height or own[0], width or own[1]
        if (height, width) != own:
            reasons.append(f"size: is {width}x{height}, the template's features are for {own[1]}x{own[0]}")
        if steps is not None and steps != features.steps:
            reasons.append(f"steps: is {steps!r}, the template was inverted in {features.steps}: use the same number")
        steps = features.steps if steps is None else steps
    own = model_size(pipe)
    height = own[0] if height is None else height
    width = own[1] if width is None else width
    steps = _DEFAULT_STEPS if steps is None else steps
    reasons += step_reasons(pipe, steps) + (wrong := size_reasons(pipe, (height, width)))
    return steps, (0, 0) if wrong else (height // factor, width // factor), reasons


def amount_reasons(amounts: Mapping[str, float]) -> list[str]:
    """What is wrong with lambda and omega, by what they are called."""
    return [
        f"{name}: is {value!r}, expected a finite number, 0 or more"
        for name, value in amounts.items()
        if not isinstance(value, Real) or isinstance(value, bool) or not (math.isfinite(value) and value >= 0)
    ]


def eta_reasons(eta: float) -> list[str]:
    """What is wrong with DDIM's eta."""
    if isinstance(eta, Real) and not isinstance(eta, bool) and 0 <= eta <= 1:
        return []
    return [f"eta: is {eta!r}, expected 0 (deterministic) to 1"]


def full_masks(
    masks: torch.Tensor | np.ndarray | None,
    names: Sequence[str],
    background: str | None,
    size: tuple[int, int],
    factor: int,
) -> tuple[torch.Tensor | None, list[str]]:
    """Masks [N + 1, H, W] on the CPU with the background last, and what is wrong with them."""
    pixels = (size[0] * factor, size[1] * factor)
    if masks is None:
        masks = np.zeros((0, *pixels))
        if names:
            return None, [f"no masks for the {len(names)} concepts ({', '.join(names)})"]
    masks = torch.as_tensor(masks).cpu().float()
    if masks.ndim != 3 or len(masks) not in (len(names), len(names) + 1):
        shape = tuple(masks.shape)
        return None, [f"masks have shape {shape}, expected [{len(names)} or {len(names) + 1}, height, width]"]
    if tuple(masks.shape[1:]) not in (pixels, size):
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
