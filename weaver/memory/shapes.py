"""A model from its configuration files alone: every part in its shape on PyTorch's meta device, no weight read."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

import torch

from weaver.memory.resting import modules_of
from weaver.models import ModelError, model_source

__all__ = ["Shapes", "load_shapes"]

_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
_UNTRACED = ("safety_checker", "image_encoder")  # their weights count, their work is small
_WITHOUT_NUMBERS = ("feature_extractor",)  # of the safety checker


@dataclass(frozen=True, eq=False)
class Shapes:
    """A pipeline on the meta device, and the modules that were left out of it because only their weights count."""

    pipe: object
    idle: tuple[torch.nn.Module, ...]

    @property
    def modules(self) -> list[torch.nn.Module]:
        return [*modules_of(self.pipe), *self.idle]

    def tensors(self) -> list[torch.Tensor]:
        """Parameters and buffers of all modules."""
        return [tensor for module in self.modules for tensor in (*module.parameters(), *module.buffers())]


def load_shapes(
    model: str, *, device: str, dtype: torch.dtype | None = None, offline: bool = False, fuses: bool = True
) -> Shapes:
    """What `load_model` would load with the same arguments, without weights.

    Tokenizers and schedulers are real. Of a Hub model that is not in the cache the configuration files are downloaded.

    Raises `ModelError`, one line, as `load_model` does, and for a part of an unknown kind.
    """
    dtype = dtype or (torch.float16 if device.startswith("cuda") else torch.float32)
    with model_source(model, offline=offline, fuses=fuses) as (folder, config, local):
        if config["_class_name"] not in _PIPELINES:
            kind, known = config["_class_name"], " and ".join(_PIPELINES)
            raise ModelError(f"{model!r} is a {kind}; what it takes of memory is known for {known}")
        parts, idle = {}, []
        for name, kind in config.items():
            if name.startswith("_") or not isinstance(kind, (list, tuple)):
                continue
            part = None if kind[1] is None or name in _WITHOUT_NUMBERS else _part(folder, name, kind, local, dtype)
            if name in _UNTRACED and part is not None:
                idle.append(part)
                part = None
            parts[name] = part
        settings = {name: value for name, value in config.items() if isinstance(value, bool)}
        if "requires_safety_checker" in settings:
            settings["requires_safety_checker"] = False
        pipe = getattr(import_module("diffusers"), config["_class_name"])(**parts, **settings)
    pipe.set_progress_bar_config(disable=True)
    return Shapes(pipe, tuple(idle))


def _part(folder: str, name: str, kind, local: bool, dtype: torch.dtype):
    """One part of the pipeline in `folder`; `kind` is its library and class, as model_index.json has it."""
    cls = _class(*kind)
    if cls is None:
        raise ModelError(f"{folder!r}: {name} is a {kind[1]} of {kind[0]}, which can't be built from its configuration")
    where = {"subfolder": name, "local_files_only": local}
    if not issubclass(cls, torch.nn.Module):
        return cls.from_pretrained(folder, **where)
    with torch.device("meta"):
        if hasattr(cls, "load_config"):
            module = cls.from_config(cls.load_config(folder, **where))
            module.register_to_config(_name_or_path=f"{folder}/{name}")  # as loading does
        else:
            module = cls(cls.config_class.from_pretrained(folder, **where))
    return torch.nn.Module.to(module, dtype).eval().requires_grad_(False)  # the library's own warns of it


def _class(library: str, name: str):
    from diffusers import pipelines

    home = getattr(pipelines, library, None)  # a part that comes with its pipeline
    return getattr(import_module(library) if home is None else home, name, None)
