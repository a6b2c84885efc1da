"""Attention of many contexts over shared queries. Needs torch, takes Triton, and imports nothing of `weaver`."""

from weaver_kernels.context_attention import ContextPlan, context_attention, context_attention_reference

__all__ = ["ContextPlan", "context_attention", "context_attention_reference"]
