"""What a run and a preview of a job begin with: all that can be checked is, models are loaded, a template is chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from PIL import Image

from weaver.concepts.bank import bind_concepts, read_concepts, resolve_prompts
from weaver.concepts.concept import Concept
from weaver.errors import raise_if
from weaver.graphs import graph_reasons
from weaver.job import SAME_MODEL, Job
from weaver.job.choose import choose_template
from weaver.job.inputs import InputFile
from weaver.job.resolve import check_model, in_field, open_finder, place_concepts, resolve_job
from weaver.manifest import check_inputs, check_weights
from weaver.memory.resting import modules_of, resting
from weaver.models import choose_device, load_model, threads_for, weights_hash
from weaver.places import Places
from weaver.progress import Stages
from weaver.styles import styled

__all__ = ["Prepared", "prepare"]


@dataclass(frozen=True, eq=False)
class _Models:
    """Loads the models of a job, and sees that they are those of the manifest that it comes from, if it does."""

    source: str
    device: str
    offline: bool
    manifest: Mapping | None
    recorded: bool
    stages: Stages
    weights: dict[str, str] = field(default_factory=dict)

    def load(self, name: str, model: str, label: str, **options):
        """The pipeline that the field `name` asks for; `JobError` with that field where it can't be had."""
        with self.stages.step(label):
            options = {"device": self.device, "offline": self.offline} | options
            pipe = in_field(name, self.source, load_model, model, **options)
            self.note(name, pipe)
        return pipe

    def note(self, name: str, loaded) -> None:
        """Hash the weights of a model where a record or a manifest needs that; it takes seconds for a large one."""
        if self.manifest or self.recorded:
            self.weights[name] = weights_hash(loaded)
        if self.manifest:
            check_weights(self.manifest, name, self.weights[name], self.source)


@dataclass(frozen=True, eq=False)
class Prepared:
    """A job that was checked as far as that can be done without its template, and what that took.

    Parameters
    ----------
    job : with its defaults resolved
    pipe : the model that fuses
    known : the concepts of its files, by name, on that model
    places : what is known of the concepts' masks
    models : loads the template's model
    """

    job: Job
    pipe: object
    known: dict[str, Concept]
    places: Places
    models: _Models

    @property
    def weights(self) -> dict[str, str]:
        """`weights_hash` of every model that was loaded, by its field: "model", "template.model", "masks.text"; of none
        where they are neither recorded nor compared with a manifest."""
        return self.models.weights

    def template(self, *, graphs: bool = False, offload: bool = False) -> tuple[Job, Image.Image, Places]:
        """Make or read the template and find all masks in it.

        Parameters
        ----------
        graphs : replay the forwards of the model that makes it from CUDA graphs
        offload : models are on the device only while they work

        Returns what `weaver.job.choose.choose_template` does, and raises `WeaverError`, one line.
        """
        job, pipe, models = self.job, self.pipe, self.models
        maker, options = pipe, {}
        with threads_for(pipe), ExitStack() as away:
            if offload:
                away.enter_context(resting(modules_of(pipe)))
                options = {"device": "cpu", "dtype": pipe.unet.dtype}
            if job.template.model not in (None, SAME_MODEL):
                label = "loading the template's model"
                maker = models.load("template.model", job.template.model, label, fuses=False, **options)
            if offload:
                away.enter_context(resting(modules_of(maker), torch.device(job.device)))
            with styled(pipe, job.styles, models.source):  # concepts, which are trained later, are of the model without
                return choose_template(job, pipe, maker, self.places, models.stages, models.source, graphs=graphs)


def prepare(
    job: Job,
    inputs: Sequence[InputFile],
    source: str,
    *,
    stages: Stages,
    offline: bool = False,
    on_unused: str = "warn",
    graphs: bool = False,
    manifest: Mapping | None = None,
    recorded: bool = True,
) -> Prepared:
    """Check a job, load the model that fuses and what finds words for it, and read concepts and masks that are given.

    Parameters
    ----------
    inputs : every file that it reads, as `read_inputs` gives them
    source : the job's file, or what else to call it in errors
    stages : takes the seconds and shows progress
    offline : take models from the local cache only
    on_unused : what to do where a concept's file has parts that fusion does not use, "warn" or "refuse"
    graphs : whether steps are to be replayed from CUDA graphs
    manifest : of the run that this one repeats: files and models must be the same
    recorded : whether the models' weights are wanted for a record

    Raises `WeaverError`, one line with every reason.
    """
    if manifest:
        check_inputs(manifest, inputs, source)
    with stages.stage("bank"):
        read = read_concepts(job, source)
    prompts = resolve_prompts(job, read, source)
    device = in_field("device", source, choose_device, job.device)
    models = _Models(source, device, offline, manifest, recorded, stages)
    pipe = models.load("model", job.model, "loading the model")
    raise_if(graph_reasons(pipe.unet, graphs), f"{source}: device")
    with threads_for(pipe):
        job = resolve_job(job, pipe, prompts, source)
        check_model(job, pipe, source)
        known = bind_concepts(job, read, pipe, source, on_unused)
        places = place_concepts(job, known, pipe, source)
        if places.needs_finder:
            with stages.step("loading Grounding DINO and SAM"):
                places = open_finder(job, places, source, offline=offline)
                models.note("masks.text", places.finder)
    return Prepared(job, pipe, known, places, models)
