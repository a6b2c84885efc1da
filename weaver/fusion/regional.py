"""What concepts change besides keys and values of texts, each in its own region: a LoRA that is used whole.

LoRA files change projections of what lies in one place of the picture: the Linears of self-attention, feed-forward and
transformers, queries and outputs of cross-attention, convolutions. A change acts in the places that its output lies in:

    `y[t] = f(x)[t] + sum_i a_i M_i[t] (delta_i x)[t]`

with M_i the concept's mask at that map's size and a_i its strength at that step. So a key or value of self-attention
belongs to the token that it is made of, whoever reads it; a query of cross-attention to the token that asks, whichever
text it asks; a convolution has the change of where it puts its result, wherever it reads; on a soft edge changes blend
as masks do. What a ResNet makes of the time is added to all of its places, so a change of it is added by the same line.
Changes act in the fused rows alone: the negative row is the base model's. Suppression weighs what texts give, and does
not weigh these. Concept Weaver (section 3.5) changes cross-attention alone: this goes past the paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import nn

from weaver.concepts.changes import Delta, base_layer, change_fits, scaled
from weaver.fusion.contexts import FIRST_USE, ConceptUse
from weaver.fusion.rows import Row
from weaver.layers import branch_end, output_size, time_sum
from weaver_kernels import AdapterStack, ContextPlan, LowRank, routed_lora

__all__ = [
    "RegionalChanges",
    "RegionalReads",
    "Regions",
    "install_regional",
    "regional_changes",
    "regional_reasons",
]


@dataclass(frozen=True, eq=False)
class RegionalChanges:
    """What all contexts change of one module: `stack`, of rank 0 where one changes nothing; and the size (h, w) of the
    map that the module's output lies on."""

    stack: AdapterStack
    size: tuple[int, int]


def regional_reasons(unet: nn.Module, uses: Sequence[ConceptUse]) -> list[str]:
    """Which concepts change what this U-Net has not, outside of cross-attention (`Concept.check_base` sees to that);
    empty when none does."""
    modules, reasons = dict(unet.named_modules()), []
    for use in uses:
        changes = {path: x for path, x in use.in_region.items() if path not in use.concept.deltas}
        odd = [path for path, delta in changes.items() if not change_fits(modules.get(path), delta)]
        if odd:
            reasons.append(
                f"{len(odd)} of the {len(changes)} changes that {use.name} makes outside cross-attention do not fit "
                f"the U-Net, {odd[0]} among them: load the model it was trained on, or use its cross-attention alone "
                '(parts="cross-attention")'
            )
        elif unet.config.resnet_time_scale_shift != "default" and any(map(time_sum, changes)):
            reasons.append(
                f"{use.name} changes what ResNets make of the time, which this U-Net multiplies by: use its "
                'cross-attention alone (parts="cross-attention")'
            )
    return reasons


def regional_changes(
    unet: nn.Module, uses: Sequence[ConceptUse], contexts: int, size: tuple[int, int], dtype: torch.dtype
) -> dict[str, RegionalChanges]:
    """What concepts change outside of cross-attention, for those modules of which one changes something, by path.

    Parameters
    ----------
    uses : those of the contexts 2 and on, of `contexts` in all
    size : (h, w) of the latents

    Changes are in `dtype`, on the U-Net's device.
    """
    found: dict[str, list[LowRank | None]] = {}
    for s, use in enumerate(uses, start=FIRST_USE):
        for path, delta in use.in_region.items():
            axes = base_layer(unet.get_submodule(path)).weight.ndim
            found.setdefault(path, [None] * contexts)[s] = _factors(scaled(delta, use.scale, dtype), axes)
    device, levels = unet.device, len(unet.config.block_out_channels)
    return {
        path: RegionalChanges(AdapterStack.of(factors).to(device, dtype), output_size(path, levels, size))
        for path, factors in found.items()
    }


def _factors(delta: Delta, axes: int) -> LowRank:
    """A change as two factors, the first with as many axes as the weight; a matrix is one, and the other keeps it."""
    if not isinstance(delta, LowRank):
        delta = LowRank(delta, torch.eye(len(delta), dtype=delta.dtype, device=delta.device))
    down, up = delta
    return LowRank(down.reshape(*down.shape, *(1,) * (axes - down.ndim)), up.flatten(1))


