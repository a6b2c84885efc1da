"""Files that are known and can't be fused: what they are, by the names in them, and what would work instead."""

from __future__ import annotations

import re
from typing import NamedTuple

from weaver.concepts.formats.opening import OpenedFile

__all__ = ["OTHER_BASE", "refuse_known"]


class _Kind(NamedTuple):
    """Names that tell a kind of file, what it is, and what would work instead."""

    pattern: str
    what: str
    instead: str


OTHER_BASE = "take one for Stable Diffusion 1.x, 2.x or SDXL"
_AS_LORA = "train a LoRA instead (LyCORIS: algo=lora), or merge it into its base model and extract a LoRA from that"
_TRAIN = "train a LoRA, Custom Diffusion or textual inversion instead"
_EXTRACT = "load it as the job's model, or extract a LoRA of what it has more than its base model"
_KINDS = [
    # Architectures before methods: a LoHa for Flux would not work as a LoRA either.
    _Kind(
        r"(^|[._])(double_blocks|single_blocks|joint_blocks|single_transformer_blocks)[._]|^(lora_)?transformer[._]"
        r"|^diffusion_model\.(blocks|layers)\.|^lora_unet_(blocks|layers)_\d|^transformer_blocks\.\d",
        "of a diffusion transformer (Flux, SD3 or another), not of a U-Net",
        OTHER_BASE,
    ),
    _Kind(
        r"t5xxl|^lora_te3_|^text_encoder_3\.|^(encoder\.)?block\.\d+\.layer\.|^(encoder\.)?embed_tokens\.",
        "of a T5 text encoder, which Stable Diffusion and SDXL do not have",
        OTHER_BASE,
    ),
    _Kind(r"\.hada_[wt][12]", "a LoHa (entrywise products of factors), which can't be fused", _AS_LORA),
    _Kind(r"\.lokr_[wt][12]", "a LoKr (Kronecker products), which can't be fused", _AS_LORA),
    _Kind(
        r"\.(oft_blocks|oft_diag|oft_r|oft_R|boft_R)(\.|$)", "an OFT (rotations of weights), not added to them", _TRAIN
    ),
    _Kind(
        r"\.[ab][12]\.weight$", "a GLoRA (factors that act on the base model's weights), which can't be fused", _AS_LORA
    ),
    _Kind(r"vera_lambda_[bd](\.|$)", "a VeRA (scales of random factors that are not all in it)", _TRAIN),
    _Kind(
        r"\.(diff|diff_b|w_norm|b_norm|set_weight)$",
        "whole differences of weights or biases (LyCORIS' full, or beside a LoRA), which can't be fused",
        _AS_LORA,
    ),
    _Kind(r"\.(hra_u|fourierft_spectrum)(\.|$)", "an HRA or FourierFT (not factors of a product)", _TRAIN),
    _Kind(r"\.ia3_l(\.|$)|\.on_input$", "an (IA)^3 (factors for activations), not added to weights", _TRAIN),
    _Kind(r"^\d+\.\d+\.", "a hypernetwork", _TRAIN),
    _Kind(r"^(image_proj|ip_adapter)\.", "an IP-Adapter", _TRAIN),
    _Kind(r"(^|\.)(controlnet_cond_embedding|input_hint_block)\.|^control_model\.", "a ControlNet", _TRAIN),
    _Kind(
        r"(^|\.)model\.diffusion_model\.(input_blocks\.0|out|time_embed)\.|(^|\.)(first_stage_model|cond_stage_model"
        r"|conditioner\.embedders)\.",
        "a whole checkpoint (a base model, DreamBooth or a merge)",
        _EXTRACT,
    ),
    _Kind(
        r"(^|\.)model\.diffusion_model\.",
        "Custom Diffusion's or another's U-Net weights under CompVis' names",
        "convert it (custom-diffusion's convert.py --mode compvis-to-diffuser)",
    ),
    _Kind(
        r"^(unet\.|module\.)?(conv_in|conv_out|time_embedding\.linear_1)\.weight$",
        "a whole U-Net (DreamBooth)",
        _EXTRACT,
    ),
    _Kind(r"^(encoder|decoder)\.conv_in\.weight$", "an autoencoder (VAE)", "load it as a part of the base model"),
    _Kind(
        r"^(text_model\.)?embeddings\.(token|position)_embedding\.weight$",
        "a whole text encoder",
        "load it as a part of the base model, or " + _TRAIN.removesuffix(" instead"),
    ),
]


def refuse_known(opened: OpenedFile) -> None:
    """Raise `ConceptError` where names tell a kind of file that can't be fused; data is not read for it."""
    names = opened.names()
    for kind in _KINDS:
        if found := next((name for name in names if re.search(kind.pattern, name)), None):
            raise opened.error(f"is {kind.what} ({found[:80]!r} is in it): {kind.instead}")
