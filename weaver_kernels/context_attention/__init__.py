"""N cross-attentions over shared queries, weighted by token and summed."""

from weaver_kernels.context_attention.reference import context_attention_reference

__all__ = ["context_attention_reference"]
