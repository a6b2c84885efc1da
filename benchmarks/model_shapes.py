"""Folders with the configurations of published models, without their weights: Stable Diffusion 2.1 and SDXL.

The tokenizer in them is the embedded model's, which has the same length of text.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from weaver.embedded import MODEL_DIR

__all__ = ["MODELS", "write_model"]

_NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
_VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
_UNET = {"_class_name": "UNet2DConditionModel", "layers_per_block": 2, "use_linear_projection": True}
_TEXT = {"model_type": "clip_text_model", "vocab_size": 49408, "max_position_embeddings": 77}


def _text(width: int, layers: int, **more) -> dict:
    heads = {"hidden_size": width, "num_attention_heads": width // 64, "intermediate_size": 4 * width}
    return {**_TEXT, **heads, "num_hidden_layers": layers, **more}


MODELS = {
    "sd21": {
        "pipeline": ("StableDiffusionPipeline", {"requires_safety_checker": False}),
        "unet": {
            **_UNET,
            "sample_size": 96,
            "block_out_channels": [320, 640, 1280, 1280],
            "attention_head_dim": [5, 10, 20, 20],
            "cross_attention_dim": 1024,
            "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
            "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        },
        "vae": {**_VAE, "sample_size": 768},
        "text_encoder": ("CLIPTextModel", _text(1024, 23, hidden_act="gelu")),
        "scheduler": ("DDIMScheduler", {**_NOISE, "prediction_type": "v_prediction", "steps_offset": 1}),
    },
    "sdxl": {
        "pipeline": ("StableDiffusionXLPipeline", {"force_zeros_for_empty_prompt": True}),
        "unet": {
            **_UNET,
            "sample_size": 128,
            "block_out_channels": [320, 640, 1280],
            "attention_head_dim": [5, 10, 20],
            "transformer_layers_per_block": [1, 2, 10],
            "cross_attention_dim": 2048,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        "vae": {**_VAE, "sample_size": 1024, "force_upcast": True, "scaling_factor": 0.13025},
        "text_encoder": ("CLIPTextModel", _text(768, 12)),
        "text_encoder_2": (
            "CLIPTextModelWithProjection",
            _text(1280, 32, hidden_act="gelu", projection_dim=1280),
        ),
        "scheduler": ("EulerDiscreteScheduler", {**_NOISE, "steps_offset": 1}),
    },
}


def write_model(name: str, folder: Path) -> Path:
    """Write what a diffusers pipeline's folder holds besides weights; returns the folder."""
    parts = dict(MODELS[name])
    pipeline, settings = parts.pop("pipeline")
    index = {"_class_name": pipeline, **settings}
    for part, config in parts.items():
        library = "transformers" if part.startswith("text") else "diffusers"
        kind, config = config if isinstance(config, tuple) else (config["_class_name"], config)
        index[part] = [library, kind]
        file = {"scheduler": "scheduler_config.json"}.get(part, "config.json")
        (folder / part).mkdir(parents=True, exist_ok=True)
        named = config if library == "transformers" else {"_class_name": kind, **config}
        (folder / part / file).write_text(json.dumps(named))
        if part.startswith("text"):
            tokenizer = part.replace("text_encoder", "tokenizer")
            shutil.copytree(MODEL_DIR / "tokenizer", folder / tokenizer, dirs_exist_ok=True)
            index[tokenizer] = ["transformers", "CLIPTokenizer"]
    absent = ("safety_checker", "feature_extractor", "image_encoder") if pipeline == "StableDiffusionPipeline" else ()
    index |= {part: [None, None] for part in absent}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
