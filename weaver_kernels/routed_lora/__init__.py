"""Low-rank changes of a layer, each on the tokens of its own region."""

from weaver_kernels.routed_lora.adapters import AdapterStack
from weaver_kernels.routed_lora.op import routed_lora
from weaver_kernels.routed_lora.reference import routed_lora_reference

__all__ = ["AdapterStack", "routed_lora", "routed_lora_reference"]
