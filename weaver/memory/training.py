"""The training of a job's concepts, for two steps on a device without numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from PIL import Image

from weaver.concepts.bank import training_settings, worker_count
from weaver.concepts.images import TrainingSet
from weaver.concepts.prior import class_pictures
from weaver.concepts.settings import TrainSettings
from weaver.concepts.train import train_concept
from weaver.concepts.woven import WovenSet
from weaver.conditioning import TIME_IDS
from weaver.defaults import model_size
from weaver.job import Job
from weaver.job.inputs import training_pictures
from weaver.memory.ledger import WEIGHTS, WORKING, Ledger, Peak
from weaver.memory.plans import MemoryPlan
from weaver.memory.shapes import Shapes
from weaver.memory.stand_ins import PROMPT, WORD
from weaver.models import is_embedded, threads_for

__all__ = ["training_peaks"]

_STEPS = 2  # the second has the optimiser's state, and a second batch the gradients of the first
_PRIOR = 8  # prior pictures that are made or read for the count; those beyond are added by their size
_EMBEDDED_PRIOR = 48
_EMBEDDED_SCENES = 64  # woven ones; each is two pictures, and captions as long as one's are


def training_peaks(job: Job, model: Shapes, plan: MemoryPlan, ledger: Ledger) -> dict[str, Peak]:
    """What making class pictures and training take, of the concept that takes the most; empty where none is trained.

    Where several train at once, each in a process with a model of its own, it is that of all of them and of the process
    that waits. Arguments are those of `weaver.memory.stages.template_peaks`.
    """
    pipe = model.pipe
    specs = [spec for spec in job.everyone if spec.train]
    kinds = {(len(training_pictures(spec)), training_settings(spec.train, pipe)) for spec in specs}
    workers = min(worker_count(pipe, device=ledger.device), len(specs))
    found: dict[str, Peak] = {}
    ledger.hold(WEIGHTS, model.tensors())
    with threads_for(pipe, ledger.device), ledger:
        for pictures, settings in kinds:
            for stage, peak in _train_one(pipe, pictures, settings, ledger, plan.at_once).items():
                peak = _in_all(peak, workers)
                if stage not in found or peak.total > found[stage].total:
                    found[stage] = peak
    return found


def _train_one(pipe, pictures: int, settings: TrainSettings, ledger: Ledger, at_once: int | None) -> dict[str, Peak]:
    embedded, found = is_embedded(pipe), {}
    wanted = _EMBEDDED_PRIOR if embedded else settings.prior_images
    made = min(wanted, _PRIOR)
    few = {"steps": _STEPS, "prior_images": made, "prior_steps": _STEPS, "accumulate": min(settings.accumulate, _STEPS)}
    short = replace(settings, **few)
    if settings.prior_batch and not embedded:
        with ledger.peak() as found["class pictures"]:
            class_pictures(pipe, WORD, short, lambda *_: None, at_once=at_once)
    made_scenes = min(_EMBEDDED_SCENES, _PRIOR)
    woven = _woven(pipe, made_scenes) if embedded and settings.woven_batch else None
    own = TrainingSet(_blank(pipe, pictures), (f"a <v1> {WORD}",) * pictures)
    prior = TrainingSet(_blank(pipe, made), (PROMPT,) * made)
    more = (wanted - made) * _example_bytes(pipe) if settings.prior_batch else 0
    more += 2 * (_EMBEDDED_SCENES - made_scenes) * _example_bytes(pipe) if woven else 0
    with ledger.peak() as found["training"], ledger.more(WORKING, more):
        train_concept(
            pipe,
            own,
            token="<v1>",
            word=WORD,
            prior=prior,
            woven=woven,
            settings=short,
            at_once=at_once,
            progress=lambda *_: None,
        )
    return found


def _in_all(peak: Peak, workers: int) -> Peak:
    """A peak of one process as that of several, and of the one that waits for them."""
    if workers == 1:
        return peak
    parts = {name: workers * nbytes for name, nbytes in peak.parts.items()}
    parts[WEIGHTS] += peak.parts[WEIGHTS]
    return Peak(sum(parts.values()), parts)


def _woven(pipe, count: int) -> WovenSet:
    blank, (height, width) = _blank(pipe, count), model_size(pipe)
    masks = np.zeros((count, height, width), bool)
    masks[:, : height // 2] = True
    return WovenSet(blank, (f"a <v1> {WORD}",) * count, (PROMPT,) * count, masks, blank)


def _example_bytes(pipe) -> int:
    """Latents in float32 and encoded caption of one prior picture, with what SDXL reads besides."""
    cells, channels = pipe.unet.config.sample_size, pipe.unet.config.in_channels
    height, width = (cells, cells) if isinstance(cells, int) else cells
    text = pipe.tokenizer.model_max_length * pipe.unet.config.cross_attention_dim
    second = getattr(pipe, "text_encoder_2", None)
    added = 0 if second is None else second.config.projection_dim + TIME_IDS
    return 4 * channels * height * width + (text + added) * pipe.unet.dtype.itemsize


def _blank(pipe, count: int) -> tuple[Image.Image, ...]:
    height, width = model_size(pipe)
    return (Image.new("RGB", (width, height)),) * count
