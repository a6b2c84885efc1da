"""The words that settings can be, by themselves so that a job file is read without any library."""

from __future__ import annotations

__all__ = ["FEATURES", "LAYOUTS", "MASK_SOURCES", "ON_UNUSED", "OVERLAPS", "PRECISIONS"]

MASK_SOURCES = ("segmenter", "attention")  # who finds words in a template
FEATURES = ("stored", "replayed", "inversion")  # how features are had, see weaver.features
OVERLAPS = ("priority", "share")  # who gets what two masks claim
LAYOUTS = ("weaver", "custom-diffusion", "diffusers-lora", "kohya-lora")  # that a concept is converted to
PRECISIONS = ("float32", "float16", "bfloat16")  # of a model's weights while a concept is learned
ON_UNUSED = ("warn", "refuse")  # what to do where a concept has parts that fusion does not use
