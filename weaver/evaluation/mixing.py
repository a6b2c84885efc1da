"""The score mix that the paper's fusion replaces: a U-Net pass for each concept, outputs mixed by the masks.

`eps_fuse = sum_i eps_i(z, t, p_+i) M_i + eps_bg(z, t, p_+bg) M_bg` (Concept Weaver, section 3.5). Features are injected
into every pass as they are in fusion, so that the two differ in what is mixed alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from weaver.features import Features
from weaver.fusion.attach import attach
from weaver.fusion.contexts import ConceptUse
from weaver.fusion.ddim import DDIMSteps
from weaver.fusion.plan import FusionPlan
from weaver.fusion.variants import stack_plans
from weaver.masks.pyramid import mask_pyramid
from weaver.schedule import ddim_scheduler

__all__ = ["sample_score_mix"]


@torch.no_grad()
def sample_score_mix(
    pipe,
    uses: Sequence[ConceptUse],
    masks: torch.Tensor,
    features: Features,
    *,
    prompt: str,
    background: ConceptUse | None = None,
    guidance: float,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Draw by the score mix, with classifier-free guidance by DDIM.

    Parameters
    ----------
    pipe : a `StableDiffusionPipeline`, only read
    uses : N concepts, each with all that it changes everywhere in its own pass
    masks : [N + 1, height, width] that sum to one, the background last
    features : the template's, whose noise is started from
    prompt : p_base, which the background's pass reads where it is no concept
    guidance, eta : omega, more than 1, and how much noise each step draws anew from `generator`

    Returns latents [1, C, h, w].
    """
    common = {"prompt": prompt, "features": features, "guidance": guidance}
    everywhere = torch.ones(1, *masks.shape[1:])
    plans = [FusionPlan.build(pipe, [use], everywhere, **common) for use in uses]
    plan = stack_plans([*plans, FusionPlan.build(pipe, background=background, **common)])
    rows = [("negative", 0), *(("fused", variant) for variant in range(plan.variants))]
    weights = mask_pyramid(masks, [plan.size])[plan.size][:, None].to(features.z_T)  # [N + 1, 1, h, w]
    scheduler, z = ddim_scheduler(pipe.scheduler), features.z_T
    scheduler.set_timesteps(plan.steps, device=z.device)
    steps, timesteps = DDIMSteps(scheduler, z.device, eta), scheduler.timesteps
    with attach(pipe.unet, plan, rows=rows) as state:
        for number, t in enumerate(timesteps):
            state.set_step(number, timesteps)
            text = plan.text[:1].expand(len(rows), -1, -1)  # attention reads the plan's contexts in its place
            output = pipe.unet(z.expand(len(rows), -1, -1, -1), t, encoder_hidden_states=text).sample
            mixed = (weights * output[1:]).sum(0, keepdim=True)
            output = output[:1] + guidance * (mixed - output[:1])
            noise = torch.randn(z.shape, generator=generator, dtype=z.dtype).to(z.device) if eta else None
            z = steps(output, z, steps.table[number], noise)
    return z
