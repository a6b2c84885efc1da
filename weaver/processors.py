"""Which of the library's attention processors compute attention as such, and nothing else."""

from __future__ import annotations

from diffusers.models import attention_processor as library

__all__ = ["PLAIN_PROCESSORS"]

# In several implementations: another one of them changes nothing but rounding.
PLAIN_PROCESSORS = (
    library.AttnProcessor,
    library.AttnProcessor2_0,
    library.SlicedAttnProcessor,
    library.XFormersAttnProcessor,
)
