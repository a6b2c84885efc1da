"""What is tuned of `routed_lora`, and which configurations are worth compiling."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import NamedTuple

import torch

from weaver_kernels.child import Running
from weaver_kernels.compiling_lora import LORA, LoraCase
from weaver_kernels.measure import time_each
from weaver_kernels.measure_lora import timed_layers
from weaver_kernels.tuning import LoraConfig, source_hash

__all__ = ["LoraRow", "lora_hash", "lora_rows"]

# Tiles, which a plan has, inputs, outputs and warps by bits, then stages, then programs a row is cut into at least.
GRID = {
    16: (
        ((32, 32, 64, 4), (32, 64, 64, 4), (64, 32, 32, 4), (64, 64, 64, 4), (64, 64, 64, 8), (64, 64, 128, 8)),
        (2, 3),
    ),
    32: (((16, 32, 32, 4), (32, 32, 32, 4)), (2,)),
}
PROGRAMS = (128, 256, 512)


class LoraRow(NamedTuple):
    """What a configuration is chosen for: ranks up to `rank`, and whether channels do not lie side by side."""

    rank: int
    bits: int
    spread: bool

    def __str__(self) -> str:
        return f"rank {self.rank}, {self.bits} bits, channels {'apart' if self.spread else 'side by side'}"

    def key(self) -> dict:
        """The columns of the table that say what a row is for, the device apart."""
        return {"bits": self.bits, "spread": self.spread, "rank": self.rank}

    def candidates(self, arch: int) -> dict[LoraConfig, list[LoraCase]]:
        """Every configuration worth compiling, with what it is compiled for."""
        layouts = ("3x3", "1x1") if self.spread else ("linear", "3x3 last")
        shapes, stages = GRID[self.bits]
        configs = (LoraConfig(*shape, n, programs) for shape, n, programs in product(shapes, stages, PROGRAMS))
        return {
            config: [LoraCase(self.rank, arch, self.bits, layout, chosen=config) for layout in layouts]
            for config in configs
        }

    def time(
        self, configs: Sequence[LoraConfig], tell: Callable[[str], None], running: Running
    ) -> Mapping[LoraConfig, float]:
        """Microseconds of each configuration that is right."""
        dtype = torch.float16 if self.bits == 16 else torch.float32
        return time_each(timed_layers(self.rank, dtype, self.spread), configs, tell, running)


def lora_rows() -> list[LoraRow]:
    """All that is tuned, the usual ranks first."""
    kinds = ((16, False), (16, True), (32, False), (32, True))
    return [LoraRow(rank, *kind) for kind in kinds for rank in (16, 64, 128)]


def lora_hash() -> str:
    """Of the sources that decide what a launch runs, the configuration apart."""
    return source_hash(f"{LORA}.kernel", f"{LORA}.launch")
