"""CUDA graphs on a device without numbers: what their pool and what goes in and out of them hold there."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from weaver.graphs import CUDAGraphs
from weaver.memory.ledger import Ledger

__all__ = ["GRAPHS", "GraphsOnPaper", "graphs_on"]

GRAPHS = "graphs"  # the part of a peak


class GraphsOnPaper(CUDAGraphs):
    """Within its ledger's `with` block: a call runs once for each kind, as before its capture, and never again.

    What a call took at its highest stays in the pool for as long as these graphs do, whether or not it is in use; the
    next kind's capture takes of that first, but its call before the capture takes memory beside the pool.
    """

    device_type = "meta"

    def __init__(self, ledger: Ledger):
        self._ledger = ledger
        super().__init__()

    def clear(self) -> None:
        super().clear()
        self._spare: torch.Tensor | None = None  # as many bytes as the pool holds beyond results

    def run(self, kind: Hashable, call: Callable[[], None], written: Sequence[torch.Tensor]) -> None:
        if kind in self._graphs:
            return
        ledger = self._ledger
        before = ledger.total
        with ledger.peak() as peak:
            call()
        results = ledger.total - before
        spare = max(peak.total - before, 0 if self._spare is None else ledger.size(self._spare)) - results
        self._spare = None  # struck out before it is made again
        self._spare = torch.empty(max(spare, 0), dtype=torch.uint8, device="meta")
        ledger.hold(GRAPHS, [self._spare])
        self._graphs[kind] = None

    def call(self, kind: Hashable, function: Callable, *args, **kwargs) -> Any:
        found = super().call(kind, function, *args, **kwargs)
        kept = tree_leaves(list(self._calls.values()))
        self._ledger.hold(GRAPHS, [leaf for leaf in kept if isinstance(leaf, torch.Tensor)])
        return found


def graphs_on(ledger: Ledger, wished: bool) -> GraphsOnPaper | None:
    """New ones where they are wished for."""
    return GraphsOnPaper(ledger) if wished else None
