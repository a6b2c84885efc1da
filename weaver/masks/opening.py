"""Open Grounding DINO and SAM, of whichever package."""

from __future__ import annotations

import os

from weaver.choices import BOX_THRESHOLD, TEXT_BACKENDS, TEXT_THRESHOLD
from weaver.errors import WeaverError, told
from weaver.masks.text import TextMasks

__all__ = ["open_text_masks"]


def open_text_masks(
    backend: str = "transformers",
    detector: str | os.PathLike | None = None,
    segmenter: str | os.PathLike | None = None,
    box_threshold: float = BOX_THRESHOLD,
    text_threshold: float = TEXT_THRESHOLD,
    *,
    words: bool = True,
    device: str = "cpu",
    offline: bool = False,
) -> TextMasks:
    """Load what finds words and points in a template.

    Parameters
    ----------
    backend : "transformers", or "original" for the packages groundingdino-py and segment-anything
    detector, segmenter : of transformers a folder or a Hub id, None for the smallest that there are; of the original
        packages the checkpoint files
    box_threshold, text_threshold : see `TextMasks`
    words : whether words are to be found; else the detector is left out, and SAM answers to points alone
    device : where they run
    offline : take them from the local cache only

    Raises `WeaverError`, one line, for packages, checkpoints and models that are not there.
    """
    if backend == "transformers":
        from weaver.masks.grounded import DETECTOR, OUTLINER, GroundingDino, Sam

        options = {"device": device, "offline": offline}
        finder = GroundingDino.load(detector or DETECTOR, **options) if words else None
        return TextMasks(Sam.load(segmenter or OUTLINER, **options), finder, box_threshold, text_threshold)
    if backend == "original":
        from weaver.masks.original import OriginalGroundingDino, OriginalSam

        finder = OriginalGroundingDino.load(detector, device=device, offline=offline) if words else None
        return TextMasks(OriginalSam.load(segmenter, device=device), finder, box_threshold, text_threshold)
    raise WeaverError(f"masks.text.backend: is {told(backend)}, expected one of {', '.join(TEXT_BACKENDS)}")
