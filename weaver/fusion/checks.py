"""Whether `attach` and the sampler are given what they can draw: plan, numbers, scheduler, noise, graphs."""

from __future__ import annotations

import inspect

import torch

from weaver.fusion.ddim import DDIMSteps
from weaver.fusion.plan import FusionPlan
from weaver.values import is_whole

__all__ = ["count_reasons", "noise_reasons", "plan_reasons", "schedule_reasons"]


def plan_reasons(plan) -> list[str]:
    """Why this is no plan."""
    return [] if isinstance(plan, FusionPlan) else [f"the plan is a {type(plan).__name__}: make it by FusionPlan.build"]


def count_reasons(pictures, capacity) -> list[str]:
    """What is wrong with the numbers of pictures and of concepts; None is the plan's own."""
    reasons = [] if pictures is None or is_whole(pictures, 1) else [f"pictures is {pictures!r}, expected 1 or more"]
    if capacity is not None and not is_whole(capacity, 0):
        reasons.append(f"capacity is {capacity!r}, expected a number of concepts, 0 or more")
    return reasons


def schedule_reasons(scheduler, eta: float, graphs: bool) -> list[str]:
    """Why the scheduler can't draw with this eta, or in graphs."""
    ours, name = DDIMSteps.are_those_of(scheduler), type(scheduler).__name__
    if graphs and not ours:
        return [f"graphs are of DDIM's steps, the scheduler is a {name}: use ddim_scheduler(pipe.scheduler)"]
    if eta and not ours and "eta" not in inspect.signature(scheduler.step).parameters:
        return [f"eta is {eta}, which a {name} has not: leave it out or use ddim_scheduler(pipe.scheduler)"]
    return []


def noise_reasons(z, unet, plan: FusionPlan, pictures: int) -> list[str]:
    """Why a fusion can't start from z."""
    if not isinstance(z, torch.Tensor):
        return [f"z is a {type(z).__name__}, expected a tensor of latents"]
    expected = (unet.config.in_channels, *plan.size)
    if z.ndim != 4 or tuple(z.shape[1:]) != expected:
        return [f"z is {list(z.shape)}, expected [n, {', '.join(map(str, expected))}] for the plan and the U-Net"]
    reasons = []
    if len(z) not in (1, pictures):
        reasons.append(f"z has {len(z)} pictures, {pictures} are drawn at once")
    if (z.dtype, z.device) != (unet.dtype, unet.device):
        reasons.append(f"z is {z.dtype} on {z.device}, the U-Net {unet.dtype} on {unet.device}: move z there")
    return reasons
