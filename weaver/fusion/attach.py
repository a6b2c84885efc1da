"""Put a plan onto a pipeline or a U-Net, and take it off again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import nn

from weaver.compiled import is_compiled
from weaver.errors import raise_if
from weaver.fusion.checks import plan_reasons
from weaver.fusion.contexts import acting_weight
from weaver.fusion.plan import FusionPlan
from weaver.fusion.processors import FusedCrossAttnProcessor, InjectedSelfAttnProcessor
from weaver.fusion.regional import install_regional
from weaver.fusion.rows import FUSED, row_reasons
from weaver.fusion.state import FusionState
from weaver.fusion.support import processor_reasons, unet_reasons
from weaver.graphs import CUDAGraphs, captured, graph_reasons, graphs_for
from weaver.layers import InjectionSites, cross_attention_paths

__all__ = ["attach", "attach_reasons", "installable_reasons", "installed", "keys_reasons"]

_SAME_KEYS = 0.02  # but for rounding, in 16 bits too
_OWN = (FusedCrossAttnProcessor, InjectedSelfAttnProcessor)
# Pipelines whose batch is the negative rows, then the prompt's, and whose steps are of the scheduler's timesteps.
_PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionControlNetImg2ImgPipeline",
    "StableDiffusionControlNetInpaintPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLControlNetPipeline",
    "StableDiffusionXLControlNetImg2ImgPipeline",
    "StableDiffusionXLControlNetInpaintPipeline",
)


@contextmanager
def attach(
    target,
    plan: FusionPlan,
    *,
    rows: Sequence[str | tuple[str, int]] | None = None,
    graphs: CUDAGraphs | bool = False,
) -> Iterator[FusionState]:
    """Within the `with` block, `target` draws the plan's fusion. Afterwards it is as it was, bit for bit.

    Parameters
    ----------
    target : a `StableDiffusionPipeline`, a `StableDiffusionXLPipeline`, or their image-to-image, inpainting and
        ControlNet forms, called as ever, with the plan's prompt, negative prompt, size and steps (see
        `FusionPlan.pipeline_arguments`); or its U-Net, for a loop of one's own
    rows : for a U-Net only: what each row of its batch is, "negative" or "fused"; for a plan of several variants with
        the number of its own, as ("fused", 2). A loop of one's own also calls `set_step(step, timesteps)` on what this
        yields, before each forward, and runs under `torch.no_grad()`
    graphs : replay the U-Net's forwards from CUDA graphs, one for each shape of batch and set of injected sites,
        captured when first met. Meanwhile the U-Net's adapters, processors and place must stay as they are. A
        `weaver.graphs.CUDAGraphs` is cleared first

    Guidance is the pipeline's: `eps = omega eps_fused + (1 - omega) eps_negative` (Concept Weaver, section 3.5), and
    without guidance there is no negative row. Several images a prompt each get the plan, and a plan of several variants
    is called with as many prompts. A ControlNet reads the base prompt. Windows are parts of the whole schedule, of
    which image-to-image at `strength` runs the last part, and SDXL with `denoising_end` or `denoising_start` the first
    or the last. SDXL's rows have the pooled embeddings of the base and of the negative prompt, and time ids that are
    the same in all of them.

    Raises `WeaverError` with every reason when the plan does not fit, and when the pipeline is called with other
    prompts or another size than the plan's or, where it injects features, with other steps or time ids than theirs.
    From plain noise any number of steps will do: windows are parts of them.
    """
    raise_if(plan_reasons(plan), "Cannot attach the plan")
    unet = target if isinstance(target, nn.Module) else getattr(target, "unet", None)
    pipe = None if unet is target else target
    raise_if(attach_reasons(unet, pipe, plan, rows) + graph_reasons(unet, graphs), "Cannot attach the plan")
    captures = graphs_for(graphs)
    state = FusionState(plan, pipe, rows, held=captures is not None)
    with installed(unet, state), captured(unet, captures, lambda: state.kind):
        yield state


@contextmanager
def installed(unet: nn.Module, state: FusionState) -> Iterator[None]:
    """Within the block the U-Net's processors and hooks are those of the state, which may be put there again later."""
    features = state.plan.features
    with ExitStack() as undo:
        undo.callback(state.installed.clear)  # processors know the state: what it holds is freed with it, at once
        undo.callback(unet.register_forward_pre_hook(state.before_forward, with_kwargs=True).remove)
        for path in state.context_reads:
            _install(state, unet, path, partial(FusedCrossAttnProcessor, state, state.context_reads[path]), undo)
        install_regional(unet, state, undo)
        if features is not None:
            for path in features.sites.attention_modules(unet):
                _install(state, unet, path, partial(InjectedSelfAttnProcessor, state.feature_reads(path)), undo)
            ends = features.sites.resnet_inputs(), features.sites.resnet_modules()
            for first, last in zip(*ends, strict=True):
                undo.callback(unet.get_submodule(first).register_forward_pre_hook(_skip(state, last)).remove)
                undo.callback(unet.get_submodule(last).register_forward_hook(_inject(state, last)).remove)
        yield


