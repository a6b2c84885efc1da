"""Where each concept stands: files and boxes as they are given, the rest found in the template by their words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from weaver.errors import WeaverError
from weaver.job import MaskSpec
from weaver.masks import attention_masks, box_mask, load_mask, segmenter_masks

__all__ = ["MASK_SOURCES", "Places", "best_source"]

MASK_SOURCES = ("segmenter", "attention")


@dataclass(frozen=True, eq=False)
class Places:
    """The masks that are known already, and the words of those still to be found.

    Parameters
    ----------
    given : one a concept, [height, width] bool, or None where its word is to be found
    words : one a concept, the word it is found by
    source : "segmenter" or "attention", who finds words
    sources : one a concept, where its mask comes from, for a record
    """

    given: tuple[torch.Tensor | None, ...]
    words: tuple[str | None, ...]
    source: str
    sources: tuple[str, ...]

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
    def from_masks(cls, masks: torch.Tensor | np.ndarray, count: int, size: tuple[int, int]) -> Places:
        """Take masks [count, height, width] as they are; `WeaverError` for another shape."""
        masks = torch.as_tensor(masks)
        if tuple(masks.shape) != (count, *size):
            raise WeaverError(f"masks have shape {tuple(masks.shape)}, expected {[count, *size]}")
        return cls(tuple(masks), (None,) * count, "attention", ("array",) * count)

    def find(self, pipe, template: Image.Image, prompt: str) -> Places:
        """Find the words in the template, which `prompt` describes; afterwards every mask is given.

        Raises `MaskError` for what can't be found.
        """
        words = [word for word in self.words if word]
        if not words:
            return self
        if self.source == "segmenter":
            found = iter(segmenter_masks(template, words))
        else:
            found = iter(attention_masks(pipe, template, prompt, words))
        given = tuple(next(found) if mask is None else mask for mask in self.given)
        return replace(self, given=given, words=(None,) * len(given))

    def dense(self, size: tuple[int, int]) -> torch.Tensor:
        """The masks [N, height, width] float32, all given, not yet composed; `size` is (height, width)."""
        return torch.stack([mask.float() for mask in self.given]) if self.given else torch.zeros(0, *size)


def best_source(pipe) -> str:
    """Who finds words best in this model's pictures: its own segmenter for the embedded model, else its attention."""
    from weaver.embedded import MODEL_DIR

    return "segmenter" if Path(pipe.config.get("_name_or_path") or ".") == MODEL_DIR else "attention"
