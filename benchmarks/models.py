"""The models of whole pictures: the embedded one, and others of random weights, of their true sizes or shrunken.

What a step costs does not depend on what the weights are. Random ones have the embedded model's tokenizer, at the text
length of their own; their pictures are noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from weaver.embedded import MODEL_DIR, load_pipeline
from weaver.models import quietly

__all__ = ["MODELS", "Size", "load", "make_unet"]

TEXT = 77


@dataclass(frozen=True)
class Encoder:
    """A CLIP text encoder: width, layers, heads and, for the second of two, the width of its pooled embedding."""

    width: int
    layers: int
    heads: int
    pooled: int | None = None


@dataclass(frozen=True)
class Size:
    """A U-Net, its text encoders and autoencoder, as their configurations say.

    `channels`, `heads` and `layers` (of transformers) are of each level, from the finest; a level of 0 layers has no
    attention. `latents` is the side of its latents, an eighth of its pictures'.
    """

    title: str
    latents: int
    channels: tuple[int, ...]
    heads: tuple[int, ...]
    layers: tuple[int, ...]
    encoders: tuple[Encoder, ...]
    vae: tuple[int, ...] = (128, 256, 512, 512)
    linear: bool = True
    prediction: str = "epsilon"

    @property
    def xl(self) -> bool:
        return len(self.encoders) == 2


_SD, _SDXL = (1, 1, 1, 0), (0, 2, 10)
_SMALL_VAE = (32, 32, 32, 32)
MODELS: dict[str, Size | None] = {
    "embedded": None,
    "sd21": Size(
        *("SD 2.1 at 768", 96, (320, 640, 1280, 1280), (5, 10, 20, 20), _SD, (Encoder(1024, 23, 16),)),
        prediction="v_prediction",
    ),
    "sdxl": Size(
        *("SDXL at 1024", 128, (320, 640, 1280), (5, 10, 20), _SDXL),
        (Encoder(768, 12, 12), Encoder(1280, 32, 20, pooled=1280)),
    ),
    "sd15": Size(
        *("SD 1.5 at 512", 64, (320, 640, 1280, 1280), (8, 8, 8, 8), _SD, (Encoder(768, 12, 12),)), linear=False
    ),
    "small sd21": Size(
        *("SD 2.1 with a tenth of its channels at 256", 32, (32, 64, 128, 128), (2, 4, 8, 8), _SD),
        *((Encoder(64, 2, 2),), _SMALL_VAE),
        prediction="v_prediction",
    ),
    "small sd15": Size(
        *("SD 1.5 with a tenth of its channels at 256", 32, (32, 64, 128, 128), (4, 4, 4, 4), _SD),
        *((Encoder(48, 2, 2),), _SMALL_VAE),
        linear=False,
    ),
    "small sdxl": Size(
        *("SDXL with a tenth of its channels at 256", 32, (32, 64, 128), (2, 4, 8), (0, 1, 2)),
        *((Encoder(32, 2, 2), Encoder(64, 3, 2, pooled=64)), _SMALL_VAE),
    ),
}


def load(name: str, device: torch.device, dtype: torch.dtype, seed: int = 0):
    """The pipeline of a model of `MODELS` on its device."""
    size = MODELS[name]
    if size is None:
        return load_pipeline(device, dtype)
    with quietly(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        return _pipeline(size, device, dtype)


def make_unet(size: Size):
    """The U-Net with the random weights that the library draws, on the default device."""
    from diffusers import UNet2DConditionModel

    down = tuple("CrossAttnDownBlock2D" if layers else "DownBlock2D" for layers in size.layers)
    added = {}
    if size.xl:
        added = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 6 * 256 + size.encoders[1].pooled,
        }
    return UNet2DConditionModel(
        sample_size=size.latents,
        in_channels=4,
        out_channels=4,
        block_out_channels=size.channels,
        layers_per_block=2,
        cross_attention_dim=sum(encoder.width for encoder in size.encoders),
        transformer_layers_per_block=tuple(max(layers, 1) for layers in size.layers),
        attention_head_dim=size.heads,  # which is how the library calls the number of heads
        down_block_types=down,
        up_block_types=tuple(block.replace("Down", "Up") for block in reversed(down)),
        use_linear_projection=size.linear,
        **added,
    )


def _pipeline(size: Size, device: torch.device, dtype: torch.dtype):
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
    from transformers import CLIPTokenizer

    levels = len(size.vae)
    vae = AutoencoderKL(
        block_out_channels=size.vae,
        latent_channels=4,
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        sample_size=8 * size.latents,
        scaling_factor=0.13025 if size.xl else 0.18215,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=size.prediction,
    )
    tokenizer = CLIPTokenizer.from_pretrained(MODEL_DIR / "tokenizer", model_max_length=TEXT)
    encoders = [_text_encoder(encoder, tokenizer) for encoder in size.encoders]
    parts = {"vae": vae, "unet": make_unet(size), "text_encoder": encoders[0]}
    if size.xl:
        parts["text_encoder_2"] = encoders[1]
    parts = {name: module.to(device, dtype).eval() for name, module in parts.items()}
    if device.type == "cuda":  # as cuDNN's convolutions of 16 bits have it; otherwise they are turned at every call
        for name in ("unet", "vae"):
            parts[name].to(memory_format=torch.channels_last)
    if size.xl:
        pipe = StableDiffusionXLPipeline(
            **parts, tokenizer=tokenizer, tokenizer_2=tokenizer, scheduler=scheduler, add_watermarker=False
        )
    else:
        pipe = StableDiffusionPipeline(
            **parts,
            tokenizer=tokenizer,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _text_encoder(encoder: Encoder, tokenizer):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    more = {} if encoder.pooled is None else {"projection_dim": encoder.pooled, "hidden_act": "gelu"}
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=encoder.width,
        intermediate_size=4 * encoder.width,
        num_hidden_layers=encoder.layers,
        num_attention_heads=encoder.heads,
        max_position_embeddings=TEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **more,
    )
    return (CLIPTextModel if encoder.pooled is None else CLIPTextModelWithProjection)(config)
