"""Pictures of a concept's class, made by the base model itself, to hold the class in place (prior preservation)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from weaver.concepts.images import TrainingSet
from weaver.concepts.kept_pictures import KeptPictures
from weaver.concepts.settings import TrainSettings
from weaver.errors import WeaverError

__all__ = ["DRAWN_AT_ONCE", "class_pictures"]

DRAWN_AT_ONCE = 4  # pictures in one pass of the pipeline


def class_pictures(
    pipe,
    word: str,
    settings: TrainSettings,
    report: Callable[[int], None],
    *,
    at_once: int | None = None,
    kept: KeptPictures | None = None,
) -> TrainingSet:
    """Make `settings.prior_images` pictures of "a <word>" with a `StableDiffusion(XL)Pipeline`.

    Every picture has its own noise, drawn on the CPU from the seed and its number, so that it is the same whatever the
    number `at_once` in one pass, but for rounding. `report` is told how many are done. Those
    that are `kept` are taken from there, and the others are added.
    One that the pipeline's safety checker blacks out is left out and another made; `WeaverError` when it does so too
    often.
    """
    caption = f"a {word}"
    shown = dict(getattr(pipe, "_progress_bar_config", {}))
    images, made = kept.load() if kept else ([], 0)
    at_once = at_once or DRAWN_AT_ONCE
    pipe.set_progress_bar_config(**shown | {"disable": True})
    try:
        while len(images) < settings.prior_images:
            numbers = range(made, made + min(at_once, settings.prior_images - len(images)))
            output = pipe(
                [caption] * len(numbers),
                num_inference_steps=settings.prior_steps,
                guidance_scale=settings.prior_guidance,
                generator=[torch.Generator("cpu").manual_seed(settings.seed * 100_003 + i) for i in numbers],
            )
            black = getattr(output, "nsfw_content_detected", None) or [False] * len(numbers)  # SDXL's has no checker
            found = [image for image, is_black in zip(output.images, black, strict=True) if not is_black]
            made += len(numbers)
            if kept:
                kept.add(found, len(images), made)
            images += found
            if made - len(images) > settings.prior_images:
                raise WeaverError(
                    f"the safety checker of {type(pipe).__name__} blacked out {made - len(images)} of {made} pictures "
                    f"of {caption!r}: pass prior pictures of your own, or take a pipeline without it"
                )
            report(len(images))
    finally:
        pipe.set_progress_bar_config(**shown)
    images = images[: settings.prior_images]
    return TrainingSet(tuple(images), (caption,) * len(images))
