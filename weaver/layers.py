"""Where things are in a diffusers U-Net: the one file that knows its path names.

The papers number decoder layers: `l` counts resnets of the decoder from its deepest block, three to a block, so
`block, i = divmod(l, 3)` is `up_blocks[block]`, resnet and attention `i` (Plug-and-Play Diffusion, arXiv 2211.12572;
Concept Weaver, section 3.3). The deepest block, l = 0..2, has no attention in Stable Diffusion. SDXL's decoder has
three blocks, and it is the shallowest, l = 6..8, that has no attention.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from weaver.errors import WeaverError

__all__ = [
    "EMBEDDED",
    "PAPER",
    "PLUG_AND_PLAY",
    "SDXL",
    "SITES",
    "InjectionSites",
    "attention_paths",
    "branch_end",
    "cross_attention_paths",
    "has_region",
    "layer_size",
    "output_size",
    "site_reasons",
    "sites_for",
    "time_sum",
    "transformer_linears",
]

_RESNETS_PER_BLOCK = 3
# Below this latent width the map of l=4 is under 8x8 and holds no composition: such a model needs its own table.
_SMALL_LATENTS = 32
_SDXL_BLOCKS = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
# Projections whose outputs lie on the picture, a place each; a ResNet's time embedding is added to all places of one.
_ON_THE_PICTURE = re.compile(
    r"^(conv_in|conv_out|(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.("
    r"resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)|attentions\.\d+\..+|(down|up)samplers\.\d+\.conv))$"
)


@dataclass(frozen=True)
class InjectionSites:
    """Decoder layers whose features come from the template, and for how long.

    Parameters
    ----------
    name : how the table is called in job files and messages
    resnets : layers `l` whose residual branch (output of `conv2`, before the shortcut is added) is injected
    attentions : layers `l` whose self-attention queries and keys are injected (values are not)
    resnet_window, attention_window : part of the steps, from the first, during which that is done, 0..1. The number
        of steps is rounded down, as Plug-and-Play's code does.
    """

    name: str
    resnets: tuple[int, ...] = ()
    attentions: tuple[int, ...] = ()
    resnet_window: float = 0.8
    attention_window: float = 0.5

    def __post_init__(self):
        reasons = [
            f"{key} is {value!r}, expected a part of the steps, 0 to 1"
            for key, value in [("resnet_window", self.resnet_window), ("attention_window", self.attention_window)]
            if not 0 <= value <= 1
        ]
        for key in ("resnets", "attentions"):
            layers = tuple(getattr(self, key))
            if any(not isinstance(layer, int) or layer < 0 for layer in layers) or len(set(layers)) < len(layers):
                reasons.append(f"{key} is {layers!r}, expected different decoder layer numbers from 0")
            object.__setattr__(self, key, layers)
        if reasons:
            raise WeaverError(f"Injection sites {self.name!r}: " + "; ".join(reasons))

    def resnet_steps(self, steps: int) -> int:
        """For how many of `steps` the ResNet features are injected."""
        return _whole(self.resnet_window * steps)

    def attention_steps(self, steps: int) -> int:
        """For how many of `steps` queries and keys are injected."""
        return _whole(self.attention_window * steps)

    def resnet_modules(self) -> list[str]:
        """The modules whose outputs are the ResNet features."""
        return ["up_blocks.{}.resnets.{}.conv2".format(*divmod(layer, _RESNETS_PER_BLOCK)) for layer in self.resnets]

    def resnet_inputs(self) -> list[str]:
        """The first module of each of these branches, which reads what the block is called with."""
        return [path.replace(".conv2", ".norm1") for path in self.resnet_modules()]

    def attention_modules(self, unet: nn.Module) -> list[str]:
        """The self-attentions whose `to_q` and `to_k` outputs are injected, every transformer of each layer."""
        prefixes = tuple(
            "up_blocks.{}.attentions.{}.".format(*divmod(layer, _RESNETS_PER_BLOCK)) for layer in self.attentions
        )
        return [path for path in attention_paths(unet, "attn1") if path.startswith(prefixes)]

    def projection_modules(self, unet: nn.Module) -> list[str]:
        """The `to_q` and `to_k` of these, whose outputs are the attention features."""
        return [f"{path}.{name}" for path in self.attention_modules(unet) for name in ("to_q", "to_k")]


PAPER = InjectionSites("paper", resnets=(4,), attentions=(4, 7, 9))
"""Concept Weaver, section 3.3. The windows are Plug-and-Play's; the paper gives none."""

PLUG_AND_PLAY = InjectionSites("plug-and-play", resnets=(4,), attentions=tuple(range(4, 12)))
"""Plug-and-Play Diffusion's own choice, for Stable Diffusion."""

EMBEDDED = InjectionSites("embedded", tuple(range(3, 9)), tuple(range(4, 12)), resnet_window=0.5)
"""For the embedded model, and others with latents so small that l=4 is a map of a few cells. The sweep
``benchmarks/embedded_sites.py`` compares it with others: features of all layers up to the last, for half of the
steps and more, hold a template's background against a concept for it; what its other tables differ by, the paper's and
no features at all among them, is within chance."""

