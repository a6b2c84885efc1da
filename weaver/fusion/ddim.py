"""DDIM's steps as numbers on a device, so that a step neither asks the host for one nor waits for it."""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler

__all__ = ["DDIMSteps"]


class DDIMSteps:
    """The coefficients of every step of a schedule (arXiv 2010.02502, equations 12 and 16).

    Parameters
    ----------
    scheduler : a `DDIMScheduler` with its timesteps set, without clipping or thresholding
    eta : 0 (deterministic) to 1

    `table` is [steps, 5] float32 on `device`: the square roots of alpha_t, 1 - alpha_t and alpha_(t-1), the weight of
    the direction to x_t, and sigma_t.
    """

    def __init__(self, scheduler, device: torch.device, eta: float = 0.0):
        config = scheduler.config
        self.prediction = config.prediction_type
        self.eta = eta
        apart = config.num_train_timesteps // scheduler.num_inference_steps
        rows = []
        for t in scheduler.timesteps.tolist():
            alpha, before = scheduler.alphas_cumprod[t], t - apart
            last = scheduler.alphas_cumprod[before] if before >= 0 else scheduler.final_alpha_cumprod
            sigma = eta * ((1 - last) / (1 - alpha) * (1 - alpha / last)) ** 0.5
            rows.append(torch.stack([alpha**0.5, (1 - alpha) ** 0.5, last**0.5, (1 - last - sigma**2) ** 0.5, sigma]))
        self.table = torch.stack(rows).to(device)

    @staticmethod
    def are_those_of(scheduler) -> bool:
        """Whether a scheduler's steps are these: DDIM without clipping or thresholding."""
        clipped = any(scheduler.config.get(name) for name in ("clip_sample", "thresholding"))
        return isinstance(scheduler, DDIMScheduler) and not clipped

    def __call__(
        self, output: torch.Tensor, z: torch.Tensor, numbers: torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x_(t-1) of z = x_t and the U-Net's output [n, C, h, w], with a row [5] of the table; 16 bits count in 32."""
        dtype = torch.promote_types(z.dtype, torch.float32)
        output, x = output.to(dtype), z.to(dtype)
        alpha, beta, last, direction, sigma = numbers.unbind()
        if self.prediction == "epsilon":
            clean, epsilon = (x - beta * output) / alpha, output
        elif self.prediction == "v_prediction":
            clean, epsilon = alpha * x - beta * output, alpha * output + beta * x
        else:
            clean, epsilon = output, (x - alpha * output) / beta
        x = last * clean + direction * epsilon
        if self.eta:
            x = x + sigma * noise.to(dtype)
        return x.to(z.dtype)
