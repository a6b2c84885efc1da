"""Hooks and `torch.compile`: what was compiled before a hook was added runs without it, and says nothing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import FunctionType

import torch
from torch import nn

__all__ = ["compile_whole", "hook_paths", "hooks_run", "is_compiled"]


def compile_whole(forward: Callable, **options) -> Callable:
    """A U-Net's forward compiled as one graph, with all hooks and processors that it has when it is first called.

    Each set of injected sites and each shape of batch is a variant, minutes the first time. They are this function's
    own: another one of the same forward starts anew.

    Parameters
    ----------
    forward : from tensors to tensors; what else it depends on is settled when a variant is compiled, or guarded
    options : of `torch.compile`, besides `fullgraph=True, dynamic=False`
    """

    def call(*args, **kwargs):
        return forward(*args, **kwargs)

    # torch.compile keeps variants, and their limit of eight, by the code object, which all closures made here share
    own = FunctionType(call.__code__.replace(), call.__globals__, call.__name__, None, call.__closure__)
    return torch.compile(own, **{"fullgraph": True, "dynamic": False} | options)


def hook_paths(module: nn.Module) -> list[str]:
    """Paths of the modules in it, itself as "", that have forward hooks or pre-hooks, whoever added them."""
    return [path for path, part in module.named_modules() if part._forward_hooks or part._forward_pre_hooks]


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
