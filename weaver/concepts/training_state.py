"""What training puts onto a model for as long as it runs: each comes off again, also after an exception."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from weaver.compiled import hooks_run
from weaver.concepts.changes import Delta, added_to
from weaver.concepts.concept import attn2_projections
from weaver.concepts.woven import WovenForward
from weaver.layers import transformer_linears

__all__ = ["added", "checkpointed", "frozen"]


@contextmanager
def frozen(*modules: torch.nn.Module) -> Iterator[None]:
    """Let no parameter of the modules receive gradients, and no dropout act; both as before afterwards."""
    gradients = {p: p.requires_grad for module in modules for p in module.parameters()}
    training = {m: m.training for module in modules for m in module.modules()}
    try:
        for module in modules:
            module.requires_grad_(False).eval()
        yield
    finally:
        for parameter, flag in gradients.items():
            parameter.requires_grad_(flag)
        for module, flag in training.items():
            module.training = flag


@contextmanager
def checkpointed(unet: torch.nn.Module, wanted: bool) -> Iterator[None]:
    """Let the U-Net's blocks keep their activations or not; as before afterwards."""
    before = {m: m.gradient_checkpointing for m in unet.modules() if hasattr(m, "gradient_checkpointing")}
    try:
        if wanted:
            unet.enable_gradient_checkpointing()
        yield
    finally:
        for module, flag in before.items():
            module.gradient_checkpointing = flag


@contextmanager
def added(
    unet: torch.nn.Module,
    deltas: Mapping[str, Delta],
    forward: WovenForward | None = None,
) -> Iterator[None]:
    """Add the deltas to the Linears they are named after, without touching the weights.

    Where and when those act that read the picture is up to `forward`, where that is given.
    """
    linears, of_text = transformer_linears(unet), attn2_projections(unet)
    texts = [(linears[path], delta) for path, delta in deltas.items() if path in of_text]
    others = [(linears[path], delta) for path, delta in deltas.items() if path not in of_text]
    regional = (forward.weights, forward.acts) if forward else ()
    with added_to(texts), added_to(others, *regional), hooks_run(unet):
        yield
