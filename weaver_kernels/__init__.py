"""Attention of many contexts over shared queries. Needs torch alone and imports nothing of `weaver`."""

from weaver_kernels.context_attention import context_attention_reference

__all__ = ["context_attention_reference"]
