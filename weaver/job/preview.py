"""A job's masks without its picture: to look at, to edit as layers, and to take back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from weaver.job import Job, JobError, MaskSpec, TemplateSpec
from weaver.job.inputs import read_inputs
from weaver.job.prepare import prepare
from weaver.job.resolve import final_masks
from weaver.masks.overlay import concept_colour, draw_masks
from weaver.pictures import PictureError, open_picture, open_rgb
from weaver.progress import Stages

__all__ = ["LAYERS", "TEMPLATE", "Preview", "layer_files", "place_files", "preview_masks", "with_layers"]

TEMPLATE, LAYERS = "template.png", "layers"  # in a folder of masks that are edited
_SHARED = 16  # colours that a mask and a template have in common by chance, at most


@dataclass(frozen=True, eq=False)
class Preview:
    """A job's template and masks.

    Parameters
    ----------
    names : of the N concepts, and of the background's where it is one
    template : the picture in which masks were found
    sources : one a concept, where its mask comes from
    dense : [N, height, width] float32, as found or given
    final : [N + 1, height, width] float32, as they will be used; the background last
    """

    names: tuple[str, ...]
    template: Image.Image
    sources: tuple[str, ...]
    dense: torch.Tensor
    final: torch.Tensor

    def overlay(self) -> Image.Image:
        """The final masks drawn over the template, with names."""
        return draw_masks(self.template, self.final, self.names)

    def layers(self) -> list[Image.Image]:
        """One RGBA picture a concept, of the template's size: its dense mask in its colour, transparent elsewhere."""
        return [_layer(mask, concept_colour(number)) for number, mask in enumerate(self.dense)]


def preview_masks(
    job: Job,
    *,
    source: str = "job",
    offline: bool = False,
    stages: Stages | None = None,
    manifest: Mapping | None = None,
) -> Preview:
    """Make or read a job's template and find its masks, as a run does before it trains or draws anything.

    Parameters
    ----------
    source : the job's file, or what else to call it in errors
    offline : take models from the local cache only
    stages : shows progress; None shows nothing
    manifest : of the run whose masks these are, as `read_job` gives it: files and models must be the same

    Raises `WeaverError`, one line.
    """
    stages = stages or Stages(bars=False)
    options = {"stages": stages, "offline": offline, "manifest": manifest, "recorded": False}
    prepared = prepare(job, read_inputs(job, source), source, **options)
    job, template, places = prepared.template()
    names = tuple(spec.name for spec in job.everyone)
    return Preview(names, template, places.sources, places.dense(job.size), final_masks(job, places))


def place_files(job: Job) -> dict[str, Path]:
    """The files of a job's template and masks, by their fields."""
    files = {"template.image": job.template.image}
    files |= {f"concepts[{number}].mask.file": spec.mask.file for number, spec in enumerate(job.concepts)}
    return {field: file for field, file in files.items() if file}


def layer_files(names: Sequence[str]) -> list[Path]:
    """The layers of concepts with these names, relative to the folder of masks."""
    return [Path(LAYERS) / f"{name}.png" for name in names]


def with_layers(job: Job, folder: Path) -> Job:
    """The same job on the template and with the masks of a folder in which `weaver masks --edit` wrote its layers.

    The mask of a layer is what is opaque in it. Raises `JobError` naming the files that are not there, and layers that
    were saved together with the template below them.
    """
    files = [folder / file for file in layer_files([spec.name for spec in job.concepts])]
    template = folder / TEMPLATE
    if missing := [str(file) for file in (template, *files) if not file.is_file()]:
        raise JobError(f"--masks: {', '.join(missing)} not there; `weaver masks JOB --edit --out {folder}` writes them")
    if merged := [str(file) for file in files if _is_merged(file, template)]:
        raise JobError(
            f"--masks: {', '.join(merged)} hold the template too, and no transparent pixel: hide every other layer of "
            "the editor, and save them anew, as PNG with transparency"
        )
    concepts = tuple(
        replace(spec, mask=MaskSpec(file=file.resolve())) for spec, file in zip(job.concepts, files, strict=True)
    )
    return replace(job, template=TemplateSpec(image=template.resolve()), concepts=concepts)


def _is_merged(layer: Path, template: Path) -> bool:
    """Whether a layer has no transparent pixel and is the template in places, which a mask drawn in a few colours, as a
    picture without transparency may be, is not."""
    try:
        image, below = open_picture(layer).convert("RGBA"), open_rgb(template)
    except PictureError:
        return False  # which is told with its field when the job's files are read
    if image.size != below.size or image.getchannel("A").getextrema()[0] < 255:
        return False
    colours, own = np.asarray(image.convert("RGB")), np.asarray(below)
    return len(np.unique(colours[(colours == own).all(-1)], axis=0)) > _SHARED


def _layer(mask: torch.Tensor, colour: tuple[int, int, int]) -> Image.Image:
    inside = Image.fromarray((mask >= 0.5).to(torch.uint8).mul(255).numpy())
    layer = Image.new("RGBA", inside.size, (*colour, 0))
    layer.putalpha(inside)
    return layer