@dataclass
class RegionalReads:
    """What one module's output has added in this step: the contexts' changes, and where a row has which."""

    stack: AdapterStack
    size: tuple[int, int]
    plan: ContextPlan | None = None
    time: torch.Tensor | None = None  # [B, C], what a ResNet's changed projection reads, until its sum is read

    def added(self, output: torch.Tensor, x: torch.Tensor, module: nn.Module) -> torch.Tensor:
        """The output [B, T, O] of a Linear for x [B, T, C], or [B, O, h, w] of a convolution, with the changes added.

        Written over where it is of the changes' type.
        """
        convolution = isinstance(module, nn.Conv2d)
        geometry = {key: getattr(module, key)[0] for key in ("stride", "padding", "dilation") if convolution}
        found, dtype = self.plan, self.stack.down.dtype
        y, x = output.to(dtype), x.to(dtype)  # under autocast of others
        routed_lora(y, x, self.stack, found.weights, found.context_index, plan=found, **geometry)
        return y.to(output.dtype)

    def time_added(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, O, h, w] with what the changes make of the time added to each place."""
        down, up = self.stack.down, self.stack.up  # [R, C], [R, O]
        inner = self.time.to(down.dtype) @ down.T  # [B, R]
        ends = zip(self.stack.starts, self.stack.starts[1:], strict=False)
        made = torch.stack([inner[:, i:j] @ up[i:j] for i, j in ends], 1)  # [B, S', O]
        index = self.plan.context_index.long()[:, :, None].expand(-1, -1, made.shape[-1])
        weights = self.plan.weights.to(made.dtype)  # [B, S, T]
        added = made.gather(1, index).mT @ weights  # [B, O, T]
        return hidden_states + added.view_as(hidden_states).to(hidden_states.dtype)


class Regions:
    """Which concepts' changes act where in the rows of a batch, for maps of every size.

    `reads` is what the hooks of a module read, by its path.
    """

    def __init__(self, changes: Mapping[str, RegionalChanges]):
        self.reads = {path: RegionalReads(change.stack, change.size) for path, change in changes.items()}
        self._plans: dict[tuple[Row, ...], dict[tuple[int, int], ContextPlan]] = {}
        self._held = False

    @torch.inference_mode(False)  # whose tensors could not be written over outside of it
    def hold(self) -> None:
        """From now on other changes are copied into the memory of these, as a captured forward needs."""
        self._held = True
        for reads in self.reads.values():
            down, up = reads.stack.down.clone(), reads.stack.up.clone()
            reads.stack = replace(reads.stack, down=down, up=up)

    def weigh(self, rows: tuple[Row, ...], index: torch.Tensor, weights: Mapping[tuple[int, int], torch.Tensor]):
        """Take the weights [B, S, T] for every size, and index [B, S]; written over those of the same rows before."""
        plans = self._plans.setdefault(rows, {})
        for size, of_size in weights.items():
            if size in plans:
                plans[size].update(of_size, index)
            else:
                plans[size] = ContextPlan(of_size, index)
        for reads in self.reads.values():
            reads.plan = plans[reads.size]

    def load_reasons(self, changes: Mapping[str, RegionalChanges]) -> list[str]:
        """Why other changes can't take the place of these; empty when they can."""
        sizes = {path: reads.size for path, reads in self.reads.items()}
        if sizes != {path: change.size for path, change in changes.items()}:
            return ["a concept changes more than keys and values, and the plans' do not change the same modules"]
        if self._held and any(self.reads[path].stack.starts != change.stack.starts for path, change in changes.items()):
            return ["graphs hold the ranks of a LoRA, and the plans' are not the same"]
        return []

    def load(self, changes: Mapping[str, RegionalChanges]) -> None:
        """Put other changes of the same modules in the place of these."""
        for path, change in changes.items():
            if self._held:
                self.reads[path].stack.down.copy_(change.stack.down)
                self.reads[path].stack.up.copy_(change.stack.up)
            else:
                self.reads[path].stack = change.stack


def install_regional(unet: nn.Module, state, undo: ExitStack) -> None:
    """Have the U-Net's modules add what `state.regions` says, until `undo` is closed."""
    for path, reads in state.regions.reads.items():
        module, end = unet.get_submodule(path), branch_end(path)
        if sum_path := time_sum(path):
            reader = unet.get_submodule(sum_path)
            undo.callback(module.register_forward_hook(_keep_time(state, reads, end)).remove)
            undo.callback(reader.register_forward_pre_hook(_add_time(reads)).remove)
        else:
            undo.callback(module.register_forward_hook(_add(state, reads, end)).remove)


def _stands_aside(state, end: str | None) -> bool:
    """Whether the template is drawn, or a ResNet's branch is not computed since its feature is injected."""
    return state.replaying or (end is not None and state.injected(end) is not None)


def _add(state, reads: RegionalReads, end: str | None):
    def hook(module, args, output):
        return None if _stands_aside(state, end) else reads.added(output, args[0], base_layer(module))

    return hook


def _keep_time(state, reads: RegionalReads, end: str | None):
    def hook(module, args, output):
        reads.time = None if _stands_aside(state, end) else args[0]

    return hook


def _add_time(reads: RegionalReads):
    def hook(module, args):
        if reads.time is None:
            return None
        added, reads.time = reads.time_added(args[0]), None
        return (added,)

    return hook
