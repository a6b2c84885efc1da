"""The DDIM schedule that inversion, features and fusion share."""

from __future__ import annotations

from diffusers import DDIMScheduler

__all__ = ["ddim_scheduler", "invertible", "most_steps"]


def ddim_scheduler(scheduler) -> DDIMScheduler:
    """The DDIM scheduler with another scheduler's noise schedule and prediction type.

    Latents are not clipped: clipping can't be inverted. Inversion, features and fusion with injection all use these
    timesteps; a pipeline that is to fuse with injected features gets it as `pipe.scheduler`.
    """
    return DDIMScheduler.from_config(scheduler.config, **invertible(scheduler))


def invertible(scheduler) -> dict:
    """What has to change where the scheduler's own configuration can't be inverted."""
    spacing = scheduler.config.get("timestep_spacing", "leading")
    fixed = {"clip_sample": False, "thresholding": False}
    return fixed | {"timestep_spacing": spacing if spacing in ("leading", "trailing") else "leading"}


def most_steps(scheduler) -> int:
    """The most DDIM steps of a noise schedule: one for every training timestep that their offset leaves."""
    config = ddim_scheduler(scheduler).config
    offset = config.steps_offset if config.timestep_spacing == "leading" else 0
    return config.num_train_timesteps - offset
