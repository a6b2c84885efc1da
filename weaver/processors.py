"""The library's attention processors that compute attention and nothing else, and what ours share with them."""

from __future__ import annotations

import torch
from diffusers.models import attention_processor as library

__all__ = ["PLAIN_PROCESSORS", "project_out"]

# In several implementations: another one of them changes nothing but rounding.
PLAIN_PROCESSORS = (
    library.AttnProcessor,
    library.AttnProcessor2_0,
    library.SlicedAttnProcessor,
    library.XFormersAttnProcessor,
)


def project_out(attn, out: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
    """[B, T, H, D] -> [B, T, C], through the layer's output projection, `added` to that, and dropout."""
    linear, *rest = attn.to_out
    out = linear(out.flatten(-2))
    if added is not None:
        out = out + added
    for layer in rest:
        out = layer(out)
    return out / attn.rescale_output_factor
