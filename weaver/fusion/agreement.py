"""Whether a pipeline under a plan is called with what the plan is for: prompts, steps and time ids."""

from __future__ import annotations

import torch

from weaver.errors import WeaverError
from weaver.fusion.plan import FusionPlan
from weaver.fusion.rows import FUSED, NEGATED

__all__ = ["check_prompts", "check_time_ids", "check_timesteps"]

# Encodings of one prompt differ between batches and devices by rounding: in each position by a few units of its dtype,
# and by less than 1e-3 in float32 with TF32. Another word changes its position by tens of percents.
_SAME_TEXT = 1e-3
_SAME_TEXT_UNITS = 16


def check_prompts(plan: FusionPlan, contexts: list[int], text: torch.Tensor, pooled: torch.Tensor | None) -> None:
    """Raise `WeaverError` unless each row of text [B, L, C] and of pooled [B, P] is the plan's for its context.

    `contexts` are the first ones of the rows, as `FusionPlan.leads` gives them.
    """
    same = _same(plan.text[contexts], text)
    if same and plan.pooled is not None:
        same = pooled is not None and _same(plan.pooled[contexts], pooled)
    if not same:
        raise WeaverError(
            f"The pipeline was called with other prompts than the plan's {_prompts(plan, FUSED)} and negative "
            f"{_prompts(plan, NEGATED)}: pass these, or **plan.pipeline_arguments()"
        )


def check_timesteps(plan: FusionPlan, timesteps: torch.Tensor) -> None:
    """Raise `WeaverError` unless the schedule is the features', where there are some."""
    features = plan.features
    if features is not None and features.timesteps.tolist() != timesteps.tolist():
        raise WeaverError(
            f"The template's features are for {features.steps} DDIM steps from {int(features.timesteps[0])}, the "
            f"run has {len(timesteps)} from {int(timesteps[0])}: use ddim_scheduler(pipe.scheduler) and "
            f"num_inference_steps={features.steps}"
        )


def check_time_ids(plan: FusionPlan, time_ids: torch.Tensor) -> None:
    """Raise `WeaverError` unless all rows of time ids [B, 6] are one, and the features' where there are some."""
    time_ids = time_ids.to(plan.time_ids)
    if (time_ids != time_ids[:1]).any():
        raise WeaverError(
            "The pipeline was called with other sizes or another crop for the negative prompt, but all rows of a "
            "fusion have the same time ids: leave out negative_original_size, negative_target_size and "
            "negative_crops_coords_top_left"
        )
    if plan.features is not None and (time_ids[:1] != plan.time_ids).any():
        own, called = ([round(x) for x in ids[0].tolist()] for ids in (plan.time_ids, time_ids))
        raise WeaverError(
            f"The template was inverted with time ids {own} (original_size, crops_coords_top_left, target_size), the "
            f"pipeline was called with {called}: pass the same, or **plan.pipeline_arguments(), or invert it with these"
        )


def _prompts(plan: FusionPlan, kind: int) -> str:
    """The prompt of every variant's rows of a kind, as an error tells it."""
    prompts = [plan.prompts[lead] for lead in plan.leads([(kind, variant) for variant in range(plan.variants)])]
    return repr(prompts[0] if len(prompts) == 1 else prompts)


def _same(own: torch.Tensor, called: torch.Tensor) -> bool:
    """Whether embeddings are one but for rounding, along their last axis."""
    if own.shape != called.shape:
        return False
    dtypes, kind = [own.dtype, called.dtype], called.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        dtypes.append(torch.get_autocast_dtype(kind))  # in which the called one was computed
    unit = max(torch.finfo(dtype).eps for dtype in dtypes)
    own = own.to(called)
    allowed = max(_SAME_TEXT, _SAME_TEXT_UNITS * unit) * own.float().norm(dim=-1)
    return bool(((own - called).float().norm(dim=-1) <= allowed).all())  # zeros, as SDXL's for no prompt, stay zeros
