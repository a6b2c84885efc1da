"""A concept as diffusers' Custom Diffusion example writes it: whole weights in the place of the base model's."""

from __future__ import annotations

import torch

from weaver.concepts.changes import Delta
from weaver.concepts.concept import Concept, ConceptError, attn2_parameters
from weaver.concepts.concept_checks import OUTPUT_BIAS
from weaver_kernels import LowRank

__all__ = ["custom_diffusion_weights"]

_PARAMETERS = {
    "to_k": "to_k_custom_diffusion.weight",
    "to_v": "to_v_custom_diffusion.weight",
    "to_q": "to_q_custom_diffusion.weight",
    "to_out.0": "to_out_custom_diffusion.0.weight",
    OUTPUT_BIAS: "to_out_custom_diffusion.0.bias",
}
_KEYS_VALUES, _QUERIES_OUTPUTS = ("to_k", "to_v"), ("to_q", "to_out.0", OUTPUT_BIAS)


def custom_diffusion_weights(concept: Concept, pipe) -> dict[str, torch.Tensor]:
    """The weights of the cross-attentions that a concept changes on its base, by the names of their processors.

    The loader of diffusers takes keys and values of a layer together, and queries with outputs and their bias: what
    the concept leaves is the base model's. Raises `ConceptError` for changes that have no place in this layout.
    """
    reasons = [
        f"{len(changes)} changes {where}"
        for where, changes in (
            ("outside cross-attention", concept.outside),
            ("of text encoders", concept.text_deltas),
        )
        if changes
    ]
    if len(concept.embeddings) > 1:
        reasons.append("a token for two text encoders")
    if reasons or not concept.deltas:
        what = " and ".join(reasons) or "no changes of cross-attention"
        raise ConceptError(
            f"concept {concept.name!r} has {what}: Custom Diffusion's layout has no place for that, convert it to "
            + ("a LoRA" if concept.deltas or concept.text_deltas else "weaver")
        )
    concept.check_base(pipe)
    layers = dict.fromkeys(key.rpartition(".attn2.")[0] for key in concept.deltas)
    base, weights = attn2_parameters(pipe.unet), {}
    for layer in layers:
        names = _KEYS_VALUES
        if any(f"{layer}.attn2.{name}" in concept.deltas for name in _QUERIES_OUTPUTS):
            names += _QUERIES_OUTPUTS
        for name in names:
            key, to = f"{layer}.attn2.{name}", f"{layer}.attn2.processor.{_PARAMETERS[name]}"
            weights[to] = _changed(base[key], concept.deltas.get(key))
    return weights


def _changed(weight: torch.Tensor, change: Delta | None) -> torch.Tensor:
    """A parameter of the base model with a change added, in its own dtype."""
    whole = weight.detach().float().cpu()
    if isinstance(change, LowRank):
        whole = whole + change.up.float() @ change.down.float()
    elif change is not None:
        whole = whole + change.float()
    return whole.to(weight.dtype).contiguous()
