"""Everything one run needs, frozen."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from weaver.choices import BOX_THRESHOLD, TEXT_THRESHOLD
from weaver.errors import WeaverError

__all__ = [
    "BackgroundSpec",
    "ConceptSpec",
    "FusionSpec",
    "Job",
    "JobError",
    "MaskSpec",
    "MasksSpec",
    "SAME_MODEL",
    "StyleSpec",
    "TemplateSpec",
    "TextSpec",
    "TrainSpec",
]

SAME_MODEL = "same"  # as `TemplateSpec.model`: the model that fuses


class JobError(WeaverError):
    """A job that can't be run; lists every field that is wrong."""


@dataclass(frozen=True)
class TrainSpec:
    """How to learn a concept from pictures (files and folders, or "embedded:<name>").

    `caption` is for pictures without a text file beside them. `settings` are those of
    `weaver.concepts.settings.TrainSettings` that differ from the model's own training defaults.
    """

    images: tuple[Path, ...] | str
    token: str
    caption: str | None = None
    settings: tuple[tuple[str, float | int | bool], ...] = ()


@dataclass(frozen=True)
class MaskSpec:
    """Where one concept stands: an object of a word, a file (one label of it, or all), a box, a polygon or points.

    Which object of the word is meant is said by at most one of `order` (the k-th from the left), `rank` (the k-th by
    confidence), `at` (a point on it) and `around` (a box). `points` are on the object and given to SAM. Coordinates are
    in pixels of the template, or in parts of it where all lie in 0..1. What is wrong with a spec is told where it is
    used, in a job file or by `weave` (`weaver.job.mask_rules`).
    """

    word: str | None = None
    order: int | None = None
    rank: int | None = None
    at: tuple[float, float] | None = None
    around: tuple[float, float, float, float] | None = None
    file: Path | None = None
    label: int | str | None = None
    box: tuple[float, float, float, float] | None = None
    polygon: tuple[tuple[float, float], ...] | None = None
    points: tuple[tuple[float, float], ...] | None = None

    @property
    def known(self) -> bool:
        """Whether it is a mask by itself, for which nothing has to be found in the template."""
        return any(value is not None for value in (self.file, self.box, self.polygon))


@dataclass(frozen=True)
class BackgroundSpec:
    """A concept, from a concept file or to be trained, and how it is used; on its own, the background's."""

    name: str
    word: str | None
    file: Path | str | None = None
    token: str | None = None
    train: TrainSpec | None = None
    prompt: str | None = None
    strength: float = 1.0
    window: tuple[float, float] = (0.0, 1.0)
    scale: float = 1.0
    negative_prompt: str | None = None
    parts: str = "whole"


@dataclass(frozen=True)
class ConceptSpec(BackgroundSpec):
    """A concept with its place in the picture."""

    mask: MaskSpec = MaskSpec()


@dataclass(frozen=True)
class StyleSpec:
    """A LoRA in which the whole picture is drawn, times a weight."""

    file: Path
    weight: float = 1.0


@dataclass(frozen=True)
class TemplateSpec:
    """The template: a picture file, or made from a prompt by `model`.

    `model` is a model as `Job.model`, or "same" for the one that fuses; None is SDXL as in the paper, and the embedded
    model for itself (`weaver.job.resolve`).

    Where it does not show what the prompt names, another seed is tried, up to `tries` pictures in all: where a word
    is not found, or, with the embedded model, where a region looks like another animal.
    """

    image: Path | None = None
    prompt: str | None = None
    model: str | None = None
    seed: int | None = None
    steps: int = 50
    guidance: float | None = None
    tries: int = 1


@dataclass(frozen=True)
class TextSpec:
    """Grounding DINO and SAM, for the source "text" and for points: whose, which weights, and the thresholds (0..1).

    `detector` and `segmenter` are folders, Hub ids or, of the original packages, checkpoint files; None is the default.
    """

    backend: str = "transformers"
    detector: Path | str | None = None
    segmenter: Path | str | None = None
    box_threshold: float = BOX_THRESHOLD
    text_threshold: float = TEXT_THRESHOLD


@dataclass(frozen=True)
class MasksSpec:
    """Where masks come from by default, how they are composed (`weaver.masks.compose_masks`) and down-sampled."""

    source: str | None = None
    dilation: float | None = None
    overlap: str = "priority"
    text: TextSpec = TextSpec()
    min_area: float = 0
    fill_holes: bool = False
    feather: int = 0
    downsampling: str = "area"

    @property
    def shaping(self) -> dict:
        """What of it `compose_masks` takes."""
        return {
            "dilation": self.dilation,
            "overlap": self.overlap,
            "min_area": self.min_area,
            "fill_holes": self.fill_holes,
            "feather": self.feather,
        }


@dataclass(frozen=True)
class FusionSpec:
    """Suppression (the paper's lambda), guidance (its omega), DDIM's eta, injection; None is the model's own default.

    `sites` names a table of `weaver.layers`; the windows are the parts of the steps, from the first, that inject, and
    `features` is how they are had (`weaver.features`).
    """

    suppression: float | None = None
    guidance: float | None = None
    sites: str | None = None
    resnet_window: float | None = None
    attention_window: float | None = None
    features: str = "stored"
    eta: float | None = None


@dataclass(frozen=True)
class Job:
    """One run, complete and checked as far as a job file alone can be."""

    model: str
    prompt: str
    concepts: tuple[ConceptSpec, ...]
    background: BackgroundSpec | None = None
    styles: tuple[StyleSpec, ...] = ()
    negative_prompt: str = ""
    seed: int = 0
    steps: int = 50
    size: tuple[int, int] | None = None
    device: str = "auto"
    inversion_prompt: str | None = None
    keep_background: bool = False
    template: TemplateSpec = field(default_factory=TemplateSpec)
    masks: MasksSpec = field(default_factory=MasksSpec)
    fusion: FusionSpec = field(default_factory=FusionSpec)

    @property
    def everyone(self) -> tuple[BackgroundSpec, ...]:
        """All concepts, the background last."""
        return (*self.concepts, self.background) if self.background else self.concepts

    def places(self) -> list[tuple[str, BackgroundSpec]]:
        """All concepts with where they stand in a job file: "concepts[0]", ..., "background"."""
        named = [(f"concepts[{i}]", spec) for i, spec in enumerate(self.concepts)]
        return [*named, ("background", self.background)] if self.background else named
