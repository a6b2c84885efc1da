"""Files that can't be fused are told by their names, before any of their data is read."""

from __future__ import annotations

import format_files as files
import pytest
import torch
from conftest import make_pipeline, make_vae

from weaver.concepts.concept import ConceptError
from weaver.concepts.formats import read_concept_file

LAYER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
X = torch.ones(2, 2)
NAMES = {
    "loha": ([f"{LAYER}.hada_w1_a", f"{LAYER}.hada_w1_b", f"{LAYER}.alpha"], "is a LoHa .*train a LoRA instead"),
    "loha-tucker": ([f"{LAYER}.hada_t1"], "is a LoHa"),
    "lokr": ([f"{LAYER}.lokr_w1", f"{LAYER}.lokr_w2"], "is a LoKr .*train a LoRA instead"),
    "lokr-factors": ([f"{LAYER}.lokr_w1_a", f"{LAYER}.lokr_w2_b"], "is a LoKr"),
    "glora": ([f"{LAYER}.{name}.weight" for name in ("a1", "a2", "b1", "b2")], "is a GLoRA .*train a LoRA instead"),
    "hra": (["base_model.model.mid_block.attn2.to_k.hra_u"], "is an HRA or FourierFT"),
    "fourierft": (["base_model.model.mid_block.attn2.to_k.fourierft_spectrum"], "is an HRA or FourierFT"),
    "vera": (["base_model.model.mid_block.attn2.to_k.vera_lambda_b"], "is a VeRA"),
    "lycoris-full": ([f"{LAYER}.diff"], "is whole differences of weights .*train a LoRA instead"),
    "lora-and-biases": ([f"{LAYER}.lora_down.weight", f"{LAYER}.lora_up.weight", f"{LAYER}.diff_b"], "is whole diff"),
    "lora-of-another-model": (
        ["lora_prior_unet_x.lora_down.weight", "lora_prior_unet_x.lora_up.weight"],
        "a LoRA of another model than Stable Diffusion .*take one for Stable Diffusion 1.x, 2.x or SDXL",
    ),
    "oft": ([f"{LAYER}.oft_blocks"], "is an OFT"),
    "ia3-lycoris": ([f"{LAYER}.weight", f"{LAYER}.on_input"], r"is an \(IA\)\^3"),
    "ia3-peft": (["base_model.model.mid_block.attn2.to_k.ia3_l"], r"is an \(IA\)\^3"),
    "flux-diffusers": (["transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight"], "of a diffusion transf"),
    "flux-kohya": (["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"], "of a diffusion transformer"),
    "flux-loha": (["lycoris.double_blocks.0.img_attn_qkv.hada_w1_a"], "of a diffusion transformer"),
    "sd3-diffusers": (["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"], "of a diffusion transformer"),
    "sd3-kohya": (["lora_unet_joint_blocks_0_context_block_attn_qkv.lora_up.weight"], "of a diffusion transformer"),
    "wan": (["diffusion_model.blocks.0.cross_attn.k.lora_A.weight"], "of a diffusion transformer"),
    "t5-embedding": (["clip_l", "t5xxl"], "T5 text encoder.*take one for Stable Diffusion"),
    "t5-kohya": (["lora_te3_encoder_block_0_layer_0_SelfAttention_k.lora_down.weight"], "T5 text encoder"),
    "checkpoint": (["model.diffusion_model.input_blocks.0.0.weight"], "is a whole checkpoint .*job's model"),
    "checkpoint-sdxl": (["conditioner.embedders.0.transformer.x.weight"], "is a whole checkpoint"),
    "checkpoint-vae": (["first_stage_model.encoder.conv_in.weight"], "is a whole checkpoint"),
    "compvis-delta": (["model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"], "convert it"),
    "ip-adapter": (["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"], "is an IP-Adapter"),
    "controlnet": (["control_model.input_hint_block.0.weight"], "is a ControlNet"),
    "unknown": (["a.weight", "b.weight"], "'a.weight', 'b.weight', ...*of no format that is known"),
}


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_is_told_by_its_names(kind, suffix, tmp_path):
    names, message = NAMES[kind]
    path = files.save({name: X.clone() for name in names}, tmp_path / f"concept{suffix}")
    with pytest.raises(ConceptError, match=message) as raised:
        read_concept_file(path)
    assert str(raised.value).startswith(f"{path}: ") and "\n" not in str(raised.value)


def test_nested_names_are_told_too(tmp_path):
    for content, message in (
        ({"state_dict": {"model.diffusion_model.time_embed.0.weight": X}}, "whole checkpoint"),
        ({320: ({"linear.0.weight": X}, {"linear.0.weight": X}), "step": 3}, "a hypernetwork"),
    ):
        with pytest.raises(ConceptError, match=message):
            read_concept_file(files.save(content, tmp_path / "concept.pt"))


@pytest.mark.parametrize(
    ("part", "what"), [("unet", "a whole U-Net"), ("vae", "an autoencoder"), ("text_encoder", "a whole text encoder")]
)
def test_parts_of_a_model_as_diffusers_saves_them(part, what, tmp_path):
    module = make_vae() if part == "vae" else getattr(make_pipeline(dtype=torch.float32), part)
    module.save_pretrained(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    with pytest.raises(ConceptError, match=f"is {what}"):
        read_concept_file(path)


def test_adapters_of_peft_that_are_not_lora(tmp_path):
    """By PEFT's own saver, on the tiny U-Net."""
    from peft import IA3Config, LoHaConfig, LoKrConfig, OFTConfig, get_peft_model

    targets = {"target_modules": ["to_k", "to_v"]}
    configs = {
        "LoHa": LoHaConfig(r=2, **targets),
        "LoKr": LoKrConfig(r=2, **targets),
        "OFT": OFTConfig(r=0, oft_block_size=4, **targets),
        r"\(IA\)\^3": IA3Config(feedforward_modules=[], **targets),
    }
    for kind, config in configs.items():
        folder = tmp_path / type(config).__name__
        get_peft_model(make_pipeline(dtype=torch.float32).unet, config).save_pretrained(folder)
        with pytest.raises(ConceptError, match=f"is an? {kind}"):
            read_concept_file(folder / "adapter_model.safetensors")
