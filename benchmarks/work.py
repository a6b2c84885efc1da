"""The arithmetic of a model's parts, counted without computing it: floating-point operations of one row."""

from __future__ import annotations

import copy
from collections import Counter

import torch
from torch.utils.flop_counter import FlopCounterMode

from weaver.conditioning import unet_arguments

__all__ = ["KINDS", "autoencoder_flops", "kind_of", "unet_flops"]

KINDS = ("cross-attention", "self-attention", "feed-forward", "ResNets", "other")


def kind_of(path: str, module) -> str | None:
    """Which of `KINDS` the module at a path of the U-Net is, None for a part of one or what is of none."""
    by_name = {"attn1": "self-attention", "attn2": "cross-attention", "ff": "feed-forward"}
    if type(module).__name__ == "ResnetBlock2D":
        return "ResNets"
    return by_name.get(path.rsplit(".", 1)[-1])


@torch.no_grad()
def unet_flops(pipe) -> Counter[str]:
    """Of one row through the U-Net at the model's own size, by kind, with the library's own attention."""
    unet = copy.deepcopy(pipe.unet).to("meta")
    config, length = unet.config, pipe.tokenizer.model_max_length
    z = torch.empty(1, config.in_channels, config.sample_size, config.sample_size, dtype=unet.dtype, device="meta")
    text = torch.empty(1, length, config.cross_attention_dim, dtype=unet.dtype, device="meta")
    added = (None, None)
    if config.addition_embed_type is not None:
        added = text.new_empty(1, pipe.text_encoder_2.config.projection_dim), text.new_empty(1, 6)
    found = Counter()
    with FlopCounterMode(display=False) as counter:
        unet(z, torch.empty(1, device="meta"), **unet_arguments(text, *added))
    by_module = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    for path, module in unet.named_modules():
        if kind := kind_of(path, module):
            found[kind] += by_module.get(f"{type(unet).__name__}.{path}", 0)
    found["other"] = counter.get_total_flops() - found.total()
    return found


@torch.no_grad()
def autoencoder_flops(pipe) -> tuple[int, int]:
    """Of encoding one picture of the model's own size, and of decoding it."""
    vae = copy.deepcopy(pipe.vae).to("meta")
    side, factor = pipe.unet.config.sample_size, 2 ** (len(vae.config.block_out_channels) - 1)
    image = torch.empty(1, 3, side * factor, side * factor, dtype=vae.dtype, device="meta")
    z = torch.empty(1, pipe.unet.config.in_channels, side, side, dtype=vae.dtype, device="meta")
    found = []
    for call, argument in ((vae.encode, image), (vae.decode, z)):
        with FlopCounterMode(display=False) as counter:
            call(argument)
        found.append(counter.get_total_flops())
    return tuple(found)
