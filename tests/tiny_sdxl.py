"""A real SDXL pipeline of three levels, built from configuration, seeded and tiny; float64 as `tiny_pipe` is."""

from __future__ import annotations

import torch
from conftest import TEXT_LENGTH, make_louder, make_scheduler, make_tokenizer, make_vae

WIDTHS, POOLED = (16, 24), 10
BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")


def make_encoder(kind: str, width: int, tokenizer, **options):
    """A text encoder of three layers, so that the last hidden state but one is the output of a layer."""
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )
    return getattr(transformers, kind)(config)


def make_sdxl(prediction_type: str = "epsilon", dtype: torch.dtype = torch.float64, seed: int = 0):
    """A `StableDiffusionXLPipeline`: 32 px pictures, latents [4, 16, 16], text [16, 40], pooled 10.

    Its second tokenizer pads with another token, as SDXL's does. Weights are drawn larger than the library's defaults,
    so that text, pooled embedding, time ids, masks and injection move the result visibly.
    """
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

    tokenizers = make_tokenizer(), make_tokenizer(pad_token="!")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoders = (
            make_encoder("CLIPTextModel", WIDTHS[0], tokenizers[0]),
            make_encoder(
                "CLIPTextModelWithProjection", WIDTHS[1], tokenizers[1], projection_dim=POOLED, hidden_act="gelu"
            ),
        )
        unet = UNet2DConditionModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            block_out_channels=(8, 16, 16),
            layers_per_block=2,
            cross_attention_dim=sum(WIDTHS),
            transformer_layers_per_block=(1, 2, 3),
            attention_head_dim=(2, 2, 4),
            norm_num_groups=4,
            down_block_types=BLOCKS,
            up_block_types=tuple(block.replace("Down", "Up") for block in reversed(BLOCKS)),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + POOLED,
        )
        vae = make_vae(force_upcast=False)  # to float32, from which float64 does not come back
        with torch.no_grad():
            for encoder in encoders:
                encoder.get_input_embeddings().weight.normal_()
            encoders[1].text_projection.weight.normal_()
            make_louder(unet)
            for name, parameter in unet.named_parameters():
                if name.startswith("add_embedding") or "time_emb_proj" in name:
                    parameter.mul_(3)
    pipe = StableDiffusionXLPipeline(
        vae=vae.to(dtype).eval(),
        text_encoder=encoders[0].to(dtype).eval(),
        text_encoder_2=encoders[1].to(dtype).eval(),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=unet.to(dtype).eval(),
        scheduler=make_scheduler(prediction_type),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
