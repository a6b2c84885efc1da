"""The words that settings can be, by themselves so that a job file is read without any library."""

from __future__ import annotations

__all__ = [
    "BOX_THRESHOLD",
    "DOWNSAMPLINGS",
    "FEATURES",
    "KEPT_AND_CHANGED",
    "LAYERS",
    "LAYOUTS",
    "MASK_SOURCES",
    "MOST_STRENGTH",
    "ON_UNUSED",
    "OPTIMISERS",
    "OVERLAPS",
    "PARTS",
    "PRECISIONS",
    "TEXT_BACKENDS",
    "TEXT_THRESHOLD",
]

MASK_SOURCES = ("segmenter", "attention", "text")  # who finds words in a template
TEXT_BACKENDS = ("transformers", "original")  # whose Grounding DINO and SAM the source "text" runs
BOX_THRESHOLD, TEXT_THRESHOLD = 0.3, 0.25  # how sure these are to be, langSAM's
FEATURES = ("stored", "replayed", "inversion")  # how features are had, see weaver.features
OVERLAPS = ("priority", "share")  # who gets what two masks claim
DOWNSAMPLINGS = ("area", "nearest")  # how masks are reduced to the tokens of a map
KEPT_AND_CHANGED = "keep_background: the background is a concept, which changes it; leave one of the two out"
LAYERS = ("keys-values", "all")  # of a U-Net in which a concept is learned
LAYOUTS = ("weaver", "custom-diffusion", "diffusers-lora", "kohya-lora")  # that a concept is converted to
MOST_STRENGTH = 2.0  # of a concept: then it is as far past itself as the base model lies before it
PRECISIONS = ("float32", "float16", "bfloat16")  # of a model's weights while a concept is learned
OPTIMISERS = ("adamw", "muon")  # of a concept's changes of weights
PARTS = ("whole", "cross-attention")  # what of a concept is used
ON_UNUSED = ("warn", "refuse")  # what to do where a concept has parts that fusion does not use
