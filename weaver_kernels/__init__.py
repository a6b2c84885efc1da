"""Attention of many contexts over shared queries, changes of layers by region, and what goes with them.

Needs torch, takes Triton where there is one, and imports nothing of `weaver`.
"""

from weaver_kernels.context_attention import (
    ContextPlan,
    context_attention,
    context_attention_reference,
    live_context_attention,
)
from weaver_kernels.project_contexts import (
    ContextKV,
    LowRank,
    ProjectionChange,
    equal_contexts,
    project_contexts,
    project_contexts_reference,
)
from weaver_kernels.routed_lora import AdapterStack, routed_lora, routed_lora_reference
from weaver_kernels.shared_attention import shared_attention, shared_attention_reference

__all__ = [
    "AdapterStack",
    "ContextKV",
    "ContextPlan",
    "LowRank",
    "ProjectionChange",
    "context_attention",
    "context_attention_reference",
    "equal_contexts",
    "live_context_attention",
    "project_contexts",
    "project_contexts_reference",
    "routed_lora",
    "routed_lora_reference",
    "shared_attention",
    "shared_attention_reference",
]
