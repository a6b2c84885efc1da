"""What a file of somebody else's training says, in the terms of a concept, before its base model is known."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from weaver.concepts.changes import Delta
from weaver.concepts.concept import Concept, ConceptError, attn2_hash, attn2_parameters
from weaver.concepts.concept_checks import OUTPUT_BIAS
from weaver.errors import told

__all__ = ["BASE_KEY", "ParsedFile"]

BASE_KEY = "concept_weaver_base"
"""Where the header of a safetensors file in another program's layout has the `attn2_hash` of the base model."""

_MODIFIER = re.compile(r"<\S+>")
_HALF_STEP = 2.0**-24  # between float16's numbers next to zero


@dataclass(frozen=True, eq=False)
class ParsedFile:
    """The content of one file of a known format.

    Parameters
    ----------
    format : what kind of file it is, as messages call it: "diffusers LoRA".
    weights : ``{"<path>.attn2.to_k": [out, in], ..., "<path>.attn2.to_out.0.bias": [out]}``, in the place of the base
        model's (Custom Diffusion).
    deltas, text_deltas, outside : what is added to weights, as in `Concept`.
    embeddings : ``{token: {"text_encoder": [V, C], ...}}``, of every token in the file, or in files beside it.
    token_files : ``{token: name}``, the files beside it that tokens were taken from.
    config_file : the file beside it that its settings were read from (PEFT's), empty for none.
    settings : what the file tells of its training; plain JSON values.
    unchanged : ``{"unet.<parameter>": tensor}``, whole parameters that no concept can change: they must be the base
        model's.
    base_hash : `attn2_hash` of the U-Net that the changes belong to, which none but our own converter writes; "" if it
        is not told
    lacks : why there is no token and how to mend it, where the concept needs one; empty where it does not.
    """

    format: str
    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)
    deltas: Mapping[str, Delta] = field(default_factory=dict)
    text_deltas: Mapping[str, Delta] = field(default_factory=dict)
    outside: Mapping[str, Delta] = field(default_factory=dict)
    embeddings: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    token_files: Mapping[str, str] = field(default_factory=dict)
    config_file: str = ""
    settings: Mapping[str, object] = field(default_factory=dict)
    unchanged: Mapping[str, torch.Tensor] = field(default_factory=dict)
    base_hash: str = ""
    lacks: str = ""

    def files_beside(self, token: str | None = None) -> list[str]:
        """The names of the other files that the concept of this token is read from; None is the only token."""
        token = next(iter(self.embeddings)) if token is None and len(self.embeddings) == 1 else token
        return [name for name in (self.token_files.get(token), self.config_file) if name]

    @property
    def needs_base(self) -> bool:
        """Whether there is no concept of it without the model that it was trained on, whose weights it replaces."""
        return bool(self.weights or self.unchanged)

    def concept(self, pipe=None, *, name: str, word: str, token: str | None = None) -> Concept:
        """The concept that this is on the base model of `pipe`.

        Parameters
        ----------
        pipe : None will do unless the file `needs_base`; that the concept fits a model is then checked where it is used
        name, word : as in `Concept`.
        token : which of the file's tokens; None is the only one, and one in angle brackets is what an only one that is
            not is called from now on. Where the file has none, the words that it was trained on, None for none.

        Raises `ConceptError` where `token` must be told or is not in the file, and where weights do not fit the model.
        """
        if pipe is None and self.needs_base:
            raise ConceptError(
                f"its weights take the place of the base model's ({self.format}): tell its model, --model"
            )
        chosen, embeddings = self.token(token)
        self._check_unchanged(pipe)
        deltas = dict(self.deltas) | self._differences(pipe)
        # Differences are this base's alone; what was learned as an addition is used on whatever it fits, unless told.
        found = attn2_hash(pipe.unet) if self.weights else ""
        base_hash = self.base_hash or found
        settings = {"format": self.format} | dict(self.settings)
        concept = Concept(
            name, chosen, word, base_hash, embeddings, deltas, self.text_deltas, self.outside, settings=settings
        )
        if pipe is not None:
            concept.check_base(pipe, found or None)
        return concept

    def token(self, token: str | None = None) -> tuple[str, Mapping[str, torch.Tensor]]:
        """The token that is meant by `token`, as in `concept`, and its embeddings by text encoder; none for words."""
        if not self.embeddings:
            if self.lacks and (not token or _MODIFIER.search(token)):
                raise ConceptError(f"{self.format}: {self.lacks}")
            return token or "", {}
        if token is None and len(self.embeddings) == 1:
            return next(iter(self.embeddings.items()))
        if len(self.embeddings) == 1 and _MODIFIER.search(token) and not _MODIFIER.search(next(iter(self.embeddings))):
            return token, next(iter(self.embeddings.values()))  # its own is a word, which prompts may mean otherwise
        if token not in self.embeddings:
            known = ", ".join(self.embeddings)
            asked = "tell which token" if token is None else f"no token {told(token)}"
            raise ConceptError(f"{asked}: the file has {known}")
        return token, self.embeddings[token]

    def _check_unchanged(self, pipe) -> None:
        """Raise `ConceptError` where a parameter that no concept can change is not the base model's, to rounding."""
        differing = {}
        for name, value in self.unchanged.items():
            base = _parameter(pipe, name)
            if base is None or base.shape != value.shape:
                raise ConceptError(f"{name} does not fit the model: load the one it was trained on")
            if not _rounds_to(value, base):
                differing[name] = (value.double() - base.detach().double().cpu()).abs().max().item()
        if differing:
            name, most = max(differing.items(), key=lambda entry: entry[1])
            raise ConceptError(
                f"it changes {len(differing)} parameters that can't be fused, {name} most (by up to {most:.2g}): train "
                "cross-attention alone (freeze_model crossattn_kv or crossattn)"
            )

    def _differences(self, pipe) -> dict[str, torch.Tensor]:
        """The weights less those of the base model, in half precision, which keeps three digits of a small change.

        Biases, which are few, are in single precision; those that were not trained are left out.
        """
        base = attn2_parameters(pipe.unet) if self.weights else {}
        odd = [key for key, value in self.weights.items() if key not in base or base[key].shape != value.shape]
        if odd:
            raise ConceptError(
                f"{len(odd)} of its {len(self.weights)} weights do not fit the U-Net, {sorted(odd)[0]} among them: "
                "load the model it was trained on"
            )
        found = {}
        for key, value in self.weights.items():
            difference = value.float() - base[key].detach().float().cpu()
            if not key.endswith(OUTPUT_BIAS):
                found[key] = difference.half()
            elif not _rounds_to(value, base[key]):
                found[key] = difference
        return found


def _rounds_to(value: torch.Tensor, base: torch.Tensor) -> bool:
    """Whether a parameter is the base model's but for the rounding of either's dtype."""
    coarse = max(torch.finfo(value.dtype).eps, torch.finfo(base.dtype).eps)
    return torch.allclose(value.double(), base.detach().double().cpu(), rtol=coarse, atol=_HALF_STEP)


def _parameter(pipe, name: str) -> torch.Tensor | None:
    """A parameter by its part of the pipeline and its path, also where an adapter library wraps its module."""
    path, _, kind = name.rpartition(".")
    module = pipe
    for step in path.split("."):
        module = getattr(module, step, None)
    found = getattr(getattr(module, "base_layer", module), kind, None)
    return found if isinstance(found, torch.Tensor) else None
