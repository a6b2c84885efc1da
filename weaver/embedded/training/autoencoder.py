"""Train the autoencoder: 64x64 pictures to latents [8, 16, 16] and back."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny

from weaver.embedded.training.bank import HELD_OUT_SCENES, Bank, to_pixels
from weaver.embedded.training.loop import LoopSettings, autocast, device_from_environment, train

__all__ = ["LATENT_CHANNELS", "build_autoencoder", "decode_psnr", "tidy_config", "train_autoencoder"]

LATENT_CHANNELS = 8
LATENT_NOISE = 0.04  # added in training, so that the decoder forgives the sampler


def build_autoencoder() -> AutoencoderTiny:
    """An untrained autoencoder: three levels of 32 channels, most blocks where the map is small."""
    return AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32),
        decoder_block_out_channels=(32, 32, 32),
        num_encoder_blocks=(1, 2, 4),
        num_decoder_blocks=(4, 3, 1),
        latent_channels=LATENT_CHANNELS,
    )


def decode_psnr(vae: AutoencoderTiny, pixels: torch.Tensor) -> float:
    """Mean PSNR in dB of decoded against original pictures [n, 3, h, w] in [-1, 1]."""
    with torch.no_grad():
        decoded = torch.cat([vae.decode(vae.encode(part).latents).sample for part in pixels.split(64)]).clamp(-1, 1)
    error = ((decoded - pixels) / 2).square().mean((1, 2, 3))
    return (-10 * error.log10()).mean().item()


def tidy_config(folder: Path) -> None:
    """Drop from a saved autoencoder's configuration where it was loaded from, and a setting diffusers then warns of."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    for name in ("block_out_channels", "_name_or_path"):
        config.pop(name, None)
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _edges(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.l1_loss(a.diff(dim=-1), b.diff(dim=-1)) + F.l1_loss(a.diff(dim=-2), b.diff(dim=-2))


def train_autoencoder(
    bank: Bank, folder: Path, minutes: float, batch: int = 16, seed: int = 0, *, decoder_only: bool = False
) -> None:
    """Train for `minutes`, from the weights in `folder` if there are any, and save them there.

    `decoder_only` keeps the encoder, and so the latents that a denoiser has learned.
    """
    device = device_from_environment()
    torch.manual_seed(seed)
    resumed = (folder / "config.json").exists()
    vae = AutoencoderTiny.from_pretrained(folder) if resumed else build_autoencoder()
    vae = vae.float().to(device, memory_format=torch.channels_last)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    draw = torch.Generator().manual_seed(seed + 1 + rank)
    count = len(bank.captions) - HELD_OUT_SCENES
    held_out = to_pixels(bank.pictures[count:]).to(device)

    def loss_of(step: int) -> torch.Tensor:
        chosen = torch.randint(0, count, (batch,), generator=draw)
        pixels = to_pixels(bank.pictures[chosen.numpy()]).to(device, memory_format=torch.channels_last)
        with autocast(device):
            with torch.set_grad_enabled(not decoder_only):
                latents = vae.encode(pixels).latents
            noisy = latents + LATENT_NOISE * torch.randn_like(latents)
            decoded = vae.decode(noisy).sample.float()
        latents = latents.float()
        spread = latents.mean((0, 2, 3)).square().mean() + (latents.std((0, 2, 3)) - 1).square().mean()
        fidelity = F.l1_loss(decoded, pixels) + 6 * F.mse_loss(decoded, pixels)
        return fidelity + 0.5 * _edges(decoded, pixels) + 0.02 * spread

    def save() -> None:
        if not decoder_only:
            with torch.no_grad():
                latents = vae.encode(held_out).latents
            vae.register_to_config(scaling_factor=1 / latents.std().item())
        copy.deepcopy(vae).half().save_pretrained(folder)  # as it ships
        tidy_config(folder)

    rate = 8e-4 if resumed else 2e-3
    settings = LoopSettings(minutes, rate, batch, ema_decay=0.998, report_every=250, weight_decay=1e-4)
    curve = folder.parent / "curve_vae.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    train(
        list((vae.decoder if decoder_only else vae).parameters()),
        loss_of,
        settings,
        save=save,
        evaluate=lambda: {"psnr": decode_psnr(vae, held_out)},
        curve=curve,
        arguments={
            "seed": seed,
            "decoder_only": decoder_only,
            "resumed": resumed,
            "latent_noise": LATENT_NOISE,
            "bank": bank.card,
        },
    )
