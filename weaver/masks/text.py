"""Masks from text: a detector finds boxes for a phrase, a segmenter makes masks of boxes (Concept Weaver, section 3.4).

The paper does it as langSAM does, with Grounding DINO and SAM. Here is what all pairs of such models have in common;
`weaver.masks.grounded` runs those of transformers, `weaver.masks.original` the authors' own packages.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from PIL import Image

from weaver.choices import BOX_THRESHOLD, TEXT_THRESHOLD
from weaver.errors import raise_if, told
from weaver.masks.assign import Box, Found
from weaver.masks.compose import MaskError
from weaver.values import is_number

__all__ = ["Detection", "Detector", "Outliner", "TextMasks", "phrase_reasons"]

_ARTICLES = {"a", "an", "the"}
_MOST = 40  # detections of one phrase whose masks are made, the surest


@dataclass(frozen=True)
class Detection:
    """A box (left, top, right, bottom) in pixels, how sure the detector is (0..1), and the words it read there."""

    box: Box
    score: float
    text: str


class Detector(Protocol):
    """Finds boxes for a phrase, by its `model`, a `torch.nn.Module`."""

    model: torch.nn.Module

    def detect(self, image: Image.Image, phrase: str, box_threshold: float, text_threshold: float) -> list[Detection]:
        """Boxes whose best word is surer than `box_threshold`; read are the words surer than `text_threshold`."""
        ...


class Outliner(Protocol):
    """Makes masks of boxes and of points, by its `model`, a `torch.nn.Module`."""

    model: torch.nn.Module

    def of_boxes(self, image: Image.Image, boxes: Sequence[Box]) -> torch.Tensor:
        """The object in every box: [K, height, width] bool."""
        ...

    def of_points(self, image: Image.Image, points: Sequence[tuple[float, float]]) -> torch.Tensor:
        """The one object that all points (x, y), in pixels, are on: [height, width] bool."""
        ...


@dataclass(frozen=True, eq=False)
class TextMasks:
    """Who finds phrases and points in a picture.

    Parameters
    ----------
    outliner : makes the masks
    detector : finds the boxes; None where only points are asked for
    box_threshold : how sure, 0..1, the detector must be of a box
    text_threshold : how sure it must be of a word to have read it there; no surer than of the box
    """

    outliner: Outliner
    detector: Detector | None = None
    box_threshold: float = BOX_THRESHOLD
    text_threshold: float = TEXT_THRESHOLD

    def __post_init__(self):
        names = ("box_threshold", "text_threshold")
        amounts = {name: getattr(self, name) for name in names}
        reasons = [
            f"{name}: is {told(value)}, expected a number from 0 to 1"
            for name, value in amounts.items()
            if not is_number(value) or not 0 <= value <= 1
        ]
        raise_if(reasons, "Cannot find words")

    @property
    def components(self) -> dict[str, object]:
        """Its models, by what they do."""
        parts = {"detector": self.detector, "segmenter": self.outliner}
        return {name: part.model for name, part in parts.items() if part is not None}

    @torch.no_grad()
    def find(
        self, image: Image.Image, phrases: Sequence[str], progress: Callable[[int, int], None] | None = None
    ) -> list[Found]:
        """Every object that answers to one of the phrases, the surest of each phrase first.

        Each phrase is looked for by itself, so that no word of another is read into its boxes. An object's score is the
        detector's, times the part of the phrase's words that it read there: of "white dog" a black dog keeps half.
        Boxes end at the picture's edges; those of no width or height, or without a mask, are left out.

        Parameters
        ----------
        image : RGB
        phrases : "dog" or "white dog"
        progress : called after each phrase with (done, total)

        Raises `MaskError` for a phrase that can't be asked for.
        """
        if self.detector is None:
            raise MaskError("no detector was loaded, which words are found by")
        raise_if((reason for phrase in phrases for reason in phrase_reasons(phrase)), "Cannot find words")
        found, phrases = [], list(dict.fromkeys(phrases))
        for done, phrase in enumerate(phrases, start=1):
            boxes, scores = [], []
            of_words = min(self.text_threshold, self.box_threshold)  # a box is as sure as its surest word
            detections = self.detector.detect(image, phrase, self.box_threshold, of_words)
            for detection in sorted(detections, key=lambda one: -one.score)[:_MOST]:
                box, share = _clipped(detection.box, image.size), _read(phrase, detection.text)
                if box[0] < box[2] and box[1] < box[3] and share:
                    boxes.append(box)
                    scores.append(detection.score * share)
            masks = self.outliner.of_boxes(image, boxes) if boxes else []
            items = zip(masks, boxes, scores, strict=True)
            found += sorted(
                (Found(phrase, mask.cpu(), box, score) for mask, box, score in items if mask.any()),
                key=lambda item: -item.score,
            )
            if progress:
                progress(done, len(phrases))
        return found

    @torch.no_grad()
    def at_points(self, image: Image.Image, points: Sequence[tuple[float, float]]) -> torch.Tensor:
        """The object that all points (x, y), in pixels, are on: [height, width] bool; `MaskError` for an empty one."""
        mask = self.outliner.of_points(image, points).cpu()
        if not mask.any():
            raise MaskError(f"points {told([list(point) for point in points])} gave an empty mask: give more or others")
        return mask


def phrase_reasons(phrase: str) -> list[str]:
    """What is wrong with a phrase that a detector is to find; empty when nothing is."""
    if "." in phrase:
        return [f"{phrase!r} has a full stop in it, which parts phrases: leave it out"]
    return [] if set(_words(phrase)) - _ARTICLES else [f"{phrase!r} has no word that can be found in a picture"]


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _read(phrase: str, text: str) -> float:
    """The part of a phrase's words, articles left out, that were read, whole or a piece of each.

    Detectors read pieces of words, of which those that they are not sure of are missing: of "corgi" perhaps "co",
    "##rgi" alone, or "co ##rgi", where ## joins a piece to what stands before it.
    """
    wanted = set(_words(phrase)) - _ARTICLES
    whole = set(_words(re.sub(r"\s+##", "", text)))
    pieces = {piece for piece in _words(text) if piece not in wanted | _ARTICLES}
    return sum(word in whole or any(map(word.__contains__, pieces)) for word in wanted) / len(wanted)


def _clipped(box: Box, size: tuple[int, int]) -> Box:
    """A box cut at the edges of a picture of `size` (width, height)."""
    width, height = size
    left, top, right, bottom = map(float, box)
    return max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height))
