"""The optimisation by which a concept is learned: noise, loss and steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch.optim.lr_scheduler import LambdaLR

from weaver.concepts.changes import Delta, parts_of
from weaver.concepts.checkpoints import Checkpoint
from weaver.concepts.concept import ConceptError
from weaver.concepts.examples import Examples, encode_captions, encode_fixed_captions, pick
from weaver.concepts.muon import Muon
from weaver.concepts.settings import TrainSettings
from weaver.concepts.woven import WovenExamples, woven
from weaver.defaults import defaults_for

__all__ = ["Learned", "optimise"]

_INJECTED = 0.8  # of the steps; in the others the concept is learned without a template's features, too


@dataclass(frozen=True)
class Learned:
    """What is learned: vectors [V, C] and changes of weights by their paths, in float32."""

    vectors: torch.Tensor
    deltas: Mapping[str, Delta]

    def weights(self) -> list[torch.Tensor]:
        """The tensors that the changes are made of."""
        return [part for delta in self.deltas.values() for part in parts_of(delta).values()]


def optimise(
    pipe,
    learned: Learned,
    settings: TrainSettings,
    own: Examples,
    other: Examples | None,
    scenes: WovenExamples | None,
    report: Callable[[int], None],
    checkpoint: Checkpoint | None = None,
) -> None:
    """Learn from pictures of the concept, and of `other` things, and from woven `scenes`, where there are some.

    The loss of a woven scene is that of its region. Begins where `checkpoint` is. Raises `ConceptError` if it diverges.
    """
    device, dtype = pipe._execution_device, pipe.unet.dtype
    generator = torch.Generator("cpu").manual_seed(settings.seed)
    alphas = pipe.scheduler.alphas_cumprod.to(device, torch.float32)
    velocity = pipe.scheduler.config.prediction_type == "v_prediction"
    optimisers = _optimisers(learned, settings)
    schedules = {key: LambdaLR(one, lambda step: _rate(step, settings)) for key, one in optimisers.items()}
    # Gradients of float16 activations vanish below 6e-8 unless the loss is scaled up.
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    prior_text = None if other is None else encode_fixed_captions(pipe.text_encoder, other)
    n_woven = 0 if scenes is None else settings.woven_batch
    n_own = settings.batch + settings.woven_batch - n_woven
    with ExitStack() as stack:
        forward = stack.enter_context(woven(pipe.unet, scenes, defaults_for(pipe).sites)) if n_woven else None
        state = {f"optimiser of {key}": one for key, one in optimisers.items()}
        state |= {f"schedule of {key}": one for key, one in schedules.items()} | {"scaler": scaler}
        begun = checkpoint.begin([learned.vectors, *learned.weights()], generator, **state) if checkpoint else 0
        for step in range(begun, settings.steps):
            picks, z, text = [], [], []
            for examples, count in ((scenes.own if n_woven else None, n_woven), (own, n_own)):
                if count:
                    picks.append(pick(len(examples.latents), count, generator))
                    z.append(examples.latents[picks[-1]])
                    text.append(encode_captions(pipe.text_encoder, examples, picks[-1], learned.vectors))
            if other is not None:
                picks.append(pick(len(other.latents), settings.prior_batch, generator))
                z.append(other.latents[picks[-1]])
                text.append(prior_text[picks[-1]])
            z, text = torch.cat(z), torch.cat(text)
            drawn = torch.cat([_timesteps(len(rows), len(alphas), generator) for rows in picks])
            t = drawn.to(device)
            noise = torch.randn(z.shape, generator=generator).to(device)
            signal, spread = alphas[t].sqrt()[:, None, None, None], (1 - alphas[t]).sqrt()[:, None, None, None]
            target = signal * noise - spread * z if velocity else noise
            if n_woven:
                noised = partial(_noised, signal=signal, spread=spread, noise=noise, dtype=dtype)
                inject = float(torch.rand((), generator=generator)) < _INJECTED
                forward.begin(picks[0], drawn[:n_woven], len(alphas), noised, inject)
            noisy = (signal * z + spread * noise).to(dtype)
            output = pipe.unet(noisy, t, encoder_hidden_states=text.to(dtype)).sample.float()
            error = (output - target).square().mean(1, keepdim=True)
            parts = error.split([n_woven, n_own, len(z) - n_woven - n_own])
            loss = n_own * _mean(parts[1], own.region, picks[n_woven > 0]) if n_own else 0.0
            if n_woven:
                loss = loss + n_woven * _mean(parts[0], scenes.region, picks[0])
            loss = loss / (n_woven + n_own)
            if other is not None:
                loss = loss + settings.prior_weight * parts[2].mean()
            if not torch.isfinite(loss):
                raise ConceptError(f"training diverged at step {step + 1} of {settings.steps}: lower the learning rate")
            for optimiser in optimisers.values():
                optimiser.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scale = scaler.get_scale()
            for optimiser in optimisers.values():
                scaler.step(optimiser)
            scaler.update()
            if scaler.get_scale() >= scale:  # it falls where gradients overflowed and the step was left out
                for schedule in schedules.values():
                    schedule.step()
            if checkpoint:
                checkpoint.after(step + 1)
            report(step + 1)


def _optimisers(learned: Learned, settings: TrainSettings) -> dict[str, torch.optim.Optimizer]:
    """One of the changes of weights and one of the token's vectors, neither of which decays what it learns."""
    adamw = partial(torch.optim.AdamW, betas=(0.9, 0.99), weight_decay=0)
    rate = settings.learning_rate
    return {
        "weights": {"adamw": adamw, "muon": Muon}[settings.optimiser](learned.weights(), lr=rate),
        "vectors": adamw([learned.vectors], lr=settings.token_learning_rate or rate),
    }


def _mean(error: torch.Tensor, region: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
    """The mean of errors [b, 1, h, w] over the region of their pictures, `rows` of it."""
    if region is None:
        return error.mean()
    weight = region[rows]
    return (error * weight).sum() / weight.sum()


def _noised(z: torch.Tensor, rows: torch.Tensor, *, signal, spread, noise, dtype) -> torch.Tensor:
    """Latents with the noise that the rows of the batch have."""
    return (signal[rows] * z + spread[rows] * noise[rows]).to(dtype)


def _timesteps(batch: int, total: int, generator: torch.Generator) -> torch.Tensor:
    """Draw timesteps, one from each of `batch` equal parts of the range: uniform, and spread over every batch."""
    t = (torch.arange(batch) + torch.rand(batch, generator=generator)) * (total / batch)
    return t.long().clamp(max=total - 1)


def _rate(step: int, settings: TrainSettings) -> float:
    """Part of the learning rates in use at `step`: a linear rise, then a linear fall to `final_rate`."""
    fall = 1 - (1 - settings.final_rate) * step / settings.steps
    return min(1.0, (step + 1) / (settings.warmup + 1)) * fall
