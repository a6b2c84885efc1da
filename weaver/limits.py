"""What a pipeline can do at all: sizes of pictures and numbers of steps."""

from __future__ import annotations

from weaver.latents import vae_scale_factor
from weaver.schedule import most_steps
from weaver.values import is_whole

__all__ = ["pixel_multiple", "size_reasons", "step_reasons"]

_PIXEL_MULTIPLE = 8  # diffusers' Stable Diffusion pipelines take no other size


def step_reasons(pipe, steps: int) -> list[str]:
    """What is wrong with a number of steps for a pipeline."""
    limit = most_steps(pipe.scheduler)
    if is_whole(steps, 1) and steps <= limit:
        return []
    return [f"steps: is {steps!r}, expected a whole number from 1 to {limit}"]


def pixel_multiple(vae) -> int:
    """What the sides of a picture must be multiples of, in pixels."""
    return max(_PIXEL_MULTIPLE, vae_scale_factor(vae))


def size_reasons(pipe, size: tuple[int, int]) -> list[str]:
    """What is wrong with a picture's size (height, width) for a pipeline."""
    multiple = pixel_multiple(pipe.vae)
    if all(isinstance(side, int) and side > 0 and side % multiple == 0 for side in size):
        return []
    kind = "" if all(isinstance(side, int) for side in size) else ", as whole numbers"
    return [f"size: is {size[1]!r}x{size[0]!r}, expected multiples of {multiple} pixels{kind}"]