SDXL = InjectionSites("sdxl", resnets=(1,), attentions=(1, 4))
"""For SDXL, whose decoder lacks Stable Diffusion's deepest level: the paper's layers by the scale of their maps.

A cell of its l=1 is 32 pixels of the picture wide, as one of Stable Diffusion's l=4 is, and a cell of its l=4 is 16, as
one of l=7 there. So the ResNet is `up_blocks.0.resnets.1`, and queries and keys are those of `up_blocks.0.attentions.1`
(ten transformer blocks) and `up_blocks.1.attentions.1` (two). The paper's l=9 has no counterpart: at 8 pixels a cell
SDXL has no attention. The paper did not fuse with SDXL: this choice is ours, with Plug-and-Play's windows for Stable
Diffusion, and was not measured.

At 1024 x 1024, 50 steps and float16 the features take 1940 MB: 2.62 MB a step for 40 steps of the ResNet, and for 25
steps of attention 52.4 MB a step at l=1 and 21.0 at l=4. `collect_features(..., storage="cpu")` keeps them off the GPU.
"""

SITES = {sites.name: sites for sites in (PAPER, PLUG_AND_PLAY, EMBEDDED, SDXL)}


def sites_for(model: str | nn.Module | Mapping) -> InjectionSites:
    """The table named `model`, or the default of a U-Net (or of its configuration).

    The default is the paper's, except for latents under 32 cells wide: there it is the embedded model's; and SDXL's for
    its three levels. Raises `WeaverError` for an unknown name and for a U-Net whose layers do not count as theirs.
    """
    if isinstance(model, str):
        if model not in SITES:
            raise WeaverError(f"Unknown injection sites {model!r}: choose one of {', '.join(SITES)}")
        return SITES[model]
    config = model if isinstance(model, Mapping) else model.config
    three = config["layers_per_block"] == _RESNETS_PER_BLOCK - 1
    if three and tuple(config["up_block_types"]) == _SDXL_BLOCKS:
        return SDXL
    if len(config["block_out_channels"]) != 4 or not three:
        raise WeaverError(
            f"No injection sites are known for a U-Net with channels {config['block_out_channels']} and "
            f"{config['layers_per_block']} layers a block: pass an InjectionSites of your own"
        )
    sample = config["sample_size"] or _SMALL_LATENTS
    return EMBEDDED if (sample if isinstance(sample, int) else min(sample)) < _SMALL_LATENTS else PAPER


def site_reasons(unet: nn.Module, sites: InjectionSites) -> list[str]:
    """Why `sites` do not fit `unet`; empty when they do."""
    modules = dict(unet.named_modules())
    reasons = [
        f"injection sites {sites.name!r} name ResNet l={layer}, and the U-Net has no {path}"
        for layer, path in zip(sites.resnets, sites.resnet_modules(), strict=True)
        if path not in modules
    ]
    paths = attention_paths(unet, "attn1")
    for layer in sites.attentions:
        prefix = "up_blocks.{}.attentions.{}.".format(*divmod(layer, _RESNETS_PER_BLOCK))
        if not any(path.startswith(prefix) for path in paths):
            reasons.append(f"injection sites {sites.name!r} name attention l={layer}, where the U-Net has none")
    return reasons


def attention_paths(unet: nn.Module, kind: str) -> list[str]:
    """Paths of every `attn1` (self) or `attn2` (cross) module, in the U-Net's order."""
    return [path for path, _ in unet.named_modules() if path.rsplit(".", 1)[-1] == kind]


def transformer_linears(unet: nn.Module) -> dict[str, nn.Linear]:
    """The Linears of attention and feed-forward by their paths, in the U-Net's order.

    Where an adapter library wraps one, this is the wrapped base layer.
    """
    found = {}
    for path, block in unet.named_modules():
        if path.rpartition(".")[2] in ("attn1", "attn2", "ff"):
            for name, part in block.named_modules():
                if isinstance(part, nn.Linear) and "lora_" not in name:
                    found[f"{path}.{name.removesuffix('.base_layer')}"] = part
    return found


def cross_attention_paths(unet: nn.Module) -> list[str]:
    """Paths of every cross-attention, in the U-Net's order."""
    return attention_paths(unet, "attn2")


def layer_size(path: str, levels: int, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width in tokens of the map at `path`, for latents of `size` in a U-Net of `levels` levels.

    Every level but the last halves the map, rounding up (a convolution of stride 2 and padding 1).
    """
    kind, index, *_ = path.split(".")
    level = levels - 1
    if kind != "mid_block":
        level = int(index) if kind == "down_blocks" else levels - 1 - int(index)
    return _halved(size, level)


def has_region(path: str) -> bool:
    """Whether what the projection at `path` gives lies on the picture, so that a change of it can act in a region."""
    return _ON_THE_PICTURE.match(path) is not None


def output_size(path: str, levels: int, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of what the projection at `path` gives, one that `has_region`; as `layer_size` says."""
    if path in ("conv_in", "conv_out"):
        return size
    names = path.split(".")
    if "downsamplers" in names:
        return _halved(size, int(names[1]) + 1)
    if "upsamplers" in names:
        return _halved(size, levels - 2 - int(names[1]))
    return layer_size(path, levels, size)


def branch_end(path: str) -> str | None:
    """The last module of a ResNet's branch that the projection at `path` is in; None where it is in none."""
    head, _, last = path.rpartition(".")
    return f"{head}.conv2" if last in ("conv1", "conv2", "time_emb_proj") else None


def time_sum(path: str) -> str | None:
    """The module that first reads the sum which the time embedding's projection at `path` enters; None for others."""
    head, _, last = path.rpartition(".")
    return f"{head}.norm2" if last == "time_emb_proj" else None


def _halved(size: tuple[int, int], times: int) -> tuple[int, int]:
    height, width = size
    for _ in range(times):
        height, width = (height + 1) // 2, (width + 1) // 2
    return height, width


def _whole(steps: float) -> int:
    return int(steps + 1e-9)  # 0.29 * 100 is 28.999999999999996
