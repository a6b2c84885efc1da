"""One attention map applied to the values of several rows."""

from weaver_kernels.shared_attention.op import shared_attention
from weaver_kernels.shared_attention.reference import shared_attention_reference

__all__ = ["shared_attention", "shared_attention_reference"]
