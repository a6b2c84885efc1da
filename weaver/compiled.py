"""Hooks and `torch.compile`: what was compiled before a hook was added runs without it, and says nothing."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from weaver.errors import WeaverError
from weaver.layers import InjectionSites, sites_for

__all__ = ["compile_parts", "hook_paths", "hooks_run", "is_compiled"]

_PARTS = ("Transformer2DModel", "ResnetBlock2D", "Upsample2D", "Downsample2D")


def compile_parts(unet: nn.Module, sites: InjectionSites | None = None, **options) -> None:
    """Compile a U-Net part by part, in place, as far as fusion lets it: what has hooks then stays as it is.

    More of it than `unet.compile_repeated_blocks()` has, since ResNets are among the parts, and in minutes rather than
    seconds. Each size of layer is a variant: `torch._dynamo.config.recompile_limit` must be as high, 64 is.

    Parameters
    ----------
    sites : into which layers features are injected later; None is the model's default
    options : of `torch.compile`, besides `fullgraph=True, dynamic=False`

    Raises `WeaverError` where there is no such part, and where no sites are known for the U-Net and none are given.
    """
    parts = {path: part for path, part in unet.named_modules() if type(part).__name__ in _PARTS}
    if not parts:
        kinds = ", ".join(_PARTS)
        raise WeaverError(f"A {type(unet).__name__} has no part to compile (a {kinds}): pass the pipeline's U-Net")
    sites = sites_for(unet) if sites is None else sites
    hooked = {path.rpartition(".")[0] for path in sites.resnet_modules()}
    for path, part in parts.items():
        if path not in hooked:
            part.compile(**{"fullgraph": True, "dynamic": False} | options)


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
