"""N cross-attentions over shared queries, weighted by token and summed."""

from weaver_kernels.context_attention.live import live_context_attention
from weaver_kernels.context_attention.op import context_attention
from weaver_kernels.context_attention.plan import ContextPlan
from weaver_kernels.context_attention.reference import context_attention_reference

__all__ = ["ContextPlan", "context_attention", "context_attention_reference", "live_context_attention"]
