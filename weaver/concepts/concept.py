"""A learned concept: what it changes of a base model, and nothing else."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from weaver.concepts.changes import Delta, change_fits, change_shape
from weaver.concepts.concept_checks import CHANGED, GROUPS, OUTPUT_BIAS, concept_reasons
from weaver.concepts.concept_file import ConceptError, read_concept_tensors, write_concept_tensors
from weaver.conditioning import text_encoders
from weaver.hashing import remembered
from weaver.layers import cross_attention_paths

__all__ = ["Concept", "ConceptError", "attn2_hash", "attn2_parameters", "attn2_projections", "text_module"]


def attn2_projections(unet: torch.nn.Module, names: Sequence[str] = ("to_k", "to_v")) -> dict[str, torch.nn.Linear]:
    """Find the projections of every cross-attention of a U-Net: those of keys and values, or other ones by `names`.

    Returns ``{"<path>.attn2.to_k": Linear, "<path>.attn2.to_v": Linear, ...}`` in the U-Net's own order.
    Where an adapter library wraps a projection, this is the wrapped base layer.
    """
    found = {}
    for path in cross_attention_paths(unet):
        for name in names:
            linear = unet.get_submodule(f"{path}.{name}")
            found[f"{path}.{name}"] = getattr(linear, "base_layer", linear)
    return found


def attn2_parameters(unet: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Whatever a concept can change of every cross-attention, by the keys of its `Concept.deltas`.

    Returns ``{"<path>.attn2.to_k": [out, in], ..., "<path>.attn2.to_out.0.bias": [out]}``.
    """
    found = {}
    for key, linear in attn2_projections(unet, CHANGED).items():
        found[key] = linear.weight
        if key.endswith(OUTPUT_BIAS.removesuffix(".bias")) and linear.bias is not None:
            found[f"{key}.bias"] = linear.bias
    return found


def attn2_hash(unet: torch.nn.Module) -> str:
    """Hash the cross-attention key and value weights, the part of a base model that a concept is a delta of.

    Values are rounded to float16 on the CPU first: the same checkpoint loaded as float16 or float32, on any device,
    gives the same hash. bfloat16 keeps fewer bits than float16, so a model loaded in it has another hash.

    Returns the SHA-256 of names, shapes and values as 64 hex digits.
    """

    def compute(weights) -> str:
        digest = hashlib.sha256()
        for name, weight in weights:
            weight = weight.cpu().to(torch.float16).contiguous()
            digest.update(f"{name} {tuple(weight.shape)}\n".encode())
            digest.update(weight.numpy().astype("<f2", copy=False).tobytes())
        return digest.hexdigest()

    weights = ((name, linear.weight) for name, linear in sorted(attn2_projections(unet).items()))
    return remembered("keys and values", weights, compute)