def installable_reasons(unet: nn.Module, sites: InjectionSites | None = None) -> list[str]:
    """Why `attach` can't put its processors onto this U-Net, at every attn2 and at the sites; empty when it can."""
    injected = sites.attention_modules(unet) if sites is not None else []
    return processor_reasons(unet, [*cross_attention_paths(unet), *injected], _OWN)


def _install(state: FusionState, unet: nn.Module, path: str, make: Callable, undo: ExitStack) -> None:
    """Put the processor made for the one at `path` in its place."""
    attention = unet.get_submodule(path)
    original = attention.processor
    undo.callback(attention.set_processor, original)
    attention.set_processor(make(original))
    state.installed[path] = attention, attention.processor


def _skip(state: FusionState, path: str):
    """What the feature at `path` replaces is computed on a corner of one row (0.96 of the embedded model's step)."""

    def hook(module, args):
        return (args[0][:1, :, :2, :2],) if state.injected(path) is not None else None

    return hook


def _inject(state: FusionState, path: str):
    def hook(module, args, output):
        feature = state.injected(path)
        return None if feature is None else feature.to(output.dtype).expand(len(output), -1, -1, -1)

    return hook


def attach_reasons(unet, pipe, plan: FusionPlan, rows: Sequence[str | tuple[str, int]] | None) -> list[str]:
    """Why a plan can't be put onto a pipeline's U-Net, or onto a bare one of these rows; empty when it can."""
    if unet_problems := unet_reasons(unet):
        return unet_problems
    reasons = []
    if pipe is None and rows is None:
        reasons.append("a bare U-Net does not say what its batch rows are: pass rows=('negative', 'fused')")
    if pipe is not None and rows is not None:
        reasons.append("rows are the pipeline's own: attach to pipe.unet to declare them")
    if pipe is not None and type(pipe).__name__ not in _PIPELINES:
        reasons.append(
            f"the rows of a {type(pipe).__name__} are not known (of {', '.join(_PIPELINES)} they are): "
            "attach to its U-Net and declare them"
        )
    reasons += row_reasons(rows, plan.variants) if rows is not None else []
    reasons += _compile_reasons(unet, plan)
    reasons += keys_reasons(unet, plan)
    return reasons + installable_reasons(unet, plan.features.sites if plan.features is not None else None)


def keys_reasons(unet: nn.Module, plan: FusionPlan) -> list[str]:
    """Why a plan's keys are not those that this U-Net makes of its texts; empty when they are."""
    modules = dict(unet.named_modules())
    for path, kv in plan.keys_values.items():
        attention = modules.get(path)
        if attention is None or kv.keys.shape[-2:] != (attention.heads, attention.inner_kv_dim // attention.heads):
            return [f"the plan is for another U-Net, whose {path} is of another shape"]
    keys = next(iter(plan.keys_values.values())).keys
    if (keys.dtype, keys.device) != (unet.dtype, unet.device):
        return [
            f"the plan is in {keys.dtype} on {keys.device}, the U-Net in {unet.dtype} on {unet.device}: "
            "build the plan after moving the pipeline"
        ]
    if not _projects(modules, plan):
        return ["the plan is for another U-Net of the same shape: build it for this one"]
    return []


def _compile_reasons(unet: nn.Module, plan: FusionPlan) -> list[str]:
    """Why the hooks of a plan would not run: a module that has one, or is around one, is compiled."""
    paths = [*(plan.features.sites.resnet_modules() if plan.features is not None else ()), *plan.regional]
    parts = [".".join(path.split(".")[:i]) for path in paths for i in range(path.count(".") + 2)]
    compiled = [part for part in dict.fromkeys(["", *parts]) if is_compiled(unet.get_submodule(part))]
    if plan.regional and any(compiled):
        return [
            f"{compiled[0]} is compiled, which leaves out what concepts change in it: have CUDAGraphs(compiled=True) "
            'compile all of the U-Net, or use the cross-attention of these concepts alone (parts="cross-attention")'
        ]
    return [
        f"{part or 'the U-Net'} is compiled, which leaves out what a plan adds: compile no more than its "
        "repeated blocks, by unet.compile_repeated_blocks(), or have CUDAGraphs(compiled=True) compile all of it"
        for part in compiled
    ]


@torch.no_grad()
def _projects(modules: dict[str, nn.Module], plan: FusionPlan) -> bool:
    """Whether the U-Net's first attn2 makes of the base prompt the keys that the plan has."""
    path, kv = next(iter(plan.keys_values.items()))
    context = plan.leads([(FUSED, 0)])[0]
    text, expected = plan.text[context].to(kv.keys.dtype), kv.keys[context].flatten(-2)
    found = text @ acting_weight(modules[path].to_k, text).to(text.dtype).T
    return bool((found - expected).norm() <= _SAME_KEYS * expected.norm())
