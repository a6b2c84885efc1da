"""Parts of a model that rest on the host and come to the device only while they work."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn

__all__ = ["home_of", "hooked", "lent", "modules_of", "resting"]

_HOMES: WeakKeyDictionary[nn.Module, torch.device] = WeakKeyDictionary()


def modules_of(pipe) -> list[nn.Module]:
    """The modules of a pipeline."""
    return [part for part in pipe.components.values() if isinstance(part, nn.Module)]


@contextmanager
def resting(modules: Iterable[nn.Module], home: torch.device | None = None) -> Iterator[None]:
    """Within the block these modules are on the host, but where they are lent; afterwards where they were before.

    Code that calls such a module lends it first. On the CPU, where nothing is gained, it does nothing.

    Parameters
    ----------
    home : the device that modules which are on the host already are lent to; None is where they are
    """
    modules = [module for module in dict.fromkeys(modules) if module not in _HOMES]
    before = {module: _device(module) for module in modules}
    homes = {module: home or before[module] for module in modules if (home or before[module]).type != "cpu"}
    try:
        for module in homes:
            _HOMES[module] = homes[module]
            module.to("cpu")
        yield
    finally:
        for module in homes:
            _HOMES.pop(module, None)
            module.to(before[module])


@contextmanager
def lent(*modules: nn.Module) -> Iterator[None]:
    """Within the block those of the modules that rest are on their device."""
    away = [module for module in modules if module in _HOMES and _device(module).type == "cpu"]
    try:
        for module in away:
            module.to(_HOMES[module])
        yield
    finally:
        for module in away:
            module.to("cpu")


def home_of(module: nn.Module) -> torch.device | None:
    """The device of a module that rests, or is lent just now; None for all others."""
    return _HOMES.get(module)


def hooked(module: nn.Module) -> bool:
    """Whether accelerate's or diffusers' hooks move its weights or skip its parts: offload of any kind, caches."""
    return any(hasattr(part, name) for part in module.modules() for name in ("_hf_hook", "_diffusers_hook"))


def _device(module: nn.Module) -> torch.device:
    return next((tensor.device for tensor in module.parameters()), torch.device("cpu"))
