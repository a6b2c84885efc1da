"""What is compiled of `routed_lora`: a layer as a U-Net has it, with a configuration of the table."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from weaver_kernels.compiling import jitted, without_storage
from weaver_kernels.tuning import LoraConfig, default_lora_config, lora_config

__all__ = ["LAYOUTS", "LORA", "LoraCase"]

LORA = "routed_lora"
LAYOUTS = ("linear", "3x3 last", "3x3", "1x1")  # `last`: channels side by side, else the places of a map


@dataclass(frozen=True)
class LoraCase:
    """One binary: adapters of ranks up to `rank`, a type of `bits` bits, compute capability `arch`."""

    rank: int
    arch: int
    bits: int
    layout: str = LAYOUTS[0]
    default: bool = False  # the configuration of a device that is not in the table
    chosen: LoraConfig | None = None  # None: the table's

    @property
    def config(self) -> LoraConfig:
        if self.default:
            return default_lora_config(self.bits)
        return self.chosen or lora_config(self.rank, self.bits, self.arch, spread=self.spread)

    @property
    def spread(self) -> bool:
        """Channels do not lie side by side."""
        return self.layout in ("3x3", "1x1")

    @property
    def strict(self) -> bool:
        """Float32 has no matrix instruction, and holds too much."""
        return self.bits == 16 and not self.default

    def call(self) -> tuple:
        from weaver_kernels.routed_lora.kernel import routed_lora_kernel
        from weaver_kernels.routed_lora.launch import kernel_arguments

        kernel, empty = jitted(routed_lora_kernel), without_storage
        dtype = torch.float16 if self.bits == 16 else torch.float32
        rows, side, inputs, outputs, adapters, taps = 2, 64, 320, 640, 5, 3 if "3x3" in self.layout else 1
        down = empty(adapters * self.rank, inputs, taps, taps, dtype=dtype)
        y, x = empty(rows, outputs, side, side, dtype=dtype), empty(rows, inputs, side, side, dtype=dtype)
        down = down.to(memory_format=torch.channels_last)
        if self.layout == "linear":
            down, (y, x) = down[:, :, 0, 0], (one.flatten(2).mT.contiguous() for one in (y, x))
        elif not self.spread:
            y, x = (one.to(memory_format=torch.channels_last) for one in (y, x))
        _, tensors, others, options = kernel_arguments(
            y,
            x,
            down,
            empty(adapters * self.rank, outputs, dtype=dtype),
            empty(adapters + 1),
            empty(rows, adapters, side * side, dtype=torch.float32),
            empty(1),
            (self.config.tile,),
            self.rank,
            self.config,
            padding=taps // 2,
        )
        return kernel, (*tensors, *others), options
