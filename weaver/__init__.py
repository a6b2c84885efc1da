"""Concept Weaver: several personalised concepts in one picture, each in its place (arXiv 2404.03913).

Importing this package is cheap: PyTorch and diffusers are loaded at the first use of a name that needs them.
"""

from __future__ import annotations

from importlib import import_module

from weaver.errors import WeaverError
from weaver.version import __version__

_LAZY = {
    "Cache": "cache.store",
    "CacheWarning": "cache.store",
    "Concept": "concepts.concept",
    "ConceptUse": "fusion.contexts",
    "EMBEDDED": "layers",
    "Features": "features",
    "FusionPlan": "fusion.plan",
    "FusionSampler": "fusion.sampler",
    "InjectionSites": "layers",
    "Inversion": "inversion",
    "MemoryPlan": "memory.plans",
    "PAPER": "layers",
    "PLUG_AND_PLAY": "layers",
    "SDXL": "layers",
    "TrainSettings": "concepts.settings",
    "Validation": "concepts.validation",
    "attach": "fusion.attach",
    "collect_features": "features",
    "compose_masks": "masks.compose",
    "ddim_scheduler": "schedule",
    "invert": "inversion",
    "load_concept": "concepts.formats.reading",
    "load_template": "template",
    "make_template": "template",
    "reconstruction_psnr": "features",
    "sample_fusion": "fusion.sampler",
    "sites_for": "layers",
    "stack_plans": "fusion.variants",
    "train_concept": "concepts.train",
    "weave": "pipeline",
}

__all__ = ["WeaverError", "__version__", *sorted(_LAZY)]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
