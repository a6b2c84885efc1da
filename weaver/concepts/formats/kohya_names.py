"""The names that kohya's scripts give to what a LoRA changes: `lora_unet_...`, `lora_te_...`.

The scripts train Stable Diffusion 1.x and 2.x under diffusers' names and SDXL under those of Stability AI's own code,
where the blocks of the U-Net are counted through: `input_blocks.4.1` is `down_blocks.1.attentions.0`.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from weaver.concepts.changes import change_shape
from weaver.concepts.concept import Concept

__all__ = ["is_of_sdxl", "kohya_name"]

_ENCODERS = {"text_encoder": "lora_te", "text_encoder_2": "lora_te2"}
_SDXL_ENCODERS = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
_SDXL_PATHS = re.compile(
    r"up_blocks\.0\.attentions\.|.*\.transformer_blocks\.[1-9]"
)  # none of which are in 1.x and 2.x
_SDXL_TEXT_WIDTH = 2048
_PER_LEVEL = (
    3  # numbers of a level: going down two pairs of ResNet and attention and a downsampler, going up three pairs
)

_BLOCKS: list[tuple[str, Callable[[re.Match], str]]] = [
    (r"down_blocks\.(\d)\.resnets\.(\d)", lambda m: f"input_blocks.{_down(m[1], m[2])}.0"),
    (r"down_blocks\.(\d)\.attentions\.(\d)", lambda m: f"input_blocks.{_down(m[1], m[2])}.1"),
    (r"down_blocks\.(\d)\.downsamplers\.0\.conv", lambda m: f"input_blocks.{_down(m[1], 2)}.0.op"),
    (r"mid_block\.resnets\.(\d)", lambda m: f"middle_block.{2 * int(m[1])}"),
    (r"mid_block\.attentions\.0", lambda m: "middle_block.1"),
    (r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"output_blocks.{_up(m[1], m[2])}.0"),
    (r"up_blocks\.(\d)\.attentions\.(\d)", lambda m: f"output_blocks.{_up(m[1], m[2])}.1"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"output_blocks.{_up(m[1], 2)}.2"),
    (r"conv_in$", lambda m: "input_blocks.0.0"),
    (r"conv_out$", lambda m: "out.2"),
    (r"time_embedding\.linear_([12])", lambda m: f"time_embed.{2 * int(m[1]) - 2}"),
    (r"add_embedding\.linear_([12])", lambda m: f"label_emb.0.{2 * int(m[1]) - 2}"),
]
_IN_RESNETS = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def kohya_name(part: str, path: str, sdxl: bool) -> str:
    """The name of the module at `path` in `part`: "unet", "text_encoder" or "text_encoder_2"; `sdxl`: of its models."""
    if part != "unet":
        prefix = (_SDXL_ENCODERS if sdxl else _ENCODERS)[part]
    else:
        prefix, path = "lora_unet", _of_stability(path) if sdxl else path
    return f"{prefix}_{path.replace('.', '_')}"


def is_of_sdxl(concept: Concept) -> bool:
    """Whether a concept is of SDXL, as its text encoders, its layers or the width of its text show."""
    if any(key.startswith("text_encoder_2") for key in (*concept.embeddings, *concept.text_deltas)):
        return True
    if any(_SDXL_PATHS.match(path) for path in (*concept.deltas, *concept.outside)):
        return True
    widths = {change_shape(x)[1] for key, x in concept.deltas.items() if key.endswith(("attn2.to_k", "attn2.to_v"))}
    return _SDXL_TEXT_WIDTH in widths


def _of_stability(path: str) -> str:
    """The path that a module of diffusers' SDXL U-Net has in the original one."""
    for pattern, named in _BLOCKS:
        if found := re.match(pattern, path):
            rest = path[found.end() :]
            if ".resnets." in path:
                rest = "." + _IN_RESNETS.get(rest[1:], rest[1:])
            return named(found) + rest
    return path


def _down(level: str, layer: str | int) -> int:
    return 1 + _PER_LEVEL * int(level) + int(layer)


def _up(level: str, layer: str | int) -> int:
    return _PER_LEVEL * int(level) + int(layer)
