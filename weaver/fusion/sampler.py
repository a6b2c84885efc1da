"""Fusion as a function, for people with a loop of their own; and as an object that draws one fusion after another."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack

import torch
from diffusers.utils.torch_utils import randn_tensor

from weaver.background import KeptBackground
from weaver.conditioning import unet_arguments
from weaver.errors import WeaverError, raise_if
from weaver.fusion.attach import attach_reasons, installed, keys_reasons
from weaver.fusion.checks import (
    count_reasons,
    noise_reasons,
    plan_reasons,
    schedule_reasons,
)
from weaver.fusion.ddim import DDIMSteps
from weaver.fusion.inputs import eta_reasons
from weaver.fusion.plan import FusionPlan
from weaver.fusion.rows import KINDS, picture_rows
from weaver.fusion.state import FusionState
from weaver.graphs import CUDAGraphs, graph_reasons, graphs_for, lasting

__all__ = ["FusionSampler", "sample_fusion", "sampler_for"]


@torch.no_grad()
def sample_fusion(
    unet,
    z: torch.Tensor,
    scheduler,
    plan: FusionPlan,
    *,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
    graphs: CUDAGraphs | bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """Sample over the fused U-Net with the plan's classifier-free guidance, by DDIM (arXiv 2010.02502) as a rule.

    Gives the numbers that the stock pipeline gives under `attach`, with any scheduler of its; of 16 bits, DDIM's steps
    are counted in 32.

    Parameters
    ----------
    unet : the pipeline's
    z : [n, C, h, w], the noise to start from: the template's z_T, or any, one picture each; for a plan of V variants
        one noise for all, or as many of each, the first variant's first
    scheduler : the pipeline's; with features `ddim_scheduler(pipe.scheduler)`
    eta : how much of each step's noise is drawn anew, 0 to 1 (equation 16 there); the paper's is 0
    generator : of that noise, and of what other schedulers draw
    graphs : capture the steps in CUDA graphs and replay them, with DDIM: worth it where a step is shorter on the GPU
        than its launches on the host, and more than a dozen are drawn
    progress : called after each step with (done, steps)

    Returns latents [n, C, h, w]. Raises `WeaverError` for an `eta` outside of 0..1 or that the scheduler does not take,
    and for a z of another shape, dtype or device than the U-Net's and the plan's.
    """
    pictures = len(z) if isinstance(z, torch.Tensor) and z.ndim and len(z) > 1 else None
    with FusionSampler(unet, scheduler, plan, pictures=pictures, eta=eta, graphs=graphs) as sampler:
        return sampler(z, generator=generator, progress=progress)


def sampler_for(unet, scheduler, plan: FusionPlan, eta: float, graphs: CUDAGraphs | bool) -> FusionSampler:
    """The sampler that these graphs keep from the call before, if the plan can take its turn there; else a new one,
    which they keep in its place."""
    if not isinstance(graphs, CUDAGraphs):
        return FusionSampler(unet, scheduler, plan, eta=eta, graphs=graphs)
    kept: FusionSampler | None = graphs.sampler
    if kept is not None and kept.draws_with(unet, scheduler, eta):
        try:
            kept.take(plan)
            return kept
        except WeaverError:  # of another shape
            pass
    graphs.sampler = kept = None  # its memory is free for the new one's
    graphs.sampler = FusionSampler(unet, scheduler, plan, eta=eta, graphs=graphs.another())
    return graphs.sampler


class FusionSampler:
    """Draws fusions of one shape again and again; only the first one is prepared for.

    Within its `with` block the U-Net is attached to; with graphs the block may be entered again. Plans of the same
    size, steps, lengths of text, variants and injected sites take turns without anything being made anew: other
    concepts, masks, prompts, strengths, windows, lambda, omega, templates or seeds, and as many concepts as there is
    room for.

    Parameters
    ----------
    unet, scheduler, plan, eta : as `sample_fusion` takes them
    pictures : n, how many are drawn at once; None is one of each variant
    capacity : the most concepts, the background among them, and the most negative prompts of their own that later plans
        have in each variant; None is what `plan` has
    graphs : capture the steps in CUDA graphs, one for each set of injected sites: the host then only copies features
        and weights between them. A `weaver.graphs.CUDAGraphs`, which may also compile, is cleared first

    Where a concept changes more than keys and values, only plans that have such concepts in the same places take turns,
    which change the same modules; with graphs only those whose LoRAs have the same ranks. Raises `WeaverError` where
    graphs can't be had, and for numbers that can't be.
    """

    def __init__(
        self,
        unet,
        scheduler,
        plan: FusionPlan,
        *,
        pictures: int | None = None,
        eta: float = 0.0,
        capacity: int | None = None,
        graphs: CUDAGraphs | bool = False,
    ):
        raise_if(plan_reasons(plan), "Cannot draw the fusion")
        reasons = eta_reasons(eta) + count_reasons(pictures, capacity)
        reasons += schedule_reasons(scheduler, eta, graphs) + graph_reasons(unet, graphs)
        raise_if(reasons, "Cannot draw the fusion")
        self._unet, self._plan, self._capacity = unet, plan, capacity
        self._pictures = plan.variants if pictures is None else pictures
        device = unet.device
        scheduler.set_timesteps(plan.steps, device=device)
        self._scheduler, self._timesteps, self._eta = scheduler, scheduler.timesteps, eta
        self._ddim = DDIMSteps(scheduler, device, eta) if DDIMSteps.are_those_of(scheduler) else None
        self._draws = "generator" in inspect.signature(scheduler.step).parameters
        self._guided = plan.guidance > 1
        self._rows = picture_rows(self._pictures, plan.variants, self._guided)
        self._graphs = graphs_for(graphs)
        self._state: FusionState | None = None
        self._inside, self._undo = False, ExitStack()

    def __enter__(self) -> FusionSampler:
        rows = [(KINDS[kind], variant) for kind, variant in self._rows]
        raise_if(attach_reasons(self._unet, None, self._plan, rows), "Cannot draw the fusion")
        if self._graphs is not None:
            self._graphs.follow(self._unet)
        if self._state is None:
            state = FusionState(self._plan, rows=rows)
            state.lead(self._capacity, held=self._graphs is not None)
            self._hold(self._plan)
            self._forward = self._unet if self._graphs is None else self._graphs.best(self._unet.forward)
            self._state = state
        self._undo.enter_context(installed(self._unet, self._state))
        self._inside = True
        return self

    def __exit__(self, *error) -> None:
        self._inside = False
        self._undo.close()
        if self._graphs is None:  # which read what the state holds
            self._state = None

    def draws_with(self, unet, scheduler, eta: float) -> bool:
        """Whether it has been entered before, and draws with this U-Net, steps of such a scheduler and this `eta`."""
        same = self._unet is unet and self._eta == eta and type(self._scheduler) is type(scheduler)
        return same and self._state is not None and self._scheduler.config == scheduler.config

    def take(self, plan: FusionPlan) -> None:
        """Make a plan the one that is drawn from now on; also before the block is entered again.

        Raises `WeaverError` before the block was entered, and for a plan of another shape or another U-Net, which
        leaves the one before in its place.
        """
        if self._state is None:
            raise WeaverError("The sampler takes another plan within its block, with graphs after it too: enter it")
        raise_if(plan_reasons(plan), "Cannot draw the fusion")
        reasons = [] if (plan.guidance > 1) == self._guided else ["one has a negative row, the other has none"]
        if self._graphs is not None and (plan.own_projections or self._plan.own_projections):
            reasons.append("a concept changes to_q or to_out, which graphs hold: take a sampler for each such plan")
        reasons += keys_reasons(self._unet, plan) or self._state.load_reasons(plan)
        raise_if(reasons, "Cannot draw this plan with the sampler of another")
        self._state.load(plan)
        self._plan = plan
        self._hold(plan)

    @torch.no_grad()
    def __call__(
        self,
        z: torch.Tensor,
        plan: FusionPlan | None = None,
        *,
        generator: torch.Generator | None = None,
        background: KeptBackground | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> torch.Tensor:
        """Draw one fusion from the noise z, of the plan or of the one before; as `sample_fusion` says.

        `background` keeps the template's after every step.

        Raises `WeaverError` outside of the `with` block, and for a plan of another shape or another U-Net, which
        leaves the one before in its place.
        """
        if not self._inside:
            raise WeaverError("The sampler draws within its `with` block only: with FusionSampler(...) as sampler: ...")
        raise_if(noise_reasons(z, self._unet, self._plan, self._pictures), "Cannot draw from this z")
        if plan is not None and plan is not self._plan:
            self.take(plan)
        z = z.expand(self._pictures, -1, -1, -1) if len(z) == 1 else z
        self._z, self._generator = self._held("_z", z * self._scheduler.init_noise_sigma), generator
        self._scheduler.set_timesteps(self._plan.steps, device=z.device)  # some count their steps
        noises = self._fresh(z, generator)
        for step in range(len(self._timesteps)):
            kind = self._state.settle(self._unet, step, self._timesteps)
            self._t = self._held("_t", self._timesteps[step])
            if self._ddim is not None:
                self._numbers = self._held("_numbers", self._ddim.table[step])
                self._noise = self._held("_noise", noises[step]) if self._eta else None
            if self._graphs is None:
                self._step()
            else:
                self._graphs.run(kind, self._step, written=(self._z,))
            if background is not None:
                self._z = self._held("_z", background.put_into(self._z, step))
            if progress:
                progress(step + 1, len(self._timesteps))
        return self._z if self._graphs is None else self._z.clone()

    def _fresh(self, z: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor | None:
        """The noise [steps, n, C, h, w] that DDIM adds, drawn as in pipelines and brought to the device at once."""
        if self._ddim is None or not self._eta:
            return None
        place = z.device if generator is None else generator.device
        drawn = [randn_tensor(z.shape, generator=generator, device=place, dtype=z.dtype) for _ in self._timesteps]
        return torch.stack(drawn).to(z.device)

    def _step(self) -> None:
        """One step of all pictures, from tensors to tensors."""
        z, guided = self._z, self._guided
        batch = torch.cat([z, z]) if guided else z
        if self._ddim is None:
            batch = self._scheduler.scale_model_input(batch, self._t)
        output = self._forward(batch, self._t, **self._arguments, return_dict=False)[0]
        if guided:
            negative, fused = output.chunk(2)
            output = negative + self._omega * (fused - negative)
        if self._ddim is None:
            noise = {"eta": self._eta} if self._eta else {}
            noise |= {"generator": self._generator} if self._draws else {}
            following = self._scheduler.step(output, self._t, z, **noise, return_dict=False)[0]
        else:
            following = self._ddim(output, z, self._numbers, self._noise)
        if self._graphs is None:
            self._z = following
        else:
            z.copy_(following)

    def _hold(self, plan: FusionPlan) -> None:
        """What the U-Net reads besides latents and time; attention reads the plan's contexts in the place of text."""
        text = self._held("_text", plan.text[:1].expand(len(self._rows), -1, -1))
        added = (None, None)
        if plan.pooled is not None:
            pooled = self._held("_pooled", plan.pooled[plan.leads(self._rows)])
            added = pooled, self._held("_time_ids", plan.time_ids.expand(len(self._rows), -1))
        self._text, (self._pooled, self._time_ids) = text, added
        self._omega = self._held("_omega", torch.tensor(plan.guidance, device=plan.text.device))
        self._arguments = unet_arguments(text, *added)

    def _held(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """The value, for graphs in a tensor that stays where it is."""
        if self._graphs is None:
            return value
        known = getattr(self, name, None)
        return (lasting(value) if known is None else known).copy_(value)
