"""What attention does while a plan is attached."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from weaver.errors import WeaverError
from weaver.fusion.routes import OwnProjections, Routes
from weaver.processors import project_out
from weaver_kernels import ContextKV, shared_attention

__all__ = ["ContextReads", "FeatureReads", "FusedCrossAttnProcessor", "InjectedSelfAttnProcessor"]


@dataclass
class ContextReads:
    """What one attn2 reads in this step: keys, values and other changes of all contexts, and which a row has.

    Processors hold what they read, and look nothing up by the names of layers: layers of one size are then one
    compiled block (`compile_repeated_blocks`), whatever the step.
    """

    kv: ContextKV
    own: OwnProjections | None
    routes: Routes | None = None


@dataclass
class FeatureReads:
    """The template's queries and keys [1, T, H * D] for one attn1 in this step; None where they are not injected."""

    queries: torch.Tensor | None = None
    keys: torch.Tensor | None = None


class FusedCrossAttnProcessor:
    """Cross-attention to every context of a row at once (Concept Weaver, section 3.5).

    All contexts share the queries of the fused hidden state, but for a concept that changes `to_q`. They are summed
    before the output projection, which is shared too: exact, because the weights add up to one in every token and so
    keep the projection's bias. What a concept changes in `to_out`, bias too, is added apart (`weaver.fusion.routes`).
    """

    def __init__(self, state, reads: ContextReads, original):
        self.state = state
        self.reads = reads
        self.original = original

    def __call__(
        self,
        attn,
        hidden_states: torch.Tensor,  # [B, T, C]
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if self.state.replaying:
            return _call(self.original, attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        if attention_mask is not None:
            raise WeaverError("A mask over text tokens (encoder_attention_mask) can't be fused: call without it")
        return self.reads.routes.attend(attn, hidden_states, self.reads.kv, self.reads.own)


class InjectedSelfAttnProcessor:
    """Self-attention with the template's queries and keys in every row, and the row's own values.

    So one attention map serves all rows. Outside of the injected steps it is the processor that was there before.
    """

    def __init__(self, reads: FeatureReads, original):
        self.reads = reads
        self.original = original

    def __call__(
        self,
        attn,
        hidden_states: torch.Tensor,  # [B, T, C]
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        q, k = self.reads.queries, self.reads.keys
        if q is None:
            return _call(self.original, attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        v = attn.to_v(hidden_states)
        q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast another than the U-Net's
        q, k, v = (x.unflatten(-1, (attn.heads, -1)) for x in (q, k, v))  # [1, T, H, D] twice, [B, T, H, D]
        return project_out(attn, shared_attention(q, k, v, scale=attn.scale))


def _call(processor, attn, hidden_states, encoder_hidden_states, attention_mask, temb) -> torch.Tensor:
    """Call a processor that stood here before; not all of them know the time embedding."""
    others = {} if temb is None else {"temb": temb}
    texts = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": attention_mask}
    return processor(attn, hidden_states, **texts, **others)
