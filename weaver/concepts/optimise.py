"""The optimisation by which a concept is learned: optimisers, learning rates and steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch.optim.lr_scheduler import LambdaLR

from weaver.concepts.accelerated import accelerated
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
    scenes = scenes if settings.woven_batch else None
    with ExitStack() as stack:
        accelerator = stack.enter_context(accelerated(pipe, settings.accumulate))
        forward = stack.enter_context(woven(pipe.unet, scenes, defaults_for(pipe).woven_sites)) if scenes else None
        stack.enter_context(added(pipe.unet, learned.deltas, forward))
        objective = Objective(pipe, learned.vectors, settings, own, other, scenes, forward)
        optimiser = _optimiser(learned, settings)
        schedule = LambdaLR(optimiser, lambda step: _rate(step, settings))
        optimiser, schedule = accelerator.prepare_optimizer(optimiser), accelerator.prepare_scheduler(schedule)
        stack.callback(optimiser.state.clear)  # moments, which would live on in cycles of references
        state = {"optimiser": optimiser, "schedule": schedule, "scaler": accelerator.scaler}
        begun = checkpoint.begin(learned.tensors(), generator, **state) if checkpoint else 0
        for step in range(begun, settings.steps):
            losses, rate = [], schedule.get_last_lr()[0]
            for batch in objective.draw(generator):
                with accelerator.accumulate():
                    found = objective.loss(batch)
                    losses.append([None if part is None else part.item() for part in found])
                    if not math.isfinite(losses[-1][0]):
                        raise ConceptError(
                            f"training diverged at step {step + 1} of {settings.steps}: lower the learning rate"
                        )
                    accelerator.backward(found.total)
                    # After the last batch of a step, and not where a gradient overflowed in half precision.
                    optimiser.step()
                    schedule.step()
                    optimiser.zero_grad()
            told = [None if parts[0] is None else sum(parts) / len(parts) for parts in zip(*losses, strict=True)]
            if forward:
                forward.rest()
            if observe:
                observe(Step(step + 1, *told, rate))
            if checkpoint:
                checkpoint.after(step + 1)
            report(step + 1, told[0])


def _optimiser(learned: Learned, settings: TrainSettings) -> torch.optim.Optimizer:
    """Of the changes of weights and of the token's vectors, neither of which it decays."""
    rate, adamw = settings.learning_rate, {"betas": (0.9, 0.99), "weight_decay": 0.0}
    weights = {"params": learned.weights()}
    vectors = {"params": list(learned.vectors.values()), "lr": settings.token_learning_rate or rate}
    if settings.optimiser == "muon":
        return Muon([weights, vectors | {"adamw": True}], lr=rate, **adamw)
    return torch.optim.AdamW([weights, vectors], lr=rate, **adamw)


def _rate(step: int, settings: TrainSettings) -> float:
    """Part of the learning rates in use at `step`: a linear rise, then a linear fall to `final_rate`."""
    fall = 1 - (1 - settings.final_rate) * step / settings.steps
    return min(1.0, (step + 1) / (settings.warmup + 1)) * fall
