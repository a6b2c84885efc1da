"""Fusion as a function, for people with a loop of their own."""

from __future__ import annotations

from collections.abc import Callable

import torch

from weaver.conditioning import unet_arguments
from weaver.errors import raise_if
from weaver.fusion.attach import attach
from weaver.fusion.inputs import eta_reasons
from weaver.fusion.plan import FusionPlan
from weaver.fusion.rows import KINDS, picture_rows

__all__ = ["sample_fusion"]


@torch.no_grad()
def sample_fusion(
    unet,
    z: torch.Tensor,
    scheduler,
    plan: FusionPlan,
    *,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """DDIM (arXiv 2010.02502) over the fused U-Net with the plan's classifier-free guidance; deterministic at `eta` 0.

    Gives the numbers that the stock pipeline gives under `attach`.

    Parameters
    ----------
    unet : the pipeline's
    z : [n, C, h, w], the noise to start from: the template's z_T, or any, one picture each; for a plan of V variants
        one noise for all, or as many of each, the first variant's first
    scheduler : the pipeline's; with features `ddim_scheduler(pipe.scheduler)`
    eta : how much of each step's noise is drawn anew, 0 to 1 (equation 16 there); the paper's is 0
    generator : of that noise
    progress : called after each step with (done, steps)

    Returns latents [n, C, h, w]. Raises `WeaverError` for an `eta` outside of 0..1.
    """
    raise_if(eta_reasons(eta), "Cannot draw the fusion")
    guided = plan.guidance > 1
    z = z.expand(plan.variants, -1, -1, -1) if len(z) == 1 else z
    rows = picture_rows(len(z), plan.variants, guided)
    leads = plan.leads(rows)
    scheduler.set_timesteps(plan.steps, device=z.device)
    z = z * scheduler.init_noise_sigma
    text = plan.text[:1].expand(len(rows), -1, -1)  # the U-Net asks for one; attention reads the plan's
    added = (None, None) if plan.pooled is None else (plan.pooled[leads], plan.time_ids.expand(len(rows), -1))
    arguments, noise = unet_arguments(text, *added), {"eta": eta, "generator": generator} if eta else {}
    with attach(unet, plan, rows=[(KINDS[kind], variant) for kind, variant in rows]) as state:
        for step, t in enumerate(scheduler.timesteps):
            state.set_step(step, scheduler.timesteps)
            batch = scheduler.scale_model_input(torch.cat([z, z]) if guided else z, t)
            output = unet(batch, t, **arguments, return_dict=False)[0]
            if guided:
                negative, fused = output.chunk(2)
                output = negative + plan.guidance * (fused - negative)
            z = scheduler.step(output, t, z, **noise, return_dict=False)[0]
            if progress:
                progress(step + 1, len(scheduler.timesteps))
    return z
