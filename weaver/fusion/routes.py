"""Which contexts the rows of a batch attend to in one kind of layer, and which of them have projections of their own.

Keys and values of a context are its own in any case. A concept may change `to_q` and `to_out` too, as LoRA does: then
its context reads queries of its own, and what it attends to goes through an output projection of its own before the
contexts are summed. `sum_s (W_o + delta_s) w_s h_s` is taken apart into `W_o sum_s w_s h_s + sum_s delta_s w_s h_s`, so
that the base's projection runs once and each change on its own context alone. A bias of its own adds
`sum_s w_s delta_b_s`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from weaver.concepts.changes import Delta, apply_change
from weaver.processors import project_out
from weaver_kernels import ContextKV, ContextPlan, context_attention

__all__ = ["OwnProjections", "Routes"]


@dataclass(frozen=True, eq=False)
class OwnProjections:
    """What contexts add to the query and output projections of one layer.

    Parameters
    ----------
    queries : number of a context -> change of [H * D, C], added to `to_q`
    outputs : number of a context -> change of [C, H * D], added to `to_out`
    biases : number of a context -> change of [C], added to the bias of `to_out`
    """

    queries: Mapping[int, Delta] = field(default_factory=dict)
    outputs: Mapping[int, Delta] = field(default_factory=dict)
    biases: Mapping[int, torch.Tensor] = field(default_factory=dict)

    @property
    def parts(self) -> tuple[Mapping[int, Delta], ...]:
        """All of them by kind: queries, outputs, biases."""
        return self.queries, self.outputs, self.biases

    @property
    def which(self) -> tuple[tuple[int, ...], ...]:
        """The contexts that have queries, those that have outputs and those that have biases of their own."""
        return tuple(tuple(sorted(part)) for part in self.parts)

    def moved(self, start: int) -> OwnProjections:
        """The same for contexts that are numbered from `start`."""
        return OwnProjections(*({s + start: x for s, x in part.items()} for part in self.parts))


class Routes:
    """The contexts of every row, for layers of one size in which the same contexts have projections of their own.

    Rows B, contexts S of a row, tokens T; P pairs of a row and a context are attended to apart, since that context has
    an output projection of its own. Which contexts a row has is settled when this is made; `update` writes other
    weights into the same buffers.

    Parameters
    ----------
    weights : [B, S, T], and `index` [B, S] into the plan's contexts
    same_as : [S'], for each context the first one equal to it
    which : `OwnProjections.which` of the layers
    capacity : the most contexts of a row; None is S, and so is any where one has projections of its own, since the
        contexts then stay the same

    `plan` is of the contexts that are summed before the output projection.
    """

    def __init__(
        self, weights: torch.Tensor, index: torch.Tensor, same_as: torch.Tensor, which=((), (), ()), capacity=None
    ):
        own_queries, own_outputs, own_biases = which
        self._index = index
        self._queries = [(s, *torch.nonzero(index == s, as_tuple=True)) for s in own_queries]
        self._pairs = torch.nonzero(torch.isin(index, index.new_tensor(own_outputs)), as_tuple=True)  # rows, slots: [P]
        self._outputs = [(s, torch.nonzero(index[self._pairs] == s)[:, 0]) for s in own_outputs]
        self.plan = ContextPlan(
            self._together(weights),
            index,
            capacity=None if any(which) else capacity,
            same_as=same_as,
            merge=not own_queries,
        )
        self._apart = ContextPlan(*self._alone(weights), merge=False) if own_outputs else None
        self._biases = [(s, *torch.nonzero(index == s, as_tuple=True)) for s in own_biases]
        self._weights = weights.clone() if own_biases else None  # [B, S, T]

    def update(self, weights: torch.Tensor, index: torch.Tensor, same_as: torch.Tensor) -> None:
        """Take other weights [B, S, T] in place; and other contexts, where none has projections of its own."""
        self.plan.update(self._together(weights), index, same_as)
        if self._apart is not None:
            self._apart.update(*self._alone(weights))
        if self._weights is not None:
            self._weights.copy_(weights)

    def attend(self, attn, hidden_states: torch.Tensor, kv: ContextKV, own: OwnProjections | None) -> torch.Tensor:
        """What every row reads, through the output projections: [B, T, C] as `hidden_states` is."""
        q = attn.to_q(hidden_states)
        if self._queries:
            q = q[:, None].repeat(1, self._index.shape[1], 1, 1)  # [B, S, T, H * D]
            for s, rows, slots in self._queries:
                q[rows, slots] += apply_change(own.queries[s], hidden_states[rows])
        q = q.unflatten(-1, (attn.heads, -1))
        out = _attend(q, kv, self.plan, attn.scale)
        if self._apart is None and self._weights is None:
            return project_out(attn, out)
        added = torch.zeros_like(hidden_states)
        if self._apart is not None:
            rows, slots = self._pairs
            apart = _attend(q[rows, slots] if self._queries else q[rows], kv, self._apart, attn.scale)  # [P, T, H, D]
            out = out.index_add(0, rows, apart)
            for s, pairs in self._outputs:
                change = apply_change(own.outputs[s], apart[pairs].flatten(-2))
                added.index_add_(0, rows[pairs], change.to(added.dtype))
        for s, rows, slots in self._biases:
            added.index_add_(0, rows, (self._weights[rows, slots, :, None] * own.biases[s]).to(added))
        return project_out(attn, out, added)

    def _together(self, weights: torch.Tensor) -> torch.Tensor:
        """The weights without those of contexts that are attended to apart."""
        return weights.index_put(self._pairs, weights.new_zeros(())) if len(self._pairs[0]) else weights

    def _alone(self, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights [P, 1, T] and index [P, 1] of the contexts that are attended to apart."""
        return weights[self._pairs][:, None], self._index[self._pairs][:, None]


def _attend(q: torch.Tensor, kv: ContextKV, plan: ContextPlan, scale: float) -> torch.Tensor:
    k, v = kv.keys.to(q.dtype), kv.values.to(q.dtype)  # under autocast another than the U-Net's
    return context_attention(q, k, v, plan.weights, plan.context_index, scale=scale, plan=plan)
