"""What a U-Net reads besides latents and time: text, and in SDXL a pooled embedding and time ids.

SDXL adds both to the time embedding (arXiv 2307.01952, sections 2.1 and 2.2), where no mask reaches them: a row of the
batch has one of each. The time ids are six numbers: height and width of the training picture, top and left of its
crop, height and width of what is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import torch

__all__ = ["TIME_IDS", "added_reasons", "make_time_ids", "text_encoders", "time_id_reasons", "unet_arguments"]

_TEXT_TIME = "text_time"
TIME_IDS = 6
"""How many numbers SDXL's U-Net is told of a picture."""


def text_encoders(pipe) -> dict[str, torch.nn.Module]:
    """The text encoders of a pipeline by the names of its parts, in the order in which their widths are joined.

    Stable Diffusion has "text_encoder", SDXL "text_encoder_2" too.
    """
    parts = {name: getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2")}
    return {name: encoder for name, encoder in parts.items() if encoder is not None}


def added_reasons(pipe) -> list[str]:
    """Why the added conditioning of a pipeline's U-Net is not SDXL's; empty when it is, or when there is none."""
    config, encoder = pipe.unet.config, getattr(pipe, "text_encoder_2", None)
    if config.addition_embed_type is None:
        return []
    if config.addition_embed_type != _TEXT_TIME or encoder is None:
        return [
            f"the U-Net has added conditioning ({config.addition_embed_type}), which is known for SDXL only: "
            f"{_TEXT_TIME}, with text_encoder_2 in the pipeline"
        ]
    width = config.projection_class_embeddings_input_dim - encoder.config.projection_dim
    if width == TIME_IDS * config.addition_time_embed_dim:
        return []
    return [
        f"the U-Net takes {width // config.addition_time_embed_dim} time ids, expected {TIME_IDS} (two sizes and a "
        "crop): SDXL's refiner takes an aesthetic score; use the base model"
    ]


def time_id_reasons(time_ids: Sequence[float] | None) -> list[str]:
    """What is wrong with time ids that a caller chose; empty for None, which is the picture's own size, uncropped."""
    if time_ids is None or (len(time_ids) == TIME_IDS and all(isinstance(value, Real) for value in time_ids)):
        return []
    return [
        f"time_ids: is {time_ids!r}, expected {TIME_IDS} numbers: original size, top and left of the crop, target size"
    ]


def make_time_ids(
    pipe, pixels: tuple[int, int], text: torch.Tensor, time_ids: Sequence[float] | None = None
) -> torch.Tensor | None:
    """Time ids [1, 6] in the dtype of `text`, as the pipeline rounds them; None for a model that takes none.

    `pixels` (height, width) of the picture is what the pipeline takes where `time_ids` are left out.
    """
    if pipe.unet.config.addition_embed_type != _TEXT_TIME:
        return None
    height, width = pixels
    ids = (height, width, 0, 0, height, width) if time_ids is None else time_ids
    return torch.tensor([tuple(ids)], dtype=text.dtype, device=text.device)


def unet_arguments(text: torch.Tensor, pooled: torch.Tensor | None, time_ids: torch.Tensor | None) -> dict:
    """Arguments of a U-Net's forward: text [B, L, C], and pooled [B, P] and time ids [B, 6] where it takes them."""
    arguments = {"encoder_hidden_states": text}
    if pooled is None:
        return arguments
    return arguments | {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids}}
