"""N cross-attentions over shared queries, weighted by token and summed."""

from .reference import context_attention_reference

__all__ = ["context_attention_reference"]
