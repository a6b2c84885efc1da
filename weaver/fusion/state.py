"""The one thing that changes during a fusion: which step it is, and what each row of the batch is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from weaver.errors import WeaverError
from weaver.fusion.agreement import check_prompts, check_time_ids, check_timesteps
from weaver.fusion.injection import Injection
from weaver.fusion.plan import FusionPlan
from weaver.fusion.processors import ContextReads, FeatureReads
from weaver.fusion.regional import Regions
from weaver.fusion.routes import Routes
from weaver.fusion.rows import Row, picture_rows, read_rows
from weaver.graphs import lasting
from weaver_kernels import ContextKV

__all__ = ["FusionState"]

_FIXED_CONTEXTS = 2  # the negative and the base prompt


class FusionState:
    """Follows the U-Net's calls under one plan. Read by the processors, advanced before each forward.

    Rows and steps are the pipeline's own: its guidance says which rows there are, its scheduler which step it is. For
    a bare U-Net both are told: `rows` to `attach`, the step to `set_step`.
    """

    def __init__(
        self, plan: FusionPlan, pipe=None, rows: Sequence[str | tuple[str, int]] | None = None, held: bool = False
    ):
        self.plan = plan
        self._pipe = pipe
        self._declared = read_rows(rows) if rows is not None else None
        self._timesteps: torch.Tensor | None = None
        self._text: torch.Tensor | None = None
        self._step: tuple[int, int] | None = None
        self._weighed: tuple = (None, None)
        self._kinds = {path: plan.route(path) for path in plan.keys_values}
        self._routes: dict[tuple, dict[tuple, Routes]] = {}  # by rows, and by kind of layer
        self.regions = Regions(plan.regional)
        self._injection = Injection(plan.features)
        self._features: Mapping[str, torch.Tensor] = {}
        self._led, self._held = False, held
        self._buffers: dict[str, torch.Tensor] = {}
        self._capacity: int | None = None
        self._keys_values_are_the_plan_s = True
        own = plan.own_projections
        self.context_reads = {path: ContextReads(kv, own.get(path)) for path, kv in plan.keys_values.items()}
        self._feature_reads: dict[str, FeatureReads] = {}
        self.installed: dict[str, tuple] = {}  # by attach: the attention at a path, and its processor

    def lead(self, capacity: int | None, held: bool) -> None:
        """From now on `settle` is called before each forward, and `load` puts other plans in the place of this one.

        Parameters
        ----------
        capacity : the most concepts, and the most negative prompts of their own, of a variant; None for the plan's
        held : features are copied into tensors that stay where they are, as a captured forward needs
        """
        self._led, self._held = True, held
        if held:
            self.regions.hold()
        self._capacity = max((capacity or 0) + 1, self.plan.index.shape[-1])
        room = 0 if capacity is None else self.plan.variants * (_FIXED_CONTEXTS + 2 * capacity)
        if held or room > len(self.plan.text):
            self._own_keys_values(max(room, len(self.plan.text)))

    def settle(self, unet, step: int, timesteps: torch.Tensor) -> tuple:
        """Make ready for the forward number `step`; returns its `kind`."""
        self.set_step(step, timesteps)
        self._settle(unet, self._declared, step, len(timesteps))
        return self.kind

    @property
    def kind(self) -> tuple:
        """What a captured forward depends on besides tensors that stay where they are: rows, and paths of modules that
        are injected into."""
        return self._weighed[0], tuple(sorted(self._features))

    def load_reasons(self, plan: FusionPlan) -> list[str]:
        """Why another plan can't take the place of this one; empty when it can."""
        now, reasons = self.plan, []
        for name in ("steps", "size", "sizes", "variants"):
            if getattr(plan, name) != getattr(now, name):
                reasons.append(f"{name} differ")
        if plan.text.shape[1:] != now.text.shape[1:] or plan.text.dtype != now.text.dtype:
            reasons.append("the texts are of another length, width or type")
        own = bool(plan.own_projections or now.own_projections)
        if (own or plan.regional) and not torch.equal(plan.index, now.index):
            reasons.append("a concept changes more than keys and values, and the plans have not the same places for it")
        if own and {path: plan.route(path) for path in plan.keys_values} != self._kinds:
            reasons.append("a concept changes to_q or to_out, and the plans have not the same ones")
        reasons += self.regions.load_reasons(plan.regional)
        if _injects(plan) != _injects(now):
            reasons.append("they inject features of other kinds, at other sites or in other windows")
        contexts, slots = len(next(iter(self.context_reads.values())).kv.keys), self._capacity
        if len(plan.text) > contexts or plan.index.shape[-1] > slots:
            reasons.append(f"there is room for {slots - 1} concepts and {contexts} texts in all: raise the capacity")
        return reasons

    def load(self, plan: FusionPlan) -> None:
        """Put another plan in the place of this one, in the same memory; `load_reasons` has none against it."""
        if self._keys_values_are_the_plan_s:
            self._own_keys_values(len(self.plan.text))
        self._write_keys_values(plan)
        for path, own in plan.own_projections.items():
            self.context_reads[path].own = own
        self.regions.load(plan.regional)
        self.plan, self._timesteps = plan, None
        self._injection = Injection(plan.features)
        self._weighed = (self._weighed[0], None)

    @torch.inference_mode(False)  # whose tensors could not be written over outside of it
    def _own_keys_values(self, room: int) -> None:
        """Memory for the keys and values of `room` contexts, so that the plan's own are not written over."""
        for path, kv in self.plan.keys_values.items():
            empty = (kv.keys.new_zeros(room, *kv.keys.shape[1:]) for _ in range(2))
            self.context_reads[path].kv = ContextKV(*empty)
        self._keys_values_are_the_plan_s = False
        self._write_keys_values(self.plan)

    def _write_keys_values(self, plan: FusionPlan) -> None:
        for path, kv in plan.keys_values.items():
            own = self.context_reads[path].kv
            own.keys[: len(kv.keys)] = kv.keys
            own.values[: len(kv.values)] = kv.values

    def set_step(self, step: int, timesteps: torch.Tensor) -> None:
        """Say that the next forward is number `step`, from 0, of a loop over `timesteps` [steps] (bare U-Net).

        Raises `WeaverError` for a step that there is not, and for other timesteps than the features'.
        """
        if not isinstance(timesteps, torch.Tensor) or timesteps.ndim != 1:
            raise WeaverError(f"timesteps is a {type(timesteps).__name__}, expected the scheduler's tensor [steps]")
        if not isinstance(step, int) or not 0 <= step < len(timesteps):
            raise WeaverError(f"step is {step!r}, expected 0 to {len(timesteps) - 1}, its number in the timesteps")
        if timesteps is not self._timesteps:
            check_timesteps(self.plan, timesteps)
            self._timesteps = timesteps
        self._step = (step, len(timesteps))

    def before_forward(self, unet, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of the U-Net: settle rows, step and features for the processors."""
        if self.replaying or self._led:
            return
        sample, timestep, text = (
            args[i] if i < len(args) else kwargs[name]
            for i, name in enumerate(("sample", "timestep", "encoder_hidden_states"))
        )
        if tuple(sample.shape[-2:]) != self.plan.size:
            got, size = tuple(sample.shape[-2:]), self.plan.size
            raise WeaverError(f"The latents are {got[0]} x {got[1]}, the plan is for {size[0]} x {size[1]}")
        rows = self._rows(len(sample))
        if self._pipe is not None:
            begins = self._follow(timestep)
            if begins or text is not self._text:  # a callback may have put other text there
                self._check(rows, text, kwargs.get("added_cond_kwargs") or {})
                self._text = text
        step, steps = self._take_step()
        if torch.is_grad_enabled():
            raise WeaverError("Fusion is for inference only: call the U-Net under torch.no_grad()")
        self._settle(unet, rows, step, steps)

    def _settle(self, unet, rows: tuple[Row, ...], step: int, steps: int) -> None:
        for path, (attention, processor) in self.installed.items():
            if attention.processor is not processor:
                raise WeaverError(
                    f"{path} has another processor than attach() put there, and would not be fused: "
                    "choose attention slicing, xformers and the like before attach()"
                )
        self._weigh(rows, self.plan.phase_at(step / steps))
        self._inject({})  # those of the step before are not injected into the template's own row
        keys = next(iter(self.context_reads.values())).kv.keys  # on the U-Net's device, in its dtype
        features = self._injection.at(unet, step, keys.device)
        features = {path: x.to(keys.device, keys.dtype, non_blocking=True) for path, x in features.items()}
        if self._held:
            self._buffers |= {path: lasting(x) for path, x in features.items() if path not in self._buffers}
            features = {path: self._buffers[path].copy_(x, non_blocking=True) for path, x in features.items()}
        self._inject(features)

    def _inject(self, features: Mapping[str, torch.Tensor]) -> None:
        """Have these outputs of the template's modules, one row each, put in the place of the U-Net's own."""
        self._features = features
        for path, reads in self._feature_reads.items():
            reads.queries, reads.keys = (self._features.get(f"{path}.{name}") for name in ("to_q", "to_k"))

    @property
    def replaying(self) -> bool:
        """Whether the U-Net draws the template now, for its features, and nothing is fused or injected."""
        return self._injection.replaying

    def feature_reads(self, path: str) -> FeatureReads:
        """What the attn1 at `path` is to read."""
        return self._feature_reads.setdefault(path, FeatureReads())

    def injected(self, path: str) -> torch.Tensor | None:
        """The template's output of the module at `path`, one row; None if not injected now."""
        return self._features.get(path)

    def _rows(self, batch: int) -> tuple[Row, ...]:
        if self._declared is not None:
            if len(self._declared) != batch:
                raise WeaverError(f"The batch has {batch} rows, {len(self._declared)} were declared to attach()")
            return self._declared
        if not hasattr(self._pipe, "_guidance_scale"):
            raise WeaverError("The U-Net was called before its pipeline: attach to the U-Net to call it by itself")
        guided = self._pipe.do_classifier_free_guidance
        return picture_rows(batch // 2 if guided else batch, self.plan.variants, guided)

    def _follow(self, timestep) -> bool:
        """Find the step in the scheduler's own list; True if a new run of the pipeline has begun."""
        timesteps = self._pipe.scheduler.timesteps
        self._step = (_position(timestep, timesteps), len(timesteps))
        if timesteps is self._timesteps:
            return False
        check_timesteps(self.plan, timesteps)
        self._timesteps = timesteps
        return True

    def _check(self, rows: tuple[Row, ...], text: torch.Tensor, added: dict) -> None:
        check_prompts(self.plan, self.plan.leads(rows), text, added.get("text_embeds"))
        if self.plan.time_ids is not None:
            check_time_ids(self.plan, added["time_ids"])

    def _take_step(self) -> tuple[int, int]:
        if self._step is None:
            raise WeaverError("Attached to a bare U-Net: call set_step(step, timesteps) before each forward")
        step = self._step
        if self._pipe is None:
            self._step = None
        return step

    @torch.inference_mode(False)  # whose tensors could not be written over outside of it
    def _weigh(self, rows: tuple[Row, ...], phase: int) -> None:
        """Write the phase's weights into the `Routes` of each kind of layer, which are kept for rows seen again."""
        if (rows, phase) == self._weighed:
            return
        routes = self._routes.setdefault(rows, {})
        kinds, variants = map(list, zip(*rows, strict=True))
        index = self.plan.index[kinds, variants]
        for route in set(self._kinds.values()):
            size, *which = route
            weights = self.plan.weights[phase, size][kinds, variants]
            if route in routes:
                routes[route].update(weights, index, self.plan.same_as)
            else:
                routes[route] = Routes(weights, index, self.plan.same_as, which, self._capacity)
        sizes = {reads.size for reads in self.regions.reads.values()}
        self.regions.weigh(rows, index, {size: self.plan.regions[phase, size][kinds, variants] for size in sizes})
        self._weighed = rows, phase
        for path, reads in self.context_reads.items():
            reads.routes = routes[self._kinds[path]]


def _injects(plan: FusionPlan) -> tuple | None:
    features = plan.features
    if features is None:
        return None
    sites = features.sites
    windows = sites.resnet_steps(plan.steps), sites.attention_steps(plan.steps)
    return sites.resnets, sites.attentions, windows, features.kind == "replayed"


def _position(timestep, timesteps: torch.Tensor) -> int:
    """Which of `timesteps` this is, without waiting for the device where it is a view of them, as in pipelines."""
    if isinstance(timestep, torch.Tensor):
        if timestep.untyped_storage().data_ptr() == timesteps.untyped_storage().data_ptr():
            return (timestep.storage_offset() - timesteps.storage_offset()) // timesteps.stride(0)
    matches = (timesteps == timestep).nonzero()
    if not len(matches):
        raise WeaverError(f"Timestep {timestep} is none of the scheduler's {timesteps.tolist()}")
    return int(matches[0])
