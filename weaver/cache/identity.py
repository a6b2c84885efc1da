"""What an inversion, its reconstruction and its features follow from, as plain values: equal values, equal results."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import torch
from PIL import Image

from weaver.conditioning import text_encoders
from weaver.layers import InjectionSites
from weaver.models import weights_hash
from weaver.processors import PLAIN_PROCESSORS

__all__ = ["features_identity", "inversion_identity", "reverse_identity", "uncacheable_reasons"]

# Where transformers defines the hooks that stay on a text encoder once its hidden states were asked for, as SDXL's are.
_CAPTURING = "transformers.utils.output_capturing"


def inversion_identity(
    pipe, image: Image.Image | torch.Tensor, prompt: str, steps: int, time_ids: torch.Tensor | None = None
) -> dict | None:
    """Of `weaver.inversion.invert` with these arguments; None where something changes the model that is not in its
    weights (`uncacheable_reasons`).

    SDXL's pooled embedding follows from the prompt's tokens and the second encoder's weights, configuration and dtype;
    its time ids [1, 6] are given.

    The weights are read bit by bit each time: they may have been changed in place. On the CPU a model of 2.6 GB takes
    two seconds.
    """
    if uncacheable_reasons(pipe):
        return None
    encoders = list(text_encoders(pipe))
    tokens = [getattr(pipe, name.replace("text_encoder", "tokenizer"))(prompt).input_ids for name in encoders]
    parts = _parts(pipe)
    return {
        "kind": "inversion",
        "picture": _picture(image),
        "prompt": prompt,
        "tokens": tokens[0] if len(tokens) == 1 else tokens,
        "steps": steps,
        "model": weights_hash(pipe, exact=True),
        "config": {name: _plain(getattr(pipe, name).config) for name in (*parts, "scheduler")},
        "scheduler": type(pipe.scheduler).__name__,
        "processors": {name: _processors(part) for name, part in parts.items()},
        "tiling": _tiling(pipe.vae),
        "dtype": {name: str(part.dtype) for name, part in parts.items()},
        "time_ids": None if time_ids is None else time_ids[0].tolist(),  # Stable Diffusion has none
        "device": pipe.unet.device.type,
        "torch": torch.__version__,
    }


def reverse_identity(inversion: Mapping) -> dict:
    """Of the latents of the reverse pass, from z_T to the template drawn again."""
    return {"kind": "reverse pass", "inversion": dict(inversion)}


def features_identity(inversion: Mapping, sites: InjectionSites, kind: str) -> dict:
    """Of the features at `sites`, by steps and windows; `kind` is "stored" or "inversion"."""
    steps = inversion["steps"]
    layers = {
        "resnets": [list(sites.resnets), sites.resnet_steps(steps)],
        "attentions": [list(sites.attentions), sites.attention_steps(steps)],
    }
    return {"kind": "features", "inversion": dict(inversion), "sites": layers, "pass": kind}


def uncacheable_reasons(pipe) -> list[str]:
    """What makes the output of U-Net, autoencoder or a text encoder follow from more than its weights, part by part.

    Empty for a pipeline as it was loaded. CPU offload, which only moves weights, is no reason.
    """
    reasons = []
    for name, part in _parts(pipe).items():
        if any(getattr(module, "_hf_peft_config_loaded", False) for module in part.modules()):
            reasons.append(f"{name} has adapters loaded: fuse them, or unload them")
        if odd := _processors(part, other_than=PLAIN_PROCESSORS):
            reasons.append(f"{name} has attention processors of its own ({', '.join(odd)})")
        hooked = [path for path, module in part.named_modules() if _hooks(module)]
        if hooked:
            reasons.append(f"{name}.{hooked[0]}".rstrip(".") + " has forward hooks")
    if any(getattr(block, name, None) for block in pipe.unet.up_blocks for name in ("s1", "s2", "b1", "b2")):
        reasons.append("FreeU is on: disable it")
    return reasons


def _parts(pipe) -> dict[str, torch.nn.Module]:
    """What an inversion runs, by the names of the pipeline's parts."""
    return {"unet": pipe.unet, "vae": pipe.vae, **text_encoders(pipe)}


def _processors(part, other_than: tuple[type, ...] = ()) -> list[str]:
    """Kinds of a part's attention processors; transformers' models and the tiny autoencoder have none."""
    kinds = {type(processor) for processor in getattr(part, "attn_processors", {}).values()} - set(other_than)
    return sorted(kind.__name__ for kind in kinds)


def _hooks(module: torch.nn.Module) -> list[Callable]:
    """Forward hooks that may change a result: all but those by which transformers only notes hidden states."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return [hook for hook in hooks if getattr(hook, "__module__", None) != _CAPTURING]


def _tiling(vae) -> dict | None:
    """Sizes and overlap of the tiles that an autoencoder encodes in; None without tiling.

    Slicing is left out: it takes pictures one by one, and there is one.
    """
    if not getattr(vae, "use_tiling", False):
        return None
    return {name: repr(value) for name, value in sorted(vars(vae).items()) if name.startswith("tile_")}


def _picture(image: Image.Image | torch.Tensor) -> dict:
    """Size and SHA-256 of the pixels as the autoencoder sees them, or of latents."""
    if isinstance(image, Image.Image):
        rgb = image.convert("RGB")
        return {"size": list(rgb.size), "rgb": hashlib.sha256(rgb.tobytes()).hexdigest()}
    latents = image.detach().cpu().contiguous()
    digest = hashlib.sha256(latents.flatten().view(torch.uint8).numpy()).hexdigest()
    return {"shape": list(latents.shape), "dtype": str(latents.dtype), "latents": digest}


def _plain(config) -> dict:
    """A configuration without where it was loaded from and what wrote it."""
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    away = ("_name_or_path", "_diffusers_version", "transformers_version", "_class_name", "_use_default_values")
    return {name: repr(values[name]) for name in sorted(values) if name not in away}
