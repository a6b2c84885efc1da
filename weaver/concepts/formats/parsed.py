"""What a file of somebody else's training says, in the terms of a concept, before its base model is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from weaver.concepts.changes import Delta
from weaver.concepts.concept import Concept, ConceptError, attn2_hash, attn2_projections
from weaver.errors import told

__all__ = ["ParsedFile"]


@dataclass(frozen=True, eq=False)
class ParsedFile:
    """The content of one file of a known format.

    Parameters
    ----------
    format : what kind of file it is, as messages call it: "diffusers LoRA".
    weights : ``{"<path>.attn2.to_k": [out, in], ...}``, in the place of the base model's (Custom Diffusion).
    deltas, text_deltas, outside : what is added to weights, as in `Concept`.
    embeddings : ``{token: {"text_encoder": [V, C], ...}}``, of every token in the file.
    settings : what the file tells of its training; plain JSON values.
    """

    format: str
    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)
    deltas: Mapping[str, Delta] = field(default_factory=dict)
    text_deltas: Mapping[str, Delta] = field(default_factory=dict)
    outside: Mapping[str, Delta] = field(default_factory=dict)
    embeddings: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)

    def concept(self, pipe, *, name: str, word: str, token: str | None = None) -> Concept:
        """The concept that this is on the base model of `pipe`.

        Parameters
        ----------
        name, word : as in `Concept`.
        token : which of the file's tokens; None is the only one. Where the file has none, the words that it was trained
            on, None for none.

        Raises `ConceptError` where `token` must be told or is not in the file, and where weights do not fit the model.
        """
        chosen, embeddings = self.token(token)
        deltas = dict(self.deltas) | self._differences(pipe)
        # Differences are this base's alone; what was learned as an addition is used on whatever it fits.
        base_hash = attn2_hash(pipe.unet) if self.weights else ""
        settings = {"format": self.format} | dict(self.settings)
        concept = Concept(
            name, chosen, word, base_hash, embeddings, deltas, self.text_deltas, self.outside, settings=settings
        )
        concept.check_base(pipe, base_hash or None)
        return concept

    def token(self, token: str | None = None) -> tuple[str, Mapping[str, torch.Tensor]]:
        """The token that is meant by `token`, as in `concept`, and its embeddings by text encoder; none for words."""
        if not self.embeddings:
            return token or "", {}
        if token is None and len(self.embeddings) == 1:
            return next(iter(self.embeddings.items()))
        if token not in self.embeddings:
            known = ", ".join(self.embeddings)
            asked = "tell which token" if token is None else f"no token {told(token)}"
            raise ConceptError(f"{asked}: the file has {known}")
        return token, self.embeddings[token]

    def _differences(self, pipe) -> dict[str, torch.Tensor]:
        """The weights less those of the base model, in half precision, which keeps three digits of a small change."""
        names = ("to_k", "to_v", "to_q", "to_out.0")
        base = attn2_projections(pipe.unet, names) if self.weights else {}
        odd = [key for key, value in self.weights.items() if key not in base or base[key].weight.shape != value.shape]
        if odd:
            raise ConceptError(
                f"{len(odd)} of its {len(self.weights)} weights do not fit the U-Net, {sorted(odd)[0]} among them: "
                "load the model it was trained on"
            )
        return {
            key: (value.float() - base[key].weight.detach().float().cpu()).half() for key, value in self.weights.items()
        }
