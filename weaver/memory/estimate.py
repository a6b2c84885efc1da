"""What a job's run will take on the device, stage by stage and part by part, before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace

from weaver.errors import WeaverError, raise_if, told
from weaver.garbage import left_alone
from weaver.job import SAME_MODEL, Job
from weaver.job.resolve import check_model, in_field, resolve_job
from weaver.memory.ledger import Ledger, Peak
from weaver.memory.plans import MemoryPlan, plans_for
from weaver.memory.shape_rules import ShapeRules
from weaver.memory.shapes import Shapes, load_shapes
from weaver.memory.stages import template_peaks, weave_peaks
from weaver.memory.training import training_peaks
from weaver.models import choose_device
from weaver.sizes import format_bytes
from weaver.values import is_whole

__all__ = ["Estimate", "estimate_job", "fit_job", "most_variants"]

# What makes a stage take less, where its peak is the highest.
_REMEDIES = {
    "template": "a template.image or a smaller template.model",
    "masks": "mask files or boxes",
    "class pictures": "prior_batch: 0 under train, or concept files trained before",
    "training": "checkpointing: true or a smaller batch under train, or concept files trained before",
}
_REMEDY = "a smaller size"


@dataclass(frozen=True, eq=False)
class Estimate:
    """What a run takes.

    Parameters
    ----------
    device, dtype : the kind of device, and the type of the weights
    plan : how the memory is used
    graphs : whether steps are replayed from CUDA graphs; False where they were asked for and do not fit, None where
        they were not asked for
    stages : name -> the most that the stage holds at a time, and of what that is, in the order of the run
    """

    device: str
    dtype: str
    plan: MemoryPlan
    graphs: bool | None
    stages: Mapping[str, Peak]

    @property
    def way(self) -> str:
        """How the run goes, in words; what was asked for and is left out is told."""
        graphs = {None: "", True: ", steps in CUDA graphs", False: ", no CUDA graphs, which do not fit"}
        return f"{self.plan}{graphs[self.graphs]}"

    @property
    def worst(self) -> str:
        """The stage with the highest peak."""
        return max(self.stages, key=lambda name: self.stages[name].total)

    @property
    def nbytes(self) -> int:
        """The peak of the whole run, in bytes."""
        return self.stages[self.worst].total

    def as_mapping(self) -> dict:
        """Plain values, for JSON; all amounts in bytes."""
        stages = {name: {"total": peak.total, "parts": peak.parts} for name, peak in self.stages.items()}
        peak = {"stage": self.worst, "bytes": self.nbytes}
        way = {"plan": asdict(self.plan), "graphs": self.graphs}
        return {"device": self.device, "dtype": self.dtype, **way, "peak": peak, "stages": stages}


def estimate_job(
    job: Job,
    *,
    plan: MemoryPlan | None = None,
    graphs: bool = False,
    variants: int = 1,
    device: str | None = None,
    offline: bool = False,
    source: str = "job",
) -> Estimate:
    """What `run_job` will take of the device's memory, from the configurations of the job's models alone.

    It is what PyTorch's allocator will say, with as many concepts in training at once as `weaver run` has. A cache of
    inversions is taken to be empty. On a GPU what cuDNN takes for itself is not in it, nor the driver's own few hundred
    MB. What CUDA graphs keep follows from how they are captured, and was not compared with a GPU yet.

    Parameters
    ----------
    plan : how the memory is used; None is the fastest way
    graphs : steps are replayed from CUDA graphs, on a GPU
    variants : how many pictures are fused in one batch, as by `stack_plans` of plans like the job's, and then decoded
        one by one; a run has one
    device : "cpu" or "cuda", which need not be here; None is the job's
    offline : take configurations of Hub models from the local cache only
    source : what to call the job in errors

    Raises `WeaverError`, one line, for a job that can't be run.
    """
    raise_if([] if is_whole(variants, 1) else [f"variants is {told(variants)}, expected 1 or more"], "Cannot estimate")
    return _Estimator(job, graphs, device, offline, source)(plan or MemoryPlan(), graphs or None, variants)


def fit_job(
    job: Job,
    limit: int,
    *,
    graphs: bool = False,
    device: str | None = None,
    offline: bool = False,
    source: str = "job",
) -> Estimate:
    """The fastest plan of a job whose peak is at most `limit` bytes; arguments are those of `estimate_job`.

    Graphs are left out where no plan fits with them.

    Raises `WeaverError` where none fits, which names the least peak, its stage, and what would make it fit.
    """
    estimator = _Estimator(job, graphs, device, offline, source)
    *plans, last = plans_for(estimator.device)
    for kept in (True, False) if graphs else (None,):
        least = estimator(last, kept)
        if least.nbytes <= limit:
            others = (estimator(plan, kept) for plan in plans)
            return next((found for found in others if found.nbytes <= limit), least)
    remedy = _REMEDIES.get(least.worst, _REMEDY)
    raise WeaverError(
        f"{source}: a run takes {format_bytes(least.nbytes)} on {least.device} at the least, in its stage "
        f"{least.worst!r} ({least.way}), and {format_bytes(limit)} are allowed: "
        f"raise --max-memory to {format_bytes(least.nbytes, up=True)}, or choose {remedy}"
    )


def most_variants(
    job: Job,
    limit: int,
    *,
    plan: MemoryPlan | None = None,
    graphs: bool = False,
    device: str | None = None,
    offline: bool = False,
    source: str = "job",
) -> int:
    """How many variants can be fused in one batch within `limit` bytes; arguments are those of `estimate_job`.

    0 where not even the job's own run fits.
    """
    estimator, plan = _Estimator(job, graphs, device, offline, source), plan or MemoryPlan()

    def fusion(variants: int) -> int:
        return estimator(plan, graphs or None, variants).stages["fusion"].total

    def fits(variants: int) -> bool:
        return estimator(plan, graphs or None, variants).nbytes <= limit

    if not fits(1):
        return 0
    one = fusion(1)
    found = 1 + (limit - one) // (fusion(2) - one)  # each takes as much as another, but for rounding
    while not fits(found):
        found -= 1
    while fits(found + 1):
        found += 1
    return found


class _Estimator:
    """Models and the resolved job, for any number of plans."""

    def __init__(self, job: Job, graphs: bool, device: str | None, offline: bool, source: str):
        self.device = device or in_field("device", source, choose_device, job.device)
        if graphs and not self.device.startswith("cuda"):
            raise WeaverError(
                f"{source}: device: graphs need a CUDA device, the run is on {self.device}: leave them out"
            )
        self.model = self._shapes("model", job.model, offline, source)
        prompts = [spec.prompt or job.prompt for spec in job.everyone]
        self.job = replace(resolve_job(job, self.model.pipe, prompts, source), device=self.device)
        check_model(self.job, self.model.pipe, source)
        self.maker = self.model
        if self.job.template.model not in (None, SAME_MODEL):
            self.maker = self._shapes("template.model", self.job.template.model, offline, source, fuses=False)

        self._known: dict[tuple, dict[str, Peak]] = {}
        self._rules = ShapeRules()

    def __call__(self, plan: MemoryPlan, graphs: bool | None, variants: int = 1) -> Estimate:
        # Each group of stages with the part of the plan that it depends on.
        captured = {"graphs": bool(graphs)}
        stages = self._peaks(template_peaks, (self.model, self.maker), MemoryPlan(offload=plan.offload), **captured)
        stages |= self._peaks(training_peaks, (self.model,), MemoryPlan(at_once=plan.at_once))
        fused = captured | {"variants": variants}
        stages |= self._peaks(weave_peaks, (self.model,), replace(plan, at_once=None), **fused)
        dtype = str(self.model.pipe.unet.dtype).removeprefix("torch.")
        return Estimate(self.device, dtype, plan, graphs, stages)

    def _peaks(self, function: Callable, models: tuple[Shapes, ...], plan: MemoryPlan, **options) -> dict[str, Peak]:
        key = function, plan, *options.items()
        if key not in self._known:
            with left_alone():
                self._known[key] = function(self.job, *models, plan, Ledger(self.device, self._rules), **options)
        return dict(self._known[key])

    def _shapes(self, field: str, model: str, offline: bool, source: str, **options) -> Shapes:
        return in_field(field, source, load_shapes, model, device=self.device, offline=offline, **options)
