"""The optimisation by which a concept is learned: optimisers, learning rates and steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import torch
from torch.optim.lr_scheduler import LambdaLR

from weaver.concepts.checkpoints import Checkpoint
from weaver.concepts.concept import ConceptError
from weaver.concepts.examples import Examples
from weaver.concepts.learned import Learned
from weaver.concepts.muon import Muon
from weaver.concepts.objective import Objective
from weaver.concepts.settings import TrainSettings
from weaver.concepts.training_state import added
from weaver.concepts.woven import WovenExamples, woven
from weaver.defaults import defaults_for

__all__ = ["Step", "optimise"]


class Step(NamedTuple):
    """One step of a training.

    Parameters
    ----------
    done : how many steps were made, with this one
    loss, own_loss, prior_loss : its loss, and what that is the weighted sum of: the loss on the concept's pictures and
        on others, None without such
    learning_rate : of the changes of weights
    """

    done: int
    loss: float
    own_loss: float
    prior_loss: float | None
    learning_rate: float


def optimise(
    pipe,
    learned: Learned,
    settings: TrainSettings,
    own: Examples,
    other: Examples | None,
    scenes: WovenExamples | None,
    report: Callable[[int, float], None],
    checkpoint: Checkpoint | None = None,
    observe: Callable[[Step], None] | None = None,
) -> None:
    """Learn from pictures of the concept, and of `other` things, and from woven `scenes`, where there are some.

    Begins where `checkpoint` is. `observe` is called after every step and before its checkpoint; it may draw with the
    U-Net, as it is learned. `report` is told how many steps are done, and the loss of the last.

    Raises `ConceptError` if it diverges.
    """
    generator = torch.Generator("cpu").manual_seed(settings.seed)
    optimisers = _optimisers(learned, settings)
    schedules = {key: LambdaLR(one, lambda step: _rate(step, settings)) for key, one in optimisers.items()}
    # Gradients of float16 activations vanish below 6e-8 unless the loss is scaled up.
    scaler = torch.amp.GradScaler(pipe._execution_device.type, enabled=pipe.unet.dtype == torch.float16)
    scenes = scenes if settings.woven_batch else None
    with ExitStack() as stack:
        forward = stack.enter_context(woven(pipe.unet, scenes, defaults_for(pipe).sites)) if scenes else None
        stack.enter_context(added(pipe.unet, learned.deltas, forward))
        objective = Objective(pipe, learned.vectors, settings, own, other, scenes, forward)
        state = {f"optimiser of {key}": one for key, one in optimisers.items()}
        state |= {f"schedule of {key}": one for key, one in schedules.items()} | {"scaler": scaler}
        begun = checkpoint.begin(learned.tensors(), generator, **state) if checkpoint else 0
        for step in range(begun, settings.steps):
            for optimiser in optimisers.values():
                optimiser.zero_grad(set_to_none=True)
            losses = []
            for batch in objective.draw(generator):
                found = objective.loss(batch)
                losses.append([None if part is None else part.item() for part in found])
                if not math.isfinite(losses[-1][0]):
                    raise ConceptError(
                        f"training diverged at step {step + 1} of {settings.steps}: lower the learning rate"
                    )
                scaler.scale(found.total).backward()
            told = [None if parts[0] is None else sum(parts) for parts in zip(*losses, strict=True)]
            rate = optimisers["weights"].param_groups[0]["lr"]
            scale = scaler.get_scale()
            for optimiser in optimisers.values():
                scaler.step(optimiser)
            scaler.update()
            if scaler.get_scale() >= scale:  # it falls where gradients overflowed and the step was left out
                for schedule in schedules.values():
                    schedule.step()
            if forward:
                forward.rest()
            if observe:
                observe(Step(step + 1, *told, rate))
            if checkpoint:
                checkpoint.after(step + 1)
            report(step + 1, told[0])


def _optimisers(learned: Learned, settings: TrainSettings) -> dict[str, torch.optim.Optimizer]:
    """One of the changes of weights and one of the token's vectors, neither of which decays what it learns."""
    adamw = partial(torch.optim.AdamW, betas=(0.9, 0.99), weight_decay=0)
    rate = settings.learning_rate
    return {
        "weights": {"adamw": adamw, "muon": Muon}[settings.optimiser](learned.weights(), lr=rate),
        "vectors": adamw(list(learned.vectors.values()), lr=settings.token_learning_rate or rate),
    }


def _rate(step: int, settings: TrainSettings) -> float:
    """Part of the learning rates in use at `step`: a linear rise, then a linear fall to `final_rate`."""
    fall = 1 - (1 - settings.final_rate) * step / settings.steps
    return min(1.0, (step + 1) / (settings.warmup + 1)) * fall
