"""Train the denoiser and its text encoder together on the latents of the bank's pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from weaver.embedded.training.autoencoder import LATENT_CHANNELS, tidy_config
from weaver.embedded.training.bank import HELD_OUT_SCENES, LATENTS, Bank, drop_latents, to_pixels
from weaver.embedded.training.loop import LoopSettings, autocast, device_from_environment, is_main_process, train
from weaver.embedded.training.tokenizer import MAX_TOKENS, build_tokenizer
from weaver.folder import all_or_nothing, whole_file
from weaver.hashing import file_hash

__all__ = ["build_scheduler", "build_text_encoder", "build_unet", "encode_bank", "train_diffusion"]

TEXT_WIDTH = 96
CAPTION_DROPOUT = 0.1


def build_unet() -> UNet2DConditionModel:
    """Stable Diffusion's four-level layout at small width, 8.0 M parameters."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 96, 96, 96),
        layers_per_block=2,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(2, 3, 3, 3),
        norm_num_groups=16,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A two-layer CLIP text model over `tokenizer`."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule with v-prediction."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def encode_bank(bank: Bank, vae_folder: Path, folder: Path) -> np.ndarray:
    """The latents of all pictures, float16 [n, 8, 16, 16], scaled to unit variance; kept in `folder` for this
    autoencoder.
    """
    of = [file_hash(vae_folder / name)[:12] for name in ("config.json", "diffusion_pytorch_model.safetensors")]
    file = folder / f"{LATENTS}{'-'.join(of)}.npy"
    if not file.exists():
        device = device_from_environment()
        vae = AutoencoderTiny.from_pretrained(vae_folder).float().to(device, memory_format=torch.channels_last)
        parts, size = [], 32 if device.type == "cpu" else 512
        with torch.no_grad(), autocast(device):
            for start in range(0, len(bank.captions), size):
                pixels = to_pixels(bank.pictures[start : start + size]).to(device, memory_format=torch.channels_last)
                latents = vae.encode(pixels).latents.float() * vae.config.scaling_factor
                parts.append(latents.half().cpu().numpy())
        with whole_file(file) as unfinished, open(unfinished, "wb") as written:
            np.save(written, np.concatenate(parts))
        drop_latents(folder, keep=file)  # after it is there: other processes may be at it, too
    return np.load(file, mmap_mode="r")


def _load_or_build(folder: Path) -> tuple[CLIPTokenizer, CLIPTextModel, UNet2DConditionModel]:
    if (folder / "unet").exists():
        return (
            CLIPTokenizer.from_pretrained(folder / "tokenizer"),
            CLIPTextModel.from_pretrained(folder / "text_encoder", torch_dtype=torch.float32),
            UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32),
        )
    tokenizer = build_tokenizer()
    return tokenizer, build_text_encoder(tokenizer), build_unet()


