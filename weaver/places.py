"""Where each concept stands: files and boxes as they are given, the rest found in the template by their words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from weaver.choices import MASK_SOURCES
from weaver.errors import WeaverError, told
from weaver.fusion.contexts import ConceptUse
from weaver.job import MaskSpec
from weaver.masks import MaskError, attention_masks, box_mask, compose_masks, load_mask, segmenter_masks
from weaver.masks.attention import word_positions
from weaver.masks.compose import as_masks
from weaver.masks.pyramid import partition_reasons
from weaver.masks.segmenter import segmenter_reasons
from weaver.memory.resting import lent, modules_of
from weaver.models import is_embedded
from weaver.progress import Stages

__all__ = ["Places", "best_source", "places_of"]


@dataclass(frozen=True, eq=False)
class Places:
    """The masks that are known already, and the words of those still to be found.

    Parameters
    ----------
    given : one a concept, [height, width] bool, or None where its word is to be found
    words : one a concept, the word it is found by
    source : "segmenter" or "attention", who finds words
    sources : one a concept, where its mask comes from, for a record
    final : [N + 1, height, width] float32 where the masks came composed, the background last; else None
    """

    given: tuple[torch.Tensor | None, ...]
    words: tuple[str | None, ...]
    source: str
    sources: tuple[str, ...]
    final: torch.Tensor | None = None

    @classmethod
    def build(
        cls,
        specs: Sequence[MaskSpec],
        words: Sequence[str | None],
        labels: Sequence[str],
        *,
        source: str,
        size: tuple[int, int],
        source_size: tuple[int, int] | None = None,
    ) -> Places:
        """Read files and boxes, and see that every other concept has a word.

        Parameters
        ----------
        specs : one a concept
        words : the concepts' class words, for those whose spec names none; None for a region without a concept
        labels : what to call each place in errors
        source : "segmenter" or "attention"
        size : (height, width) of the template, and `source_size` of its file, on which masks may be drawn too

        Raises `WeaverError` with every reason.
        """
        if source not in MASK_SOURCES:
            raise WeaverError(f"mask source {source!r} is not one of {', '.join(MASK_SOURCES)}")
        given, wanted, sources, reasons = [], [], [], []
        for spec, word, label in zip(specs, words, labels, strict=True):
            word, mask = spec.word or word, None
            try:
                if spec.file is not None:
                    mask = load_mask(spec.file, size, source_size=source_size, label=spec.label)
                elif spec.box is not None:
                    mask = box_mask(spec.box, size)
                elif word is None:
                    raise WeaverError("needs a word, a mask file or a box")
            except WeaverError as error:
                reasons.append(f"{label}: {error}")
            given.append(mask)
            wanted.append(word if mask is None else None)
            sources.append("file" if spec.file else "box" if spec.box else f"{source}: {word}")
        if reasons:
            raise WeaverError("; ".join(reasons))
        return cls(tuple(given), tuple(wanted), source, tuple(sources))

    @classmethod
    def from_masks(
        cls, masks: torch.Tensor | np.ndarray | Sequence, names: Sequence[str], size: tuple[int, int]
    ) -> Places:
        """Take the masks of the concepts `names` from an array, or from a list of one [height, width] each.

        Parameters
        ----------
        masks : [N, height, width], still to be composed, or [N + 1, height, width] as `compose_masks` returns them
        size : (height, width)

        Raises `MaskError` for another shape, and for composed masks that are empty or do not sum to one.
        """
        masks, count = as_masks(masks), len(names)
        if tuple(masks.shape) not in ((count, *size), (count + 1, *size)):
            raise MaskError(
                f"masks have shape {tuple(masks.shape)}, expected {[count, *size]}, or {[count + 1, *size]} with the "
                "background"
            )
        final = masks.float() if len(masks) > count else None
        if final is not None and (reasons := partition_reasons(final, names)):
            raise MaskError("; ".join(reasons))
        return cls(tuple(masks[:count]), (None,) * count, "attention", ("array",) * count, final)

    def word_reasons(self, pipe, prompt: str) -> list[str]:
        """Which words can't be found in any template that `prompt` describes; empty when all may be."""
        words = list(dict.fromkeys(word.lower() for word in self.words if word))
        if self.source == "segmenter":
            return segmenter_reasons(words)
        reasons = []
        for word in words:
            try:
                word_positions(pipe, prompt, [word])
            except WeaverError as error:
                reasons.append(str(error))
        return reasons

    def find(self, pipe, template: Image.Image, prompt: str, stages: Stages | None = None) -> Places:
        """Find the words in the template, which `prompt` describes; afterwards every mask is given.

        `stages` shows how far it is. Raises `MaskError` for what can't be found.
        """
        words = [word.lower() for word in self.words if word]
        if not words:
            return self
        with (stages or Stages(bars=False)).bar("masks", 1) as move:
            if self.source == "segmenter":
                found = iter(segmenter_masks(template, words, prompt))
                move(1, 1)
            else:
                with lent(*modules_of(pipe)):
                    found = iter(attention_masks(pipe, template, prompt, words, progress=move))
        given = tuple(next(found) if mask is None else mask for mask in self.given)
        return replace(self, given=given, words=(None,) * len(given))

    def compose(self, size: tuple[int, int], *, names: Sequence[str], **shaping) -> torch.Tensor:
        """The final masks [N + 1, height, width] float32, the background last; masks that came composed stay so.

        Before every mask is found it tells what is wrong with those that are known: the others only take more away.
        `size` is (height, width), the rest as in `compose_masks`, with the same defaults. Raises `MaskError`.
        """
        if self.final is not None:
            return self.final
        known = [name for name, mask in zip(names, self.given, strict=True) if mask is not None]
        return compose_masks(self.dense(size), names=known, **shaping)

    def dense(self, size: tuple[int, int]) -> torch.Tensor:
        """The masks [N, height, width] float32 that are given, not yet composed; `size` is (height, width)."""
        known = [mask.cpu().float() for mask in self.given if mask is not None]
        return torch.stack(known) if known else torch.zeros(0, *size)


def best_source(pipe) -> str:
    """Who finds words best in this model's pictures: its own segmenter for the embedded model, else its attention."""
    return "segmenter" if is_embedded(pipe) else "attention"


def places_of(
    pipe,
    uses: Sequence[ConceptUse],
    places: Places | Sequence[MaskSpec] | None,
    masks: torch.Tensor | np.ndarray | Sequence | None,
    *,
    source: str | None,
    size: tuple[int, int],
    source_size: tuple[int, int] | None = None,
) -> Places:
    """Where the concepts stand that `weave` draws, whichever way it was told; the arguments are its own.

    Raises `WeaverError` with every reason.
    """
    if places is not None and masks is not None:
        raise WeaverError("give either masks or places, not both")
    if isinstance(places, Places):
        return places
    if masks is not None:
        return Places.from_masks(masks, [use.name for use in uses], size)
    places = [MaskSpec()] * len(uses) if places is None else places
    if not isinstance(places, Sequence) or not all(isinstance(place, MaskSpec) for place in places):
        raise WeaverError(f"places: is {told(places)}, expected a list of one MaskSpec a concept")
    if len(places) != len(uses):
        raise WeaverError(f"{len(places)} places for {len(uses)} concepts; give one a concept")
    words = [use.concept.word if use.concept else None for use in uses]
    labels = [f"the place of {use.name}" for use in uses]
    source = source or best_source(pipe)
    return Places.build(places, words, labels, source=source, size=size, source_size=source_size)
