"""Hooks and `torch.compile`: what was compiled before a hook was added runs without it, and says nothing."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

__all__ = ["compiled_modules", "hooks_run"]


def hooks_run(*modules: nn.Module) -> AbstractContextManager:
    """Within it the modules run as they are written, with hooks added meanwhile, if any part of them is compiled."""
    if any(True for module in modules for _ in compiled_modules(module.modules())):
        return torch.compiler.set_stance("force_eager")
    return nullcontext()


def compiled_modules(modules: Iterable[nn.Module]) -> Iterable[nn.Module]:
    """Those that `module.compile()`, `torch.compile(module)` or `torch.compile(module.forward)` compiled."""
    for module in modules:
        own_forward = vars(module).get("forward")
        if (
            getattr(module, "_compiled_call_impl", None) is not None
            or type(module).__name__ == "OptimizedModule"
            or hasattr(own_forward, "_torchdynamo_orig_callable")
        ):
            yield module
