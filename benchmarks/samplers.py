"""Ways to draw a picture that a fusion is compared with, step by step, as they are called and captured in a graph.

Each keeps a few rows of latents that DDIM moves on, and predicts what it moves them by. Coefficients are tables on the
device, so that a step can be captured: nothing in it depends on a number of the host.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable

import torch

from benchmarks.cases import WORDS, Case
from weaver.conditioning import unet_arguments
from weaver.fusion import FusionPlan, FusionSampler
from weaver.fusion.contexts import BASE, NEGATIVE
from weaver.graphs import CUDAGraphs
from weaver.schedule import ddim_scheduler

__all__ = ["Captured", "Guided", "Ours", "Sampler", "twin"]

Progress = Callable[[int, int], None]
MOST = len(WORDS) + 1  # concepts, and the background


class Ours:
    """`FusionSampler` with the case's plan or another, on a U-Net of its own that stays attached to.

    `graphs` capture its steps on a GPU, and may compile the U-Net before, once for any number of concepts.
    """

    def __init__(self, case: Case, plan: FusionPlan | None = None, *, graphs: CUDAGraphs | bool = False):
        self.case, self.unet = case, twin(case.pipe.unet)
        scheduler = ddim_scheduler(case.pipe.scheduler)
        sampler = FusionSampler(self.unet, scheduler, plan or case.plan, graphs=graphs, capacity=MOST)
        self._sampler = sampler.__enter__()

    def __call__(self, progress: Progress | None = None, plan: FusionPlan | None = None) -> torch.Tensor:
        """Latents [n, C, h, w] of a plan, None for the one before; `progress` is called after each step."""
        return self._sampler(self.case.z, plan, progress=progress)


class Sampler:
    """Deterministic DDIM over rows of latents [n, C, h, w] that all start from the template's noise; the last is drawn.

    Forms say in `predict` what the U-Net makes of the rows, and in `phase` which steps do the same work.
    """

    n_latents = 1

    def __init__(self, case: Case):
        self.case, self.plan = case, case.plan
        scheduler = ddim_scheduler(case.pipe.scheduler)
        scheduler.set_timesteps(case.plan.steps, device=case.z.device)
        self.timesteps = scheduler.timesteps
        self.table = ddim_table(scheduler).to(case.z.device)  # [2, steps]
        self.index = torch.zeros(1, dtype=torch.long, device=case.z.device)
        self.latents = torch.empty_like(case.z.expand(self.n_latents, -1, -1, -1)).contiguous()

    def phase(self, step: int) -> Hashable:
        """Steps of one phase differ in their numbers alone."""
        return None

    def predict(self, latents: torch.Tensor, timestep: torch.Tensor, phase: Hashable) -> torch.Tensor:
        """The output [n, C, h, w] that moves the latents on, guidance included."""
        raise NotImplementedError

    def start(self) -> None:
        """Go back to the template's noise."""
        self.latents.copy_(self.case.z.expand_as(self.latents))
        self.index.zero_()

    def step(self, phase: Hashable) -> None:
        """One step, in place."""
        timestep = self.timesteps.index_select(0, self.index)
        keep, add = self.table.index_select(1, self.index)
        self.latents.copy_(keep * self.latents + add * self.predict(self.latents, timestep, phase))
        self.index.add_(1)

    @torch.no_grad()
    def __call__(self, progress: Progress | None = None) -> torch.Tensor:
        """Latents [1, C, h, w] at the end; `progress` is called after each step."""
        self.start()
        for step in range(self.plan.steps):
            self.step(self.phase(step))
            if progress:
                progress(step + 1, self.plan.steps)
        return self.latents[-1:].clone()

    def arguments(self, contexts: list[int]) -> dict:
        """What the U-Net takes besides latents and time, for rows of these contexts, negative or base."""
        plan = self.plan
        added = (None, None) if plan.pooled is None else (plan.pooled[contexts], plan.time_ids.expand(len(contexts), 6))
        return unet_arguments(plan.text[contexts], *added)


class Guided(Sampler):
    """The same model without concepts: classifier-free guidance of the base prompt, the library's own attention."""

    def __init__(self, case: Case, *, compiled: bool = False):
        super().__init__(case)
        self.unet = twin(case.pipe.unet)
        if compiled:
            self.unet = torch.compile(self.unet, dynamic=False)
        self.rows = self.arguments([NEGATIVE, BASE])

    def predict(self, latents, timestep, phase):
        output = self.unet(latents.expand(2, -1, -1, -1), timestep, **self.rows, return_dict=False)[0]
        return guided(*output.chunk(2), self.plan.guidance)


class Captured:
    """A sampler whose steps are replayed: one CUDA graph for each phase."""

    @torch.no_grad()
    def __init__(self, sampler: Sampler):
        self.sampler, self.graphs = sampler, {}
        phases = dict.fromkeys(map(sampler.phase, range(sampler.plan.steps)))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for phase in phases:  # loads and compiles what a capture can't
                sampler.start()
                for _ in range(2):
                    sampler.step(phase)
        torch.cuda.synchronize()
        for phase in phases:
            sampler.start()
            self.graphs[phase] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[phase], stream=stream):
                sampler.step(phase)

    @torch.no_grad()
    def __call__(self, progress: Progress | None = None) -> torch.Tensor:
        sampler, steps = self.sampler, self.sampler.plan.steps
        sampler.start()
        for step in range(steps):
            self.graphs[sampler.phase(step)].replay()
            if progress:
                progress(step + 1, steps)
        return sampler.latents[-1:].clone()


def ddim_table(scheduler) -> torch.Tensor:
    """[2, steps], what latents and output are multiplied by: their sum is the next latents (arXiv 2010.02502, 12)."""
    levels, train = scheduler.alphas_cumprod.double(), scheduler.config.num_train_timesteps
    here = scheduler.timesteps.cpu()
    there = here - train // len(here)
    a, b = levels[here], torch.where(there >= 0, levels[there.clamp(min=0)], scheduler.final_alpha_cumprod.double())
    if scheduler.config.prediction_type == "v_prediction":
        parts = (a * b).sqrt() + ((1 - a) * (1 - b)).sqrt(), (a * (1 - b)).sqrt() - (b * (1 - a)).sqrt()
    else:
        parts = (b / a).sqrt(), (1 - b).sqrt() - (b * (1 - a) / a).sqrt()
    dtype = torch.promote_types(scheduler.alphas_cumprod.dtype, torch.float32)
    return torch.stack(parts).to(dtype)


def guided(negative: torch.Tensor, wanted: torch.Tensor, guidance: float) -> torch.Tensor:
    """Classifier-free guidance (2207.12598)."""
    return negative + guidance * (wanted - negative)


def twin(unet):
    """A U-Net of its own modules and processors, with the weights of the other."""
    shared = {id(tensor): tensor for tensor in (*unet.parameters(), *unet.buffers())}
    return copy.deepcopy(unet, shared)
