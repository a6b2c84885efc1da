"""Several fusions of one template as one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.nn.functional import pad

from weaver.errors import raise_if, told
from weaver.fusion.plan import FusionPlan
from weaver.fusion.regional import RegionalChanges
from weaver.fusion.routes import OwnProjections
from weaver_kernels import AdapterStack, ContextKV

__all__ = ["stack_plans"]

_SHARED = ("steps", "guidance", "size", "sizes")


def stack_plans(plans: Sequence[FusionPlan]) -> FusionPlan:
    """One plan of V variants: other concepts, prompts, masks or lambda on one template, drawn in one batch.

    Each variant's rows attend to its own contexts. What is injected is the same for all, and so are the attention maps
    made of it: they are computed once.

    Parameters
    ----------
    plans : V plans of one model, with the same size, steps, guidance and features, or all from plain noise

    Returns a plan for `sample_fusion`, which draws as many pictures, and for `attach`, under which a pipeline is called
    with as many prompts (`FusionPlan.pipeline_arguments`). Raises `WeaverError` with every reason why they don't go
    together.
    """
    raise_if(_kind_reasons(plans), "Cannot stack the plans")
    raise_if(_reasons(plans), "Cannot stack the plans")
    first = plans[0]
    starts = [sum(len(plan.text) for plan in plans[:i]) for i in range(len(plans))]
    longest = max(plan.index.shape[-1] for plan in plans)
    index = [
        torch.cat([plan.index, plan.index[..., :1].expand(-1, -1, longest - plan.index.shape[-1])], -1) + start
        for plan, start in zip(plans, starts, strict=True)
    ]
    phases = tuple(sorted({phase for plan in plans for phase in plan.phases}))
    weights = {
        (phase, size): torch.cat([_padded(plan.weights[plan.phase_at(start), size], longest) for plan in plans], 1)
        for phase, start in enumerate(phases)
        for size in set(first.sizes.values())
    }
    regions = {
        (phase, size): torch.cat([_region(plan, start, size, longest) for plan in plans], 1)
        for phase, start in enumerate(phases)
        for size in {change.size for plan in plans for change in plan.regional.values()}
    }
    return replace(
        first,
        prompts=tuple(prompt for plan in plans for prompt in plan.prompts),
        text=torch.cat([plan.text for plan in plans]),
        keys_values={path: _joined([plan.keys_values[path] for plan in plans]) for path in first.keys_values},
        own_projections={path: _merged(plans, starts, path) for path in first.keys_values if _has_own(plans, path)},
        regional={
            path: _stacked(plans, path) for path in dict.fromkeys(path for plan in plans for path in plan.regional)
        },
        same_as=torch.cat([plan.same_as + start for plan, start in zip(plans, starts, strict=True)]),
        index=torch.cat(index, 1),
        phases=phases,
        weights=weights,
        regions=regions,
        pooled=None if first.pooled is None else torch.cat([plan.pooled for plan in plans]),
    )


def _padded(weights: torch.Tensor, contexts: int) -> torch.Tensor:
    """Weights [2, V, S, T] with contexts of weight zero added."""
    return pad(weights, (0, 0, 0, contexts - weights.shape[-2]))


def _joined(parts: Sequence[ContextKV]) -> ContextKV:
    return ContextKV(torch.cat([part.keys for part in parts]), torch.cat([part.values for part in parts]))


def _region(plan: FusionPlan, start: float, size: tuple[int, int], contexts: int) -> torch.Tensor:
    """How much of a plan's changes is added to maps of a size, [2, 1, S, T]; zeros where it changes none of them."""
    found = plan.regions.get((plan.phase_at(start), size))
    if found is None:
        kinds, variants, own = plan.index.shape
        found = next(iter(plan.weights.values())).new_zeros(kinds, variants, own, size[0] * size[1])
    return _padded(found, contexts)


def _stacked(plans: Sequence[FusionPlan], path: str) -> RegionalChanges:
    """What the contexts of all plans change of one module; those of a plan that does not change it have rank 0."""
    found = [plan.regional.get(path) for plan in plans]
    size = next(change.size for change in found if change is not None)
    stacks = [len(plan.text) if change is None else change.stack for plan, change in zip(plans, found, strict=True)]
    return RegionalChanges(AdapterStack.joined(stacks), size)


def _has_own(plans: Sequence[FusionPlan], path: str) -> bool:
    return any(path in plan.own_projections for plan in plans)


def _merged(plans: Sequence[FusionPlan], starts: Sequence[int], path: str) -> OwnProjections:
    moved = [
        plan.own_projections[path].moved(start)
        for plan, start in zip(plans, starts, strict=True)
        if path in plan.own_projections
    ]
    kinds = zip(*(own.parts for own in moved), strict=True)
    return OwnProjections(*({s: x for part in kind for s, x in part.items()} for kind in kinds))


def _kind_reasons(plans) -> list[str]:
    if not isinstance(plans, Sequence):
        return [f"plans is a {type(plans).__name__}, expected a list of plans"]
    return [
        f"plan {number} is {told(plan)}, expected what `FusionPlan.build` gives"
        for number, plan in enumerate(plans)
        if not isinstance(plan, FusionPlan)
    ]


def _reasons(plans: Sequence[FusionPlan]) -> list[str]:
    if not plans:
        return ["there are none"]
    first, reasons = plans[0], []
    for number, plan in enumerate(plans[1:], start=1):
        where = f"plan {number}"
        reasons += [
            f"{where} has {name} {_told(getattr(plan, name))}, the first {_told(getattr(first, name))}"
            for name in _SHARED
            if getattr(plan, name) != getattr(first, name)
        ]
        if plan.features is not first.features:
            reasons.append(f"{where} has other features than the first: build both with the same `Features`")
        if plan.text.shape[1:] != first.text.shape[1:] or (plan.pooled is None) != (first.pooled is None):
            of, own = tuple(plan.text.shape[1:]), tuple(first.text.shape[1:])
            reasons.append(f"{where} has texts of shape {of}, the first {own}: use one model and prompts of one length")
        elif (plan.text.dtype, plan.text.device) != (first.text.dtype, first.text.device):
            own = f"{first.text.dtype} on {first.text.device}"
            reasons.append(f"{where} is in {plan.text.dtype} on {plan.text.device}, the first in {own}")
        if plan.time_ids is not None and first.time_ids is not None and not torch.equal(plan.time_ids, first.time_ids):
            reasons.append(f"{where} has other time ids than the first")
    return reasons


def _told(value) -> str:
    return f"of {len(value)} layers" if hasattr(value, "values") else repr(value)
