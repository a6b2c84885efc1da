"""What a step of training learns from, and its loss: noise to be predicted in pictures of a concept and of others."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch

from weaver.concepts.encoding import Encoding
from weaver.concepts.examples import Examples, encode_captions, encode_fixed_captions, pick
from weaver.concepts.settings import TrainSettings
from weaver.concepts.woven import WovenExamples, WovenForward
from weaver.conditioning import text_encoders, unet_arguments

__all__ = ["Batch", "Losses", "Objective", "Rows"]

_INJECTED = 0.8  # of the steps; in the others the concept is learned without a template's features, too


class Rows(NamedTuple):
    """Rows of a batch of one kind, on the CPU.

    Parameters
    ----------
    picks : numbers of the pictures [b]
    t, noise : timesteps [b] and noise [b, C, h, w]
    weight : of the batch in the mean over a step's batches: 1, but of woven rows as their regions' cells are many
    """

    picks: torch.Tensor
    t: torch.Tensor
    noise: torch.Tensor
    weight: float | torch.Tensor = 1.0


class Batch(NamedTuple):
    """Rows by kind, in their order, and whether woven ones have their templates' features."""

    rows: Mapping[str, Rows]
    inject: bool


class Losses(NamedTuple):
    """A batch's part of the loss that is minimised, and what it is the weighted sum of; `prior` None without such."""

    total: torch.Tensor
    own: torch.Tensor
    prior: torch.Tensor | None


