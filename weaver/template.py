"""The template picture, which fixes the composition (Concept Weaver, section 3.2): made from a prompt, or a file."""

from __future__ import annotations

import inspect
import os
from pathlib import Path

import torch
from PIL import Image, ImageOps

from weaver.defaults import defaults_for
from weaver.errors import WeaverError, raise_if
from weaver.graphs import CUDAGraphs, captured, graph_reasons
from weaver.limits import step_reasons
from weaver.memory.resting import lent, modules_of
from weaver.pictures import PictureError, as_rgb, fit, open_picture
from weaver.progress import Stages

__all__ = ["load_template", "make_template", "shown_size", "template_picture"]

_MOST_ENLARGED = 8  # times: a cell of Stable Diffusion's latents is then one pixel


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

    Raises `WeaverError` for a prompt, step count or size that can't be used, and when the pipeline's safety checker
    blacked the picture out.
    """
    reasons = _size_reasons(size)
    if not prompt.strip():
        reasons.append("the template's prompt is empty")
    if steps < 1:
        reasons.append(f"template steps is {steps}; expected 1 or more")
    elif getattr(pipe, "scheduler", None) is not None:
        reasons += step_reasons(pipe, steps)
    if reasons:
        raise WeaverError("; ".join(reasons))
    options = {"guidance_scale": guidance, "negative_prompt": negative_prompt}
    options = {key: value for key, value in options.items() if value is not None}
    if unknown := set(options) - set(inspect.signature(pipe.__call__).parameters):
        raise WeaverError(f"{type(pipe).__name__} takes no {', '.join(sorted(unknown))}")
    generator = torch.Generator("cpu").manual_seed(seed)
    output = pipe(prompt, num_inference_steps=steps, generator=generator, **options)
    if any(getattr(output, "nsfw_content_detected", None) or ()):
        raise WeaverError(
            f"the safety checker of {type(pipe).__name__} blacked the template out: use another seed or prompt"
        )
    image = output.images[0].convert("RGB")
    return image if size is None else fit(image, size)


def load_template(source: str | os.PathLike | Image.Image, size: tuple[int, int]) -> Image.Image:
    """A template of a picture or its file, at `size` (height, width).

    EXIF rotation and colour profile are applied, transparency shows white, the picture is cut about its centre to the
    shape of `size` and resized by Lanczos. Raises `WeaverError` naming the file when it can't be read, and when what
    is left of it by the cut is so small that it would be enlarged more than eight times.
    """
    if reasons := _size_reasons(size):
        raise WeaverError("; ".join(reasons))
    name = "template" if isinstance(source, Image.Image) else str(source)
    image = as_rgb(_upright(source), name)
    larger = max(size[0] / image.height, size[1] / image.width)
    if larger > _MOST_ENLARGED:
        least = [-(-side // _MOST_ENLARGED) for side in size]
        raise PictureError(
            f"{name}: is {image.width}x{image.height}, which would have to be enlarged {larger:.0f} times; a template "
            f"of {size[1]}x{size[0]} needs a picture of {least[1]}x{least[0]} at least"
        )
    return fit(image, size)


def shown_size(source: str | os.PathLike | Image.Image) -> tuple[int, int]:
    """(height, width) of a picture or its file as it is shown; `PictureError` when it can't be read."""
    image = _upright(source)
    return image.height, image.width


def _upright(source: str | os.PathLike | Image.Image) -> Image.Image:
    return ImageOps.exif_transpose(source) if isinstance(source, Image.Image) else open_picture(source)


def template_picture(
    pipe,
    source: str | Path,
    *,
    size: tuple[int, int],
    seed: int = 0,
    steps: int = 50,
    guidance: float | None = None,
    negative_prompt: str | None = None,
    graphs: CUDAGraphs | None = None,
    stages: Stages | None = None,
) -> Image.Image:
    """The template at `size` (height, width): read from a `Path`, or made by `pipe` from a prompt.

    `guidance` None is the model's default for Stable Diffusion 1.x and 2.x, any other pipeline's own. `graphs` replay
    the forwards of a pipeline that has a U-Net.
    """
    stages = stages or Stages(bars=False)
    with stages.stage("template"):
        if isinstance(source, Path):
            return load_template(source, size)
        if guidance is None and type(pipe).__name__ == "StableDiffusionPipeline":
            guidance = defaults_for(pipe).template_guidance
        unet = getattr(pipe, "unet", None)
        graphs = None if unet is None else graphs
        with stages.pipeline_bar(pipe, "template"), lent(*modules_of(pipe)):
            raise_if(graph_reasons(unet, graphs), "Cannot make the template")
            with captured(unet, graphs):
                return make_template(
                    pipe,
                    source,
                    seed=seed,
                    steps=steps,
                    guidance=guidance,
                    negative_prompt=negative_prompt or None,
                    size=size,
                )


def _size_reasons(size: tuple[int, int] | None) -> list[str]:
    if size is None or (len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size)):
        return []
    return [f"template size is {size!r}; expected (height, width) in whole pixels above 0"]
