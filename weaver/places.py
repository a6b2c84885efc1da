"""Where each concept stands: files and outlines as they are given, the rest found in the template by their words."""

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
from weaver.job.mask_rules import mask_reasons
from weaver.masks import (
    Found,
    MaskError,
    TextMasks,
    Wish,
    assign,
    box_mask,
    compose_masks,
    load_mask,
    polygon_mask,
)
from weaver.masks.attention import attention_objects, word_positions
from weaver.masks.compose import as_masks
from weaver.masks.given import in_pixels
from weaver.masks.opening import open_text_masks
from weaver.masks.pyramid import partition_reasons
from weaver.masks.segmenter import segmenter_objects, segmenter_reasons
from weaver.masks.text import phrase_reasons
from weaver.memory.resting import lent, modules_of
from weaver.models import is_embedded
from weaver.progress import Stages

__all__ = ["Places", "best_source", "places_of"]


@dataclass(frozen=True, eq=False)
class Places:
    """The masks that are known already, and what is still to be found.

    Parameters
    ----------
    given : one a concept, [height, width] bool, or None where it is to be found
    wishes : one a concept, what is to be found for it; None where its mask is given
    source : "segmenter", "attention" or "text", who finds words
    sources : one a concept, where its mask comes from, for a record
    final : [N + 1, height, width] float32 where the masks came composed, the background last; else None
    finder : Grounding DINO and SAM, where they are open; None opens the usual ones when they are needed
    """

    given: tuple[torch.Tensor | None, ...]
    wishes: tuple[Wish | None, ...]
    source: str
    sources: tuple[str, ...]
    final: torch.Tensor | None = None
    finder: TextMasks | None = None

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
        """Read files and outlines, and see that every other concept has a word.

        Parameters
        ----------
        specs : one a concept
        words : the concepts' class words, for those whose spec names none; None for a region without a concept
        labels : what to call each place in errors
        source : "segmenter", "attention" or "text"
        size : (height, width) of the template, and `source_size` of its file, on which masks may be drawn too

        Raises `WeaverError` with every reason, the specs' own (`weaver.job.mask_rules`) among them.
        """
        if source not in MASK_SOURCES:
            raise WeaverError(f"mask source {source!r} is not one of {', '.join(MASK_SOURCES)}")
        given, wishes, sources, reasons = [], [], [], []
        for spec, word, label in zip(specs, words, labels, strict=True):
            word, mask, wish = spec.word or word, None, None
            if faults := [f"{name}: {fault}" if name else fault for name, fault in mask_reasons(spec)]:
                reasons.append(f"{label}: " + "; ".join(faults))
                continue
            try:
                if spec.file is not None:
                    mask = load_mask(spec.file, size, source_size=source_size, label=spec.label)
                elif spec.box is not None:
                    mask = box_mask(spec.box, size)
                elif spec.polygon is not None:
                    mask = polygon_mask(spec.polygon, size)
                elif word is None and spec.points is None:
                    raise WeaverError("needs a word, a mask file or a box")
                else:
                    wish = _wish(spec, word, size)
            except WeaverError as error:
                reasons.append(f"{label}: {error}")
            given.append(mask)
            wishes.append(wish)
            kinds = (kind for kind in ("file", "box", "polygon", "points") if getattr(spec, kind) is not None)
            sources.append(next(kinds, f"{source}: {word}"))
        if reasons:
            raise WeaverError("; ".join(reasons))
        return cls(tuple(given), tuple(wishes), source, tuple(sources))

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

    @property
    def words(self) -> tuple[str | None, ...]:
        """One a concept, the word it is found by; None where there is nothing to find, or points say what."""
        return tuple(wish and wish.word for wish in self.wishes)

    @property
    def needs_finder(self) -> bool:
        """Whether Grounding DINO or SAM has to find something."""
        return any(wish and (wish.points or self.source == "text") for wish in self.wishes)

    def opened(self, **options) -> Places:
        """The same with Grounding DINO and SAM loaded; the detector only where words need it.

        `options` are those of `open_text_masks`, whose errors it raises.
        """
        return replace(self, finder=open_text_masks(words=any(self.words) and self.source == "text", **options))

    def word_reasons(self, pipe, prompt: str) -> list[str]:
        """Which words can't be found in any template that `prompt` describes; empty when all may be."""
        words = list(dict.fromkeys(word for word in self.words if word))
        if self.source == "text":
            return [reason for word in words for reason in phrase_reasons(word)]
        reasons = [
            f"rank {wish.rank}: the {self.source} does not tell how sure it is of a {wish.word!r}; use order, at or "
            "around, or masks.source: text"
            for wish in self.wishes
            if wish and wish.rank is not None
        ]
        if self.source == "segmenter":
            return reasons + segmenter_reasons(words)
        for word in words:
            try:
                word_positions(pipe, prompt, [word])
            except WeaverError as error:
                reasons.append(str(error))
        return reasons

    def find(self, pipe, template: Image.Image, prompt: str, stages: Stages | None = None) -> Places:
        """Find what is wished for in the template, which `prompt` describes; afterwards every mask is given.

        `stages` shows how far it is. Raises `MaskError` for what can't be found.
        """
        by_word = [wish for wish in self.wishes if wish and wish.word]
        if not any(self.wishes):
            return self
        places = self if self.finder or not self.needs_finder else self.opened(device=pipe.device.type)
        template = template.convert("RGB")
        with (stages or Stages(bars=False)).bar("masks", 1) as move:
            found = places._objects(pipe, template, prompt, by_word, move) if by_word else []
            taken = iter(assign(found, by_word))
            given = tuple(
                mask
                if wish is None
                else found[next(taken)].mask
                if wish.word
                else places.finder.at_points(template, wish.points)
                for mask, wish in zip(self.given, self.wishes, strict=True)
            )
        return replace(self, given=given, wishes=(None,) * len(given), finder=None)

    def _objects(self, pipe, template: Image.Image, prompt: str, wishes: Sequence[Wish], move) -> list[Found]:
        """Every object that may be meant."""
        if self.source == "text":
            return self.finder.find(template, [wish.word for wish in wishes], progress=move)
        if self.source == "segmenter":
            found = segmenter_objects(template, wishes, prompt)
            move(1, 1)
            return found
        with lent(*modules_of(pipe)):
            return attention_objects(pipe, template, prompt, wishes, progress=move)

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
    source: str | TextMasks | None,
    size: tuple[int, int],
    source_size: tuple[int, int] | None = None,
) -> Places:
    """Where the concepts stand that `weave` draws, whichever way it was told; the arguments are its own.

    Raises `WeaverError` with every reason.
    """
    if places is not None and masks is not None:
        raise WeaverError("give either masks or places, not both")
    if isinstance(places, Places):
        if len(places.given) != len(uses):
            raise WeaverError(f"places are of {len(places.given)} concepts, there are {len(uses)}; build them anew")
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
    finder = source if isinstance(source, TextMasks) else None
    source = "text" if finder else source or best_source(pipe)
    built = Places.build(places, words, labels, source=source, size=size, source_size=source_size)
    return replace(built, finder=finder)


def _wish(spec: MaskSpec, word: str | None, size: tuple[int, int]) -> Wish:
    """What a spec asks to be found, in pixels of a template of `size` (height, width)."""
    at, around = (None if x is None else tuple(in_pixels(x, size)) for x in (spec.at, spec.around))
    if spec.points is None:
        return Wish(word.lower(), order=spec.order, rank=spec.rank, at=at, around=around)
    numbers = in_pixels([x for point in spec.points for x in point], size)
    points = tuple(zip(numbers[::2], numbers[1::2], strict=True))
    height, width = size
    if outside := [list(point) for point in points if not (0 <= point[0] < width and 0 <= point[1] < height)]:
        raise MaskError(f"points {told(outside)} are outside the {width}x{height} template")
    return Wish(points=points)
