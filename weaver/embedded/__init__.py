"""A small genuine Stable Diffusion pipeline that ships with the package, its world, its helpers and its concepts."""

from __future__ import annotations

from importlib import import_module

_LAZY = {
    "CONCEPTS": "catalog",
    "MODEL_DIR": "model",
    "card_of": "catalog",
    "concept_hashes": "catalog",
    "concept_images": "catalog",
    "concept_path": "catalog",
    "load_pipeline": "model",
    "load_segmenter": "segmenter",
    "model_hash": "model",
}

__all__ = sorted(_LAZY)


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
