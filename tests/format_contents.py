"""What a concept file of each layout holds, small and random, and the containers that can hold it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping

import torch
from safetensors.torch import save

ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn2"


def contents() -> dict[str, tuple[dict, dict[str, str]]]:
    """A small one of each layout: tensors, and metadata where there is some."""
    keys_values = {f"{ATTENTION}.{name}.weight": torch.randn(4, 3) for name in ("to_k", "to_v")}
    factors = {key: {"u": torch.randn(4, 2), "v": torch.randn(2, 3)} for key in keys_values}
    vector = torch.randn(3)
    processors = {key.replace(".to_", ".processor.to_").replace(".weight", "_custom_diffusion.weight"): value
                  for key, value in keys_values.items()}  # fmt: skip
    lora = {f"unet.{ATTENTION}.{name}.lora_{x}.weight": torch.randn(*shape)
            for name in ("to_k", "to_v") for x, shape in (("A", (2, 3)), ("B", (4, 2)))}  # fmt: skip
    own = {f"deltas/{key.removesuffix('.weight')}": value for key, value in keys_values.items()}
    texts = {"format": "concept-weaver/concept", "format_version": "3", "name": "rex", "token": "<v1>", "word": "dog"}
    texts |= {"base_hash": "0" * 64, "settings": '{"steps": 3}', "versions": "{}"}
    automatic = {"string_to_token": {"*": 265}, "string_to_param": {"*": vector}, "name": "toy", "step": 9}
    told = {"unet.r": 2, "unet.lora_alpha": 4, "unet.rank_pattern": {}, "unet.alpha_pattern": {"to_k": 1}}
    return loras() | {
        "own": (own | {"embeddings/text_encoder": vector[None]}, texts),
        "delta": ({"unet": keys_values, "modifier_token": {"<new1>": vector}}, {}),
        "compressed": ({"unet": factors, "modifier_token": {"<new1>": [vector, vector.clone()]}}, {}),
        "diffusers": (processors, {"format": "pt"}),
        "embedding": ({"<toy>": vector[None]}, {}),
        "automatic1111": (automatic, {}),
        "sdxl": ({"clip_l": torch.randn(2, 3), "clip_g": torch.randn(2, 4)}, {}),
        "lora": (lora, {"lora_adapter_metadata": json.dumps(told)}),
        "loha": ({f"x.hada_w{i}_{part}": torch.randn(2, 2) for i in (1, 2) for part in "ab"}, {"ss_steps": "3"}),
    }


def loras() -> dict[str, tuple[dict, dict[str, str]]]:
    """LoRAs in the other dialects: kohya's scripts', of SD and SDXL, and what diffusers wrote before PEFT."""
    unet, text = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2", "lora_te_text_model_encoder_layers_0"
    names = [f"{unet}_to_k", f"{unet}_to_v", "lora_unet_mid_block_resnets_0_conv1", f"{text}_self_attn_q_proj"]
    kohya = _kohya([*names, f"{text}_mlp_fc1"])
    kohya |= {f"{names[2]}.lora_mid.weight": torch.randn(2, 2, 3, 3)}
    for name, part in ((names[2], "lora_down"), (names[2], "lora_up")):
        kohya[f"{name}.{part}.weight"] = kohya[f"{name}.{part}.weight"][..., None, None]
    block = "lora_unet_middle_block_1_transformer_blocks_0"
    sdxl = _kohya(
        [f"{block}_attn2_to_k", f"{block}_ff_net_2", "lora_te2_text_model_encoder_layers_0_self_attn_out_proj"]
    )
    old = {f"unet.{ATTENTION}.processor.to_{x}_lora.{part}.weight": torch.randn(*shape)
           for x in "kv" for part, shape in (("down", (2, 3)), ("up", (4, 2)))}  # fmt: skip
    of_text = "text_encoder.text_model.encoder.layers.0.self_attn"
    old |= {
        f"{of_text}.to_q_lora.{part}.weight": torch.randn(*shape) for part, shape in (("down", (2, 3)), ("up", (3, 2)))
    }
    peft = {f"base_model.model.{ATTENTION}.to_k.lora_{x}.weight": torch.randn(2, 2) for x in "AB"}
    bundle = kohya | {"bundle_emb.toy.string_to_param.*": torch.randn(1, 3)}
    return {
        "kohya": (kohya, {"ss_steps": "3"}),
        "bundle": (bundle, {}),
        "kohya-sdxl": (sdxl, {}),
        "old-lora": (old, {}),
        "peft": (peft, {}),
    }


def _kohya(names: list[str]) -> dict[str, torch.Tensor]:
    """Factors of rank 2 and alphas."""
    found = {}
    for name in names:
        parts = {"lora_down.weight": torch.randn(2, 3), "lora_up.weight": torch.randn(4, 2), "alpha": torch.tensor(1.0)}
        found |= {f"{name}.{part}": value for part, value in parts.items()}
    return found


def as_safetensors(tensors: Mapping, texts: Mapping[str, str]) -> bytes:
    return save(dict(tensors), dict(texts))


def as_torch(tensors: Mapping, texts: Mapping[str, str]) -> bytes:
    file = io.BytesIO()
    torch.save(dict(tensors), file)
    return file.getvalue()


def as_old_torch(tensors: Mapping, texts: Mapping[str, str]) -> bytes:
    file = io.BytesIO()
    torch.save(dict(tensors), file, _use_new_zipfile_serialization=False)
    return file.getvalue()


CONTAINERS = (as_safetensors, as_torch, as_old_torch)


def containers_of(tensors: Mapping) -> tuple[Callable, ...]:
    """Those that can hold it: safetensors has no nesting."""
    return CONTAINERS if all(isinstance(value, torch.Tensor) for value in tensors.values()) else CONTAINERS[1:]
