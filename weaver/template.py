"""The template picture, which fixes the composition (Concept Weaver, section 3.2): made from a prompt, or a file."""

from __future__ import annotations

import inspect
import os

import torch
from PIL import Image

from weaver.errors import WeaverError
from weaver.pictures import fit, open_rgb

__all__ = ["load_template", "make_template"]


def make_template(
    pipe,
    prompt: str,
    *,
    seed: int = 0,
    steps: int = 50,
    guidance: float | None = None,
    negative_prompt: str | None = None,
    size: tuple[int, int] | None = None,
) -> Image.Image:
    """Make a template with any text-to-image pipeline of diffusers.

    Parameters
    ----------
    pipe : the pipeline; the paper's is SDXL at 1024x1024 with 50 steps. It need not be the one that fuses.
    prompt : the base prompt, without any concept's token.
    seed : of the noise, drawn on the CPU, so that it is the same on every device.
    guidance : classifier-free guidance; None for the pipeline's own default.
    size : (height, width) of the template. The pipeline makes its picture at its own default size, which is then cut
        about its centre to this shape and resized by Lanczos. None keeps the picture as made.

    Raises `WeaverError` for a prompt, step count or size that can't be used.
    """
    reasons = _size_reasons(size)
    if not prompt.strip():
        reasons.append("the template's prompt is empty")
    if steps < 1:
        reasons.append(f"template steps is {steps}; expected 1 or more")
    if reasons:
        raise WeaverError("; ".join(reasons))
    options = {"guidance_scale": guidance, "negative_prompt": negative_prompt}
    options = {key: value for key, value in options.items() if value is not None}
    if unknown := set(options) - set(inspect.signature(pipe.__call__).parameters):
        raise WeaverError(f"{type(pipe).__name__} takes no {', '.join(sorted(unknown))}")
    generator = torch.Generator("cpu").manual_seed(seed)
    image = pipe(prompt, num_inference_steps=steps, generator=generator, **options).images[0].convert("RGB")
    return image if size is None else fit(image, size)


def load_template(path: str | os.PathLike, size: tuple[int, int]) -> Image.Image:
    """Read a template from a picture file, at `size` (height, width).

    EXIF rotation is applied, transparency shows white, the picture is cut about its centre to the shape of `size` and
    resized by Lanczos. Raises `WeaverError` naming the file when it can't be read.
    """
    if reasons := _size_reasons(size):
        raise WeaverError("; ".join(reasons))
    return fit(open_rgb(path), size)


def _size_reasons(size: tuple[int, int] | None) -> list[str]:
    if size is None or (len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size)):
        return []
    return [f"template size is {size!r}; expected (height, width) in whole pixels above 0"]