class _Denoiser(torch.nn.Module):
    """(noisy latents [b, 8, h, w], steps [b], text [b, tokens, width]), all but the steps float32, to predictions."""

    def __init__(self, unet: UNet2DConditionModel):
        super().__init__()
        self.unet = unet

    def forward(self, noisy: torch.Tensor, steps: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        with autocast(noisy.device):
            return self.unet(noisy, steps, text).sample


def train_diffusion(
    bank: Bank,
    latents: np.ndarray,
    folder: Path,
    minutes: float,
    batch: int = 20,
    learning_rate: float = 1e-3,
    seed: int = 0,
    *,
    compiled: bool = False,
) -> None:
    """Train for `minutes` from the weights in `folder`, or from nothing, and save the whole pipeline there in fp16.

    `batch` is per process. The folder must hold the trained autoencoder in ``vae``. `compiled` prepares the denoiser's
    part of a step first: on a CPU it is compiled, in 7 minutes, and steps are 1.3 times as fast; on a GPU it is
    captured in CUDA graphs, in seconds.
    """
    device = device_from_environment()
    torch.manual_seed(seed)
    resumed = (folder / "unet").exists()
    tokenizer, text_encoder, unet = _load_or_build(folder)
    unet, text_encoder = unet.to(device).train(), text_encoder.to(device).train()
    if device.type == "cpu":
        unet.set_attn_processor(AttnProcessor())  # SDPA's bf16 backward is ten times slower on CPUs
    denoiser = trained = _Denoiser(unet)
    if compiled and device.type == "cpu":
        trained = torch.compile(denoiser, dynamic=False)
    elif compiled:
        shapes = (batch, *latents.shape[1:]), (batch,), (batch, MAX_TOKENS, TEXT_WIDTH)
        z, steps, text = (torch.zeros(shape, device=device) for shape in shapes)
        trained = torch.cuda.make_graphed_callables(_Denoiser(unet), (z, steps.long(), text.requires_grad_()))
    scheduler = build_scheduler()
    alphas = scheduler.alphas_cumprod.to(device)

    def tokens_of(captions: list[str]) -> torch.Tensor:
        return tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids

    tokens, empty = tokens_of(bank.captions).to(device), tokens_of([""])[0].to(device)
    known = torch.from_numpy(np.array(latents)).to(device)
    count = len(bank.captions) - HELD_OUT_SCENES
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    draw = torch.Generator(device).manual_seed(seed + 1 + rank)

    def losses(
        net: torch.nn.Module, z: torch.Tensor, ids: torch.Tensor, steps: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        alpha = alphas[steps].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * z + (1 - alpha).sqrt() * noise
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * z
        with autocast(device):
            text = text_encoder(ids)[0]
        predicted = net(noisy, steps, text.float())
        return (predicted.float() - velocity).square().mean((1, 2, 3))

    def loss_of(step: int) -> torch.Tensor:
        rows = torch.randint(0, count, (batch,), generator=draw, device=device)
        dropped = torch.rand(batch, generator=draw, device=device) < CAPTION_DROPOUT
        ids = torch.where(dropped[:, None], empty, tokens[rows])
        # Evenly spread timesteps: less variance between batches than independent ones.
        spread = (torch.rand(1, generator=draw, device=device) + torch.arange(batch, device=device) / batch) % 1
        noise = torch.randn((batch, *latents.shape[1:]), generator=draw, device=device)
        return losses(trained, known[rows].float(), ids, (spread * len(alphas)).long(), noise).mean()

    held_out = slice(count, count + 64)
    fixed = torch.Generator().manual_seed(5)
    held_out_steps = torch.randint(0, len(alphas), (64,), generator=fixed).to(device)
    held_out_noise = torch.randn((64, *latents.shape[1:]), generator=fixed).to(device)

    def evaluate() -> dict[str, float]:
        with torch.no_grad():
            z, ids = known[held_out].float(), tokens[held_out]
            return {"held_out": losses(denoiser, z, ids, held_out_steps, held_out_noise).mean().item()}

    def save() -> None:
        vae = AutoencoderTiny.from_pretrained(folder / "vae", torch_dtype=torch.float16)
        unet_half, text_half = build_unet(), build_text_encoder(tokenizer)
        unet_half.load_state_dict(unet.state_dict())
        text_half.load_state_dict(text_encoder.state_dict())
        with all_or_nothing(folder) as partial:
            StableDiffusionPipeline(
                vae, text_half.half(), tokenizer, unet_half.half(), scheduler, None, None, requires_safety_checker=False
            ).save_pretrained(partial)
            tidy_config(partial / "vae")

    curve = folder / "curve_unet.jsonl"
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    ends = ("conv_in", "conv_out", "time_embedding")
    matrices = [p for name, p in unet.named_parameters() if p.ndim > 1 and not name.startswith(ends)]
    settings = LoopSettings(minutes, learning_rate, batch)
    if compiled:  # before the budget starts
        loss_of(0).backward()
        for parameter in parameters:
            parameter.grad = None
    if is_main_process():
        print(f"{sum(p.numel() for p in parameters) / 1e6:.2f} M parameters, {count} scenes", flush=True)
    arguments = {
        "seed": seed,
        "compiled": compiled,
        "resumed": resumed,
        "caption_dropout": CAPTION_DROPOUT,
        "bank": bank.card,
    }
    options = {"save": save, "matrices": matrices, "evaluate": evaluate, "curve": curve, "arguments": arguments}
    train(parameters, loss_of, settings, **options)
