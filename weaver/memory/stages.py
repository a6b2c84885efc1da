"""The stages of a job but training, run for two steps on a device without numbers; what more steps hold is added."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace

import torch
from PIL import Image

from weaver.features import Features, collect_features, reconstruction_psnr
from weaver.fusion.plan import FusionPlan
from weaver.fusion.sampler import sample_fusion
from weaver.fusion.variants import stack_plans
from weaver.graphs import CUDAGraphs
from weaver.inversion import Inversion, invert
from weaver.job import Job
from weaver.latents import decode_latents, tensor_to_images
from weaver.layers import SITES
from weaver.masks.attention import attention_maps
from weaver.memory.captures import graphs_on
from weaver.memory.ledger import WEIGHTS, Ledger, Peak
from weaver.memory.plans import MemoryPlan
from weaver.memory.resting import lent, modules_of, resting
from weaver.memory.shapes import Shapes
from weaver.memory.stand_ins import BASE_HASH, PROMPT, WORD, delta_bytes, masks_for, uses_for
from weaver.models import threads_for
from weaver.replay import forward_until
from weaver.schedule import ddim_scheduler
from weaver.styles import style_numbers
from weaver.template import template_picture

__all__ = ["CONCEPT_WEIGHTS", "template_peaks", "weave_peaks"]

FEATURE_TENSORS, INVERSION, PLAN, CONCEPT_WEIGHTS = "features", "inversion", "texts and masks", "concepts"
_STEPS = 2  # the first injects features, the second does not


def template_peaks(
    job: Job, model: Shapes, maker: Shapes, plan: MemoryPlan, ledger: Ledger, *, graphs: bool = False
) -> dict[str, Peak]:
    """What making the template and finding masks in it take, of what a job needs of the two.

    Parameters
    ----------
    job : with its defaults resolved
    model, maker : the model that fuses, and the one that makes the template; they may be one
    plan : how it is to be run
    ledger : of the device, with nothing on it
    graphs : steps are replayed from CUDA graphs
    """
    found: dict[str, Peak] = {}
    for shapes in dict.fromkeys((model, maker)):
        ledger.hold(WEIGHTS, shapes.tensors())
    with threads_for(model.pipe, ledger.device), ledger, _styles(job, model, ledger):
        with resting([*model.modules, *maker.modules] if plan.offload else []):
            if not job.template.image:
                options = {"size": job.size, "steps": _STEPS, "guidance": job.template.guidance}
                with ledger.peak() as found["template"]:
                    template_picture(maker.pipe, PROMPT, **options, graphs=graphs_on(ledger, graphs))
            # Grounding DINO and SAM have no stand-ins: a stage with them is left out and not told too small.
            if job.masks.source != "text" and any(not spec.mask.known for spec in job.concepts):
                with ledger.peak() as found["masks"]:
                    _find_words(job, model.pipe, ledger.device)
    return found


def weave_peaks(
    job: Job, model: Shapes, plan: MemoryPlan, ledger: Ledger, *, graphs: bool = False, variants: int = 1
) -> dict[str, Peak]:
    """What inversion, features and fusion take, in their order; arguments are those of `template_peaks`.

    variants : how many pictures are fused at once, as by `stack_plans`; they are then decoded one by one
    """
    others = [module for module in model.modules if module is not model.pipe.unet]
    ledger.hold(WEIGHTS, model.tensors())
    resting_others = resting(others if plan.offload else [])
    with threads_for(model.pipe, ledger.device), ledger, resting_others, _styles(job, model, ledger):
        return _Weaving(job, model.pipe, plan, ledger, graphs, variants).peaks()


def _styles(job: Job, model: Shapes, ledger: Ledger) -> AbstractContextManager:
    """The weights of the job's styles, counted as the U-Net's."""
    numbers = sum(style_numbers(style.file) for style in job.styles)
    return ledger.more(WEIGHTS, numbers * model.pipe.unet.dtype.itemsize)


def _find_words(job: Job, pipe, device: str) -> None:
    picture, words = _picture(job.size), [WORD] * len(job.concepts)
    if job.masks.source == "attention":
        with lent(*modules_of(pipe)):
            attention_maps(pipe, picture, PROMPT, words)
    elif (
        job.masks.source == "segmenter" and device == "cpu"
    ):  # the segmenter is small, and on the CPU wherever the model is
        from weaver.embedded.segmenter import ANIMALS, Segmenter

        Segmenter().eval().segment(picture, [ANIMALS[0]] * len(words))


class _Weaving:
    """The stages of `weaver.pipeline.weave` from inversion on, each leaving its peak."""

    def __init__(self, job: Job, pipe, plan: MemoryPlan, ledger: Ledger, graphs: bool, variants: int):
        self.job, self.pipe, self.plan, self.ledger = job, pipe, plan, ledger
        self.graphs, self.variants = graphs, variants
        self.uses = uses_for(job, pipe)
        self.found: dict[str, Peak] = {}

    def peaks(self) -> dict[str, Peak]:
        job, ledger = self.job, self.ledger
        uses, background = self.uses
        with ExitStack() as held:
            if ledger.device == "cpu":  # elsewhere their weights stay in the host's memory
                held.enter_context(
                    ledger.more(CONCEPT_WEIGHTS, delta_bytes([*uses, *([background] * bool(background))]))
                )
            masks = masks_for(job)
            ledger.hold(PLAN, [masks])
            graphs = graphs_on(ledger, self.graphs)
            inversion = self._invert(held, graphs)
            features = self._collect(inversion, held, graphs)
            del graphs
            if features.reconstruction is not None:
                with self._stage("reconstruction"):
                    reconstruction_psnr(self.pipe, inversion, features)
            self._fuse(features, masks)
        return self.found

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        with self.ledger.peak() as self.found[name]:
            yield

    def _invert(self, held: ExitStack, graphs: CUDAGraphs | None) -> Inversion:
        """Invert a picture; what its longer way holds is held from then on."""
        job, ledger = self.job, self.ledger
        with self._stage("inversion"):
            inversion = invert(self.pipe, _picture(job.size), PROMPT, _STEPS, graphs=graphs)
            ledger.hold(INVERSION, [inversion.latents])
            latents = inversion.z_0.numel() * inversion.z_0.itemsize
            held.enter_context(ledger.more(INVERSION, (job.steps - _STEPS) * latents))
            self._forward(inversion, graphs)  # the last step
        return inversion

    def _collect(self, inversion: Inversion, held: ExitStack, graphs: CUDAGraphs | None) -> Features:
        """Collect features; those of all steps are held from then on."""
        job, ledger = self.job, self.ledger
        sites = replace(
            SITES[job.fusion.sites],
            resnet_window=job.fusion.resnet_window,
            attention_window=job.fusion.attention_window,
        )
        resnets, attentions = sites.resnet_steps(job.steps), sites.attention_steps(job.steps)
        with self._stage("features"):
            first = 1 / _STEPS
            short = replace(sites, resnet_window=first * (resnets > 0), attention_window=first * (attentions > 0))
            kind = self.plan.kind_of(job.fusion.features)
            again = kind != "inversion"
            options = {"reconstruct": again, "storage": self.plan.storage, "graphs": graphs}
            features = collect_features(self.pipe, inversion, short, kind=kind, **options)
            if again:
                ledger.hold(INVERSION, [features.path])
                latents = inversion.z_0.numel() * inversion.z_0.itemsize
                held.enter_context(ledger.more(INVERSION, (job.steps - _STEPS) * latents))
            here = features.tensors[0]
            counts = {path: resnets if path in sites.resnet_modules() else attentions for path in here}
            ledger.hold(FEATURE_TENSORS, here.values())
            total = sum(counts[path] * ledger.size(tensor) for path, tensor in here.items())
            held.enter_context(ledger.more(FEATURE_TENSORS, total - ledger.held[FEATURE_TENSORS]))
            # The steps after the last that keeps any go on to the end with all of them held. Where one window ends
            # before the other, another graph is captured then, with its forward beside the pool.
            self._forward(inversion, None if here and resnets != attentions else graphs)
        return features

    @torch.no_grad()
    def _forward(self, inversion: Inversion, graphs: CUDAGraphs | None) -> None:
        t, arguments = inversion.timesteps[0], inversion.unet_arguments
        forward_until(self.pipe.unet, (), inversion.z_T, t, arguments, whole=True, graphs=graphs)

    def _fuse(self, features: Features, masks: torch.Tensor) -> None:
        job, ledger, pipe = self.job, self.ledger, self.pipe
        concepts, background = self.uses
        with self._stage("fusion"):
            plan = FusionPlan.build(
                pipe,
                concepts,
                masks,
                prompt=PROMPT,
                negative_prompt=PROMPT,
                background=background,
                suppression=job.fusion.suppression,
                guidance=job.fusion.guidance,
                features=features,
                base_hash=BASE_HASH,
            )
            if self.variants > 1:
                plan = stack_plans([plan] * self.variants)
            kept = [kv.keys for kv in plan.keys_values.values()]
            factors = [x for change in plan.regional.values() for x in (change.stack.down, change.stack.up)]
            ledger.hold(PLAN, [plan.text, *kept, *factors, *plan.weights.values(), *plan.regions.values()])
            scheduler = ddim_scheduler(pipe.scheduler)
            options = {"eta": job.fusion.eta, "graphs": graphs_on(ledger, self.graphs) or False}
            z = sample_fusion(pipe.unet, features.z_T, scheduler, plan, **options)
            del options
        with self._stage("decoding"):
            tensor_to_images(decode_latents(pipe.vae, z[:1]))


def _picture(size: tuple[int, int]) -> Image.Image:
    return Image.new("RGB", (size[1], size[0]))
