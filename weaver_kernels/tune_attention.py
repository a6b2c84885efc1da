"""What is tuned of `context_attention`, and which configurations are worth compiling."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from typing import NamedTuple

import torch

from weaver_kernels.child import Running
from weaver_kernels.compiling_attention import OP, Case
from weaver_kernels.measure_attention import time_configs
from weaver_kernels.tuning import KernelConfig, source_hash

__all__ = ["HEAD_DIMS", "OP", "Row", "kernel_hash", "rows"]

# Tiles and warps by bits, then stages. A float32 product has no matrix instruction to fill: tiles of 32 spill 456 bytes
# at D = 64 and more above.
GRID = {
    16: (((32, 1), (32, 2), (32, 4), (64, 2), (64, 4), (64, 8), (128, 4), (128, 8)), (1, 2, 3)),
    32: (((16, 4), (16, 8)), (1, 2)),
}
HEAD_DIMS = (64, 40, 80, 160)


class Row(NamedTuple):
    """What a configuration is chosen for."""

    head_dim: int
    bits: int
    q_each: bool

    def __str__(self) -> str:
        return (
            f"D = {self.head_dim}, {self.bits} bits, {'queries of each context' if self.q_each else 'shared queries'}"
        )

    def key(self) -> dict:
        """The columns of the table that say what a row is for, the device apart."""
        return {"bits": self.bits, **({"q_each": True} if self.q_each else {}), "head_dim": self.head_dim}

    def candidates(self, arch: int) -> dict[KernelConfig, list[Case]]:
        """Every configuration worth compiling, with what it is compiled for.

        A row for shared queries serves those of each context too, until they have their own.
        """
        variants = ("q-each",) if self.q_each else ("", "q-each")
        variants += ("odd-heads",) if self.head_dim % 16 and self.bits == 16 and not self.q_each else ()
        shapes, stages = GRID[self.bits]
        reload = (False,) if self.q_each or self.bits == 32 else (False, True)
        configs = (KernelConfig(*shape, n, again) for shape, n, again in product(shapes, stages, reload))
        return {
            config: [Case(self.head_dim, arch, self.bits, variant=variant, chosen=config) for variant in variants]
            for config in configs
            if not (config.reload and config.stages == 1)
        }

    def time(
        self, configs: Sequence[KernelConfig], tell: Callable[[str], None], running: Running
    ) -> Mapping[KernelConfig, float]:
        """Microseconds of each configuration that is right."""
        dtype = torch.float16 if self.bits == 16 else torch.float32
        return time_configs(self.head_dim, dtype, self.q_each, configs, tell, running)


def rows(head_dims: Iterable[int] = HEAD_DIMS) -> list[Row]:
    """All that is tuned, what most layers run first."""
    dims = list(head_dims)
    kinds = ((16, False), (16, True), (32, False))
    return [Row(dim, *kind) for kind in kinds for dim in dims]


def kernel_hash() -> str:
    """Of the sources that decide what a launch runs, the configuration apart."""
    return source_hash(f"{OP}.blocks", f"{OP}.kernel", f"{OP}.launch")
