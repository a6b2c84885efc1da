"""What of a model is learned for a concept, and where it begins: no change, and a token that means its class word."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from weaver.concepts.changes import Delta, parts_of
from weaver.concepts.concept import attn2_projections
from weaver.concepts.settings import TrainSettings
from weaver.conditioning import text_encoders
from weaver.errors import WeaverError
from weaver.layers import transformer_linears
from weaver_kernels import LowRank

__all__ = ["Learned", "start"]


@dataclass(frozen=True)
class Learned:
    """What is learned: vectors [V, C] by text encoder and changes of weights by their paths, in float32."""

    vectors: Mapping[str, torch.Tensor]
    deltas: Mapping[str, Delta]

    def weights(self) -> list[torch.Tensor]:
        """The tensors that the changes are made of."""
        return [part for delta in self.deltas.values() for part in parts_of(delta).values()]

    def tensors(self) -> list[torch.Tensor]:
        """All that is learned."""
        return [*self.vectors.values(), *self.weights()]


def start(pipe, word: str, settings: TrainSettings) -> Learned:
    """Changes that are zero, and vectors that mean what the class word means to each text encoder.

    Raises `WeaverError` for a word that a tokenizer does not read.
    """
    vectors = {}
    for name, encoder in text_encoders(pipe).items():
        tokenizer = getattr(pipe, name.replace("text_encoder", "tokenizer"))
        ids = tokenizer(word, add_special_tokens=False).input_ids
        if not ids:
            raise WeaverError(f"the class word {word!r} means nothing to the tokenizer")
        meant = encoder.get_input_embeddings().weight[ids].detach().float().mean(0)
        vectors[name] = meant.repeat(settings.vectors, 1).requires_grad_()
    generator = torch.Generator("cpu").manual_seed(settings.seed)
    linears = attn2_projections(pipe.unet) if settings.layers == "keys-values" else transformer_linears(pipe.unet)
    deltas = {path: _no_change(linear.weight, settings.rank, generator) for path, linear in linears.items()}
    return Learned(vectors, deltas)


def _no_change(weight: torch.Tensor, rank: int, generator: torch.Generator) -> Delta:
    """A change of zero to be learned: a matrix, or factors of which only `up` is zero, so that it has a gradient."""
    if not rank:
        return torch.zeros_like(weight, dtype=torch.float32, requires_grad=True)
    outputs, inputs = weight.shape
    if rank > max(outputs, inputs):
        raise WeaverError(f"rank is {rank}, more than a matrix of {outputs} x {inputs} has sides: take a smaller one")
    down = torch.randn(rank, inputs, generator=generator) / rank
    return LowRank(down.to(weight.device).requires_grad_(), weight.new_zeros(outputs, rank).float().requires_grad_())