@dataclass(frozen=True, eq=False)
class Concept:
    """One personalised subject, background or style, as changes of one base model (Concept Weaver, section 3.1).

    A change of a weight [out, in] is a matrix, or a `LowRank` with down [r, in] and up [out, r].

    Parameters
    ----------
    name : what people call it, such as "tuxedo".
    token : what prompts call it. With `embeddings` a modifier token such as "<v1>", without white space; without them
        words that the base model knows and the concept was trained on, such as "sks"; empty for a concept whose class
        word is all that names it.
    word : the class word that the token stands before, such as "cat".
    base_hash : `attn2_hash` of the U-Net that the changes belong to; empty for whichever they fit, as LoRAs are used.
    embeddings : ``{"text_encoder": [V, C]}``, the V vectors that the token stands for, per text encoder: for SDXL with
        ``"text_encoder_2": [V, C_2]``.
    deltas : ``{"<path>.attn2.to_k": change, ...}``, added to the U-Net's weights. Custom Diffusion learns `to_k` and
        `to_v`; LoRA has `to_q` and `to_out.0` too, which are fused exactly, each at the cost of what it changes. So is
        "<path>.attn2.to_out.0.bias" [out].
    text_deltas : ``{"text_encoder.<path>": change, ...}``, added to a text encoder's weights for this concept's prompt.
    outside : ``{"<path>": change, ...}``, changes of the U-Net outside cross-attention: a fusion adds them in the
        concept's region (`weaver.fusion.regional`). Of a convolution down is [r, in, h, w] and up [out, r, 1, 1].
    settings : how it was trained (steps, learning rates, seed, prior); plain JSON values.
    versions : library versions at training; plain JSON values.

    Raises `ConceptError` with every reason found, when a value is unusable.
    """

    name: str
    token: str
    word: str
    base_hash: str = ""
    embeddings: Mapping[str, torch.Tensor] = field(default_factory=dict)
    deltas: Mapping[str, Delta] = field(default_factory=dict)
    text_deltas: Mapping[str, Delta] = field(default_factory=dict)
    outside: Mapping[str, Delta] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if reasons := concept_reasons(self):
            raise ConceptError(f"concept {self.name!r} can't be used: " + "; ".join(reasons))

    @property
    def modifier(self) -> str:
        """The token where it is one that means nothing without its embeddings; empty for words that the base knows."""
        return self.token if self.embeddings else ""

    @property
    def vectors(self) -> int:
        """The number V of vectors that the modifier token stands for; 0 for words that the base model knows."""
        return next((len(value) for value in self.embeddings.values()), 0)

    def save(self, path: str | os.PathLike) -> Path:
        """Write one safetensors file, whole or not at all; returns its path."""
        path = Path(path)
        write_concept_tensors(path, vars(self), {group: getattr(self, group) for group in GROUPS})
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> Concept:
        """Read a file written by `save`; anything else is refused by a `ConceptError` that names the file."""
        path = Path(path)
        texts, groups = read_concept_tensors(path, GROUPS)
        try:
            return cls(**texts, **groups)
        except ConceptError as error:
            raise ConceptError(f"{path}: {error}") from error

    def embedding_reasons(self, pipe) -> list[str]:
        """Why the token's vectors do not fit the pipeline's text encoders; empty when they do."""
        widths = {key: part.get_input_embeddings().weight.shape[1] for key, part in text_encoders(pipe).items()}
        lacking = widths.keys() - self.embeddings.keys() if self.embeddings else ()
        missing = [f"its token has no embedding for {key}" for key in widths if key in lacking]
        return missing + [
            f"its token has width {vectors.shape[1]} in {key}, the model's is {widths.get(key)}"
            for key, vectors in self.embeddings.items()
            if vectors.shape[1] != widths.get(key)
        ]

    def text_reasons(self, pipe) -> list[str]:
        """Which of the text encoders' changes the pipeline's have no place for; empty when all fit."""
        odd = []
        for key, delta in self.text_deltas.items():
            module = text_module(pipe, key)
            if module is None or tuple(module.weight.shape) != change_shape(delta):
                odd.append(key)
        return [f"{len(odd)} of its changes of text encoders do not fit them, {odd[0]} among them"] if odd else []

    def check_base(self, pipe, base_hash: str | None = None, weights: Mapping[str, torch.Tensor] | None = None) -> None:
        """Raise `ConceptError` unless `pipe` has the base model that this concept was trained on, or one that it fits.

        `base_hash` and `weights` are the `attn2_hash` and `attn2_parameters` of its U-Net where they are known already.
        """
        weights = attn2_parameters(pipe.unet) if weights is None else weights
        odd = sorted(
            name
            for name, delta in self.deltas.items()
            if name not in weights or tuple(weights[name].shape) != change_shape(delta)
        )
        reasons = []
        if odd:
            reasons.append(f"{len(odd)} of its {len(self.deltas)} weights do not fit the U-Net, {odd[0]} among them")
        reasons += self.embedding_reasons(pipe) + self.text_reasons(pipe)
        if not reasons and self.base_hash and (found := base_hash or attn2_hash(pipe.unet)) != self.base_hash:
            reasons.append(f"its base has hash {self.base_hash[:12]}..., this one {found[:12]}...")
        if reasons:
            fix = "load the model it was trained on (in float16 or float32), or train it again"
            raise ConceptError(f"concept {self.name!r} belongs to another base model: {'; '.join(reasons)}; {fix}")

    def check_outside(self, pipe) -> None:
        """Raise `ConceptError` where what is changed outside of cross-attention has no place in the U-Net of `pipe`.

        That is no part of `check_base`: a concept's cross-attention can be used alone, see `weaver.ConceptUse`.
        """
        modules = dict(pipe.unet.named_modules())
        odd = [path for path, delta in self.outside.items() if not change_fits(modules.get(path), delta)]
        if odd:
            raise ConceptError(
                f"concept {self.name!r} belongs to another base model: {len(odd)} of the {len(self.outside)} modules "
                f"that it changes outside of cross-attention do not fit, {odd[0]} among them; load the model it was "
                "trained on"
            )


def text_module(pipe, key: str) -> torch.nn.Linear | None:
    """The projection that a key of `Concept.text_deltas` names; transformers nests it in `text_model` or not."""
    name, _, path = key.partition(".")
    encoder = text_encoders(pipe).get(name)
    for nested in (path, path.removeprefix("text_model."), f"text_model.{path}"):
        try:
            return encoder.get_submodule(nested)
        except AttributeError:
            continue
    return None