class Objective:
    """Draws batches and computes their loss.

    Parameters
    ----------
    own, other, scenes : pictures of the concept, of other things of its class, and woven ones
    vectors : that are learned, by text encoder [V, C]
    forward : the conditions of woven rows, on the U-Net already; None without `scenes`
    """

    def __init__(
        self,
        pipe,
        vectors: Mapping[str, torch.Tensor],
        settings: TrainSettings,
        own: Examples,
        other: Examples | None = None,
        scenes: WovenExamples | None = None,
        forward: WovenForward | None = None,
    ):
        self._unet, self._device, self._settings = pipe.unet, pipe._execution_device, settings
        self._dtype = pipe.unet.dtype  # the library looks through all of the model for it
        self._encoders, self._vectors, self._scenes, self._forward = text_encoders(pipe), vectors, scenes, forward
        self._alphas = pipe.scheduler.alphas_cumprod.to(self._device, torch.float32)
        self._velocity = pipe.scheduler.config.prediction_type == "v_prediction"
        woven = 0 if scenes is None else settings.woven_batch
        counts = {"woven": woven, "own": settings.batch + settings.woven_batch - woven}
        counts["prior"] = 0 if other is None else settings.prior_batch
        self._counts = {kind: count for kind, count in counts.items() if count}
        self._examples = {"woven": scenes and scenes.own, "own": own, "prior": other}
        self._regions = {"woven": scenes and scenes.region, "own": own.region, "prior": None}
        self._cells = own.latents.shape[1:]
        self._prior_text = None if other is None else encode_fixed_captions(self._encoders, other)

    def draw(self, generator: torch.Generator) -> list[Batch]:
        """Draw the rows of a step, and part them into `settings.accumulate` batches."""
        total, parts = len(self._alphas), self._settings.accumulate
        counts = {kind: count * parts for kind, count in self._counts.items()}
        picks = [pick(len(self._examples[kind].latents), count, generator) for kind, count in counts.items()]
        t = [_timesteps(count, total, generator) for count in counts.values()]
        noise = torch.randn((sum(counts.values()), *self._cells), generator=generator)
        inject = "woven" in counts and float(torch.rand((), generator=generator)) < _INJECTED
        drawn = zip(counts, map(Rows, picks, t, noise.split(list(counts.values()))), strict=True)
        parted = {kind: self._parted(kind, rows) for kind, rows in drawn}
        return [Batch({kind: rows[i] for kind, rows in parted.items()}, inject) for i in range(parts)]

    def loss(self, batch: Batch) -> Losses:
        """The loss of a batch, differentiable in what is learned.

        Each picture of the concept counts alike, however small the region that it has; woven rows count by theirs.

        The mean over a step's batches is the loss of all their rows in one.
        """
        kinds, dtype = batch.rows, self._dtype
        z = torch.cat([self._examples[kind].latents[rows.picks] for kind, rows in kinds.items()])
        text = Encoding.joined([self._text(kind, rows.picks) for kind, rows in kinds.items()])
        t = torch.cat([rows.t for rows in kinds.values()]).to(self._device)
        noise = torch.cat([rows.noise for rows in kinds.values()]).to(self._device)
        alphas = self._alphas[t]
        signal, spread = alphas.sqrt()[:, None, None, None], (1 - alphas).sqrt()[:, None, None, None]
        target = signal * noise - spread * z if self._velocity else noise
        if "woven" in kinds:
            noised = partial(_noised, signal=signal, spread=spread, noise=noise, dtype=dtype)
            woven = kinds["woven"]
            self._forward.begin(woven.picks, woven.t, len(self._alphas), noised, batch.inject)
        noisy = (signal * z + spread * noise).to(dtype)
        arguments = unet_arguments(text.text.to(dtype), text.pooled, self._time_ids(batch))
        output = self._unet(noisy, t, **arguments).sample.float()
        error = (output - target).square().mean(1, keepdim=True)
        errors = dict(zip(kinds, error.split([len(rows.t) for rows in kinds.values()]), strict=True))
        means = {}
        for kind, rows in kinds.items():
            mean = _mean_of_cells if kind == "woven" else _mean_of_pictures
            means[kind] = rows.weight * mean(errors[kind], self._regions[kind], rows.picks)
        prior = means.pop("prior", None)
        own = sum(self._counts[kind] * mean for kind, mean in means.items())
        own = own / sum(self._counts[kind] for kind in means)
        return Losses(own if prior is None else own + self._settings.prior_weight * prior, own, prior)

    def _parted(self, kind: str, rows: Rows) -> list[Rows]:
        """The rows of a step's batches, in turn."""
        count, region = self._counts[kind], self._regions[kind]
        if len(rows.picks) == count:
            return [rows]
        parts = map(Rows, *(part.split(count) for part in rows[:3]))
        if kind != "woven":
            return list(parts)
        mean = region[rows.picks].sum() / self._settings.accumulate
        return [part._replace(weight=region[part.picks].sum() / mean) for part in parts]

    def _text(self, kind: str, picks: torch.Tensor) -> Encoding:
        if kind == "prior":
            return self._prior_text.rows(picks)
        text = encode_captions(self._encoders, self._examples[kind], picks, self._vectors)
        if kind == "own" or text.pooled is None:
            return text
        return text._replace(pooled=self._scenes.base_text.pooled[picks])  # a fused row has the base prompt's

    def _time_ids(self, batch: Batch) -> torch.Tensor | None:
        found = [(self._examples[kind].time_ids, rows.picks) for kind, rows in batch.rows.items()]
        return None if found[0][0] is None else torch.cat([ids[picks] for ids, picks in found])


def _mean_of_pictures(error: torch.Tensor, region: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
    """The mean over pictures of each one's mean error [b, 1, h, w] in its region, which are `rows` of them."""
    if region is None:
        return error.mean()
    weight = region[rows]
    return ((error * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3))).mean()


def _mean_of_cells(error: torch.Tensor, region: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The mean of errors [b, 1, h, w] over all cells of the pictures' regions."""
    weight = region[rows]
    return (error * weight).sum() / weight.sum()


def _noised(z: torch.Tensor, rows: torch.Tensor, *, signal, spread, noise, dtype) -> torch.Tensor:
    """Latents with the noise that the rows of the batch have."""
    return (signal[rows] * z + spread[rows] * noise[rows]).to(dtype)


def _timesteps(batch: int, total: int, generator: torch.Generator) -> torch.Tensor:
    """Draw timesteps, one from each of `batch` equal parts of the range: uniform, and spread over every batch."""
    t = (torch.arange(batch) + torch.rand(batch, generator=generator)) * (total / batch)
    return t.long().clamp(max=total - 1)
