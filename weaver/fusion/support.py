"""Which models can be fused, and which attention processors may be replaced while they are."""

from __future__ import annotations

from collections.abc import Iterable

from diffusers import UNet2DConditionModel
from torch import nn

from weaver.compiled import hook_paths, is_compiled
from weaver.conditioning import added_reasons
from weaver.layers import attention_paths, cross_attention_paths
from weaver.memory.resting import hooked
from weaver.processors import PLAIN_PROCESSORS

__all__ = ["model_reasons", "processor_reasons", "unet_reasons"]


def model_reasons(pipe) -> list[str]:
    """Why contexts can't be fused in this pipeline's model; empty when they can."""
    reasons = unet_reasons(getattr(pipe, "unet", None))
    return reasons if reasons else added_reasons(pipe)


def unet_reasons(unet) -> list[str]:
    """Why contexts can't be fused in this U-Net; empty when they can."""
    if not isinstance(unet, UNet2DConditionModel):
        if isinstance(unet, nn.Module) and is_compiled(unet):
            return ["the U-Net is compiled as a whole: take unet._orig_mod and compile it by compile_repeated_blocks()"]
        return [f"the U-Net is a {type(unet).__name__}, expected a diffusers UNet2DConditionModel"]
    reasons = []
    if hooked(unet):
        reasons.append(
            "the U-Net's weights are not on its device or not in its type between calls, or parts are skipped (CPU "
            "offload, layerwise casting, caching): call pipe.remove_all_hooks() and pipe.to(device) first, or load the "
            "pipeline without"
        )
    if unet.config.encoder_hid_dim_type is not None:
        reasons.append(f"the U-Net projects its text by {unet.config.encoder_hid_dim_type}: unload the image adapter")
    paths = cross_attention_paths(unet)
    for path in paths:
        attention = unet.get_submodule(path)
        for part in ("norm_cross", "norm_q", "norm_k", "group_norm", "spatial_norm", "add_k_proj"):
            if getattr(attention, part, None):
                reasons.append(f"{path} has {part}, which can't be shared by contexts")
        if attention.residual_connection:
            reasons.append(f"{path} adds its own input, which can't be shared by contexts")
    projections = [f"{path}.{name}" for path in paths for name in ("to_k", "to_v")]
    if hooked_into := [path for path in projections if hook_paths(unet.get_submodule(path))]:
        where = _of_such(hooked_into)
        reasons.append(f"{where} has forward hooks, which are never called where texts are projected once: remove them")
    reasons += [
        f"{path} reads the text, where only the U-Net's own picture is expected"
        for path in attention_paths(unet, "attn1")
        if unet.get_submodule(path).is_cross_attention
    ]
    return reasons


def processor_reasons(unet, paths: Iterable[str], own: tuple[type, ...]) -> list[str]:
    """Why the processors of the attentions at `paths` can't be replaced; `own` are the classes attaching installs."""
    others: dict[str, list[str]] = {}
    for path in paths:
        processor = unet.get_submodule(path).processor
        if isinstance(processor, own):
            return ["a plan is already attached to this U-Net: leave its `with` block first"]
        if type(processor) not in PLAIN_PROCESSORS:
            others.setdefault(type(processor).__name__, []).append(path)
    return [_other(name, found) for name, found in others.items()]


def _other(name: str, paths: list[str]) -> str:
    where = _of_such(paths)
    if name.startswith("Fused"):
        return f"{where} has fused projections ({name}): call pipe.unfuse_qkv_projections() first"
    return (
        f"{where} has a {name}, whose work would be lost: "
        "call unet.set_default_attn_processor() or unload what installed it"
    )


def _of_such(paths: list[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} (of {len(paths)} such)"
