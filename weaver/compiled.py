"""Hooks and `torch.compile`: what was compiled before a hook was added runs without it, and says nothing."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

__all__ = ["hooks_run", "is_compiled"]


def hooks_run(*modules: nn.Module) -> AbstractContextManager:
    """Within it the modules run as they are written, with hooks added meanwhile, if any part of them is compiled."""
    if any(is_compiled(part) for module in modules for part in module.modules()):
        return torch.compiler.set_stance("force_eager")
    return nullcontext()


def is_compiled(module: nn.Module) -> bool:
    """Whether `module.compile()`, `torch.compile(module)` or `torch.compile(module.forward)` compiled it."""
    return (
        getattr(module, "_compiled_call_impl", None) is not None
        or type(module).__name__ == "OptimizedModule"
        or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
    )
