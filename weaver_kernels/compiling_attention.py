"""What is compiled of `context_attention`: a launch as a U-Net makes it, with a configuration of the table."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from weaver_kernels.compiling import jitted, without_storage
from weaver_kernels.tuning import KernelConfig, default_config, kernel_config
from weaver_kernels.unets import TEXT

__all__ = ["NO_SPILLS_TO", "OP", "Case"]

OP = "context_attention"
NO_SPILLS_TO = 80  # head dimension, at 77 keys


@dataclass(frozen=True)
class Case:
    """One binary of `context_attention`: heads of `head_dim`, a type of `bits` bits, `n_keys` keys, compute capability
    `arch`."""

    head_dim: int
    arch: int
    bits: int
    n_keys: int = TEXT
    variant: str = ""  # "q-each", "ragged", "odd-heads" or "default": the configuration of a device not in the table
    chosen: KernelConfig | None = None  # None: the table's

    @property
    def config(self) -> KernelConfig:
        q_each = self.variant == "q-each"
        if self.variant == "default":
            return default_config(OP, self.head_dim, self.bits)
        return self.chosen or kernel_config(OP, self.head_dim, self.bits, self.arch, q_each=q_each)

    @property
    def strict(self) -> bool:
        """What Stable Diffusion runs: larger heads, and longer or ragged texts, are not all without spills."""
        return self.n_keys == TEXT and self.variant != "ragged" and self.head_dim <= NO_SPILLS_TO

    def call(self) -> tuple:
        kernel = _kernel()
        _, tensors, others, options = _arguments(self)
        return kernel, (*tensors, 1.0, *others), options


def _kernel():
    from weaver_kernels.context_attention.kernel import context_attention_kernel

    return jitted(context_attention_kernel)


def _arguments(case: Case) -> tuple:
    """Arguments as a U-Net of 8 heads hands them over."""
    from weaver_kernels.context_attention.launch import kernel_arguments

    empty = without_storage
    dtype = torch.float16 if case.bits == 16 else torch.float32
    rows, n_contexts, n_tokens, heads = 2, 5, 4096, 3 if case.variant == "odd-heads" else 8
    out = empty(rows, n_tokens, heads, case.head_dim, dtype=dtype)
    q = empty(rows, n_contexts, *out.shape[1:], dtype=dtype) if case.variant == "q-each" else out
    keys = empty(n_contexts, case.n_keys, heads, case.head_dim, dtype=dtype)
    return kernel_arguments(
        q,
        keys,
        keys,
        empty(rows, n_contexts, n_tokens, dtype=torch.float32),
        empty(n_contexts) if case.variant == "ragged" else None,
        empty(1),
        (case.config.tile,),
        case.config,
        out,
    )
