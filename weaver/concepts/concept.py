"""A learned concept: what Custom Diffusion changes, and nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from weaver.conditioning import text_encoders
from weaver.errors import WeaverError
from weaver.hashing import remembered
from weaver.layers import cross_attention_paths

__all__ = ["FORMAT", "FORMAT_VERSION", "Concept", "ConceptError", "attn2_hash", "attn2_projections"]

FORMAT = "concept-weaver/concept"
FORMAT_VERSION = 1
_CHANGED = ("to_k", "to_v", "to_q", "to_out.0")
_PARTNERS = {"to_k": "to_v", "to_v": "to_k"}
_FIELDS = ("name", "token", "word", "base_hash", "settings", "versions")


class ConceptError(WeaverError):
    """A concept file, or a concept's values, that can't be used; names the file or the field."""


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
    """One personalised subject or background, as deltas on one base model (Concept Weaver, section 3.1).

    Parameters
    ----------
    name : what people call it, such as "tuxedo".
    token : the modifier token as written in prompts, such as "<v1>"; no white space.
    word : the class word the token stands before, such as "cat".
    base_hash : `attn2_hash` of the U-Net that the deltas belong to.
    embeddings : ``{"text_encoder": [V, C]}``, the V vectors that the token stands for, per text encoder: for SDXL with
        ``"text_encoder_2": [V, C_2]``.
    deltas : ``{"<path>.attn2.to_k": [out, in], ...}``, added to the base's weights. Custom Diffusion learns `to_k` and
        `to_v`; LoRA has `to_q` and `to_out.0` too, which are fused exactly, each at the cost of what it changes.
    settings : how it was trained (steps, learning rates, seed, prior); plain JSON values.
    versions : library versions at training; plain JSON values.

    Raises `ConceptError` with every reason found, when a value is unusable.
    """

    name: str
    token: str
    word: str
    base_hash: str
    embeddings: Mapping[str, torch.Tensor]
    deltas: Mapping[str, torch.Tensor]
    settings: Mapping[str, object] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if reasons := _reasons(self):
            raise ConceptError(f"concept {self.name!r} can't be used: " + "; ".join(reasons))

    @property
    def vectors(self) -> int:
        """The number V of vectors that the modifier token stands for."""
        return next(iter(self.embeddings.values())).shape[0]

    def save(self, path: str | os.PathLike) -> Path:
        """Write one safetensors file, whole or not at all; returns its path."""
        path = Path(path)
        tensors = {f"embeddings/{key}": value for key, value in self.embeddings.items()}
        tensors |= {f"deltas/{key}": value for key, value in self.deltas.items()}
        tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        metadata = {"format": FORMAT, "format_version": str(FORMAT_VERSION)}
        metadata |= {key: getattr(self, key) for key in ("name", "token", "word", "base_hash")}
        metadata |= {key: json.dumps(dict(getattr(self, key)), sort_keys=True) for key in ("settings", "versions")}
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(handle)
        try:
            save_file(tensors, partial, metadata)
            os.chmod(partial, 0o666 & ~_umask())  # mkstemp makes files only their owner can read
            os.replace(partial, path)
        except BaseException:
            os.unlink(partial)
            raise
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> Concept:
        """Read a file written by `save`; anything else is refused by a `ConceptError` that names the file."""
        path = Path(path)
        if not path.is_file():
            raise ConceptError(f"{path}: no such concept file")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                _check_metadata(path, metadata)
                tensors = {key: file.get_tensor(key) for key in file.keys()}
            plain = {key: json.loads(metadata[key]) for key in ("settings", "versions")}
        except (SafetensorError, json.JSONDecodeError, OSError) as error:
            raise ConceptError(f"{path}: not a readable safetensors file, or cut short ({error})") from error
        groups: dict[str, dict[str, torch.Tensor]] = {"embeddings": {}, "deltas": {}}
        for key, tensor in tensors.items():
            group, _, rest = key.partition("/")
            if group not in groups or not rest:
                raise ConceptError(f"{path}: unknown tensor {key!r}; expected embeddings/... and deltas/...")
            groups[group][rest] = tensor
        try:
            names = {key: metadata[key] for key in ("name", "token", "word", "base_hash")}
            return cls(**names, **groups, **plain)
        except ConceptError as error:
            raise ConceptError(f"{path}: {error}") from error

    def embedding_reasons(self, pipe) -> list[str]:
        """Why the token's vectors do not fit the pipeline's text encoders; empty when they do."""
        widths = {key: part.get_input_embeddings().weight.shape[1] for key, part in text_encoders(pipe).items()}
        missing = [f"its token has no embedding for {key}" for key in widths if key not in self.embeddings]
        return missing + [
            f"its token has width {vectors.shape[1]} in {key}, the model's is {widths.get(key)}"
            for key, vectors in self.embeddings.items()
            if vectors.shape[1] != widths.get(key)
        ]

    def check_base(self, pipe, base_hash: str | None = None) -> None:
        """Raise `ConceptError` unless `pipe` has the base model that this concept was trained on.

        `base_hash` is the `attn2_hash` of its U-Net where it is known already; None computes it.
        """
        weights = {name: tuple(linear.weight.shape) for name, linear in attn2_projections(pipe.unet, _CHANGED).items()}
        deltas = {name: tuple(delta.shape) for name, delta in self.deltas.items()}
        reasons = []
        if odd := sorted(name for name, shape in deltas.items() if weights.get(name) != shape):
            reasons.append(f"{len(odd)} of its {len(deltas)} weights do not fit the U-Net, {odd[0]} among them")
        reasons += self.embedding_reasons(pipe)
        if not reasons and (found := base_hash or attn2_hash(pipe.unet)) != self.base_hash:
            reasons.append(f"its base has hash {self.base_hash[:12]}..., this one {found[:12]}...")
        if reasons:
            fix = "load the model it was trained on (in float16 or float32), or train it again"
            raise ConceptError(f"concept {self.name!r} belongs to another base model: {'; '.join(reasons)}; {fix}")


def _reasons(concept: Concept) -> list[str]:
    reasons = [f"{key} is empty" for key in ("name", "token", "word", "base_hash") if not getattr(concept, key)]
    if any(c.isspace() for c in concept.token):
        reasons.append(f"token {concept.token!r} has white space in it")
    reasons += [f"{key} is missing" for key in ("embeddings", "deltas") if not getattr(concept, key)]
    reasons += [
        f"{key} is not a JSON object"
        for key in ("settings", "versions")
        if not isinstance(getattr(concept, key), Mapping)
    ]
    counts = {value.shape[0] for value in concept.embeddings.values() if value.ndim == 2}
    if len(counts) > 1:
        reasons.append(f"its text encoders disagree on the number of vectors: {sorted(counts)}")
    for group in ("embeddings", "deltas"):
        for key, value in getattr(concept, group).items():
            if value.ndim != 2 or 0 in value.shape:
                reasons.append(f"{group}/{key} has shape {tuple(value.shape)}, expected two axes")
            elif not value.is_floating_point():
                reasons.append(f"{group}/{key} has dtype {value.dtype}, expected floating point")
            elif not torch.isfinite(value).all():
                reasons.append(f"{group}/{key} has NaN or infinite values")
    for key in concept.deltas:
        head, found, kind = key.rpartition("attn2.")
        if kind not in _CHANGED or not (not head or head.endswith(".")):
            reasons.append(f"deltas/{key} is no cross-attention projection (....attn2. and {', '.join(_CHANGED)})")
        elif kind in _PARTNERS and f"{head}{found}{_PARTNERS[kind]}" not in concept.deltas:
            reasons.append(f"deltas/{key} has no partner for the other of to_k and to_v")
    return reasons


def _check_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise ConceptError(f"{path}: not a concept file (format {metadata.get('format')!r}, expected {FORMAT!r})")
    if metadata.get("format_version") != str(FORMAT_VERSION):
        version = metadata.get("format_version")
        raise ConceptError(f"{path}: concept format version {version}, this release reads {FORMAT_VERSION}")
    if missing := [key for key in _FIELDS if key not in metadata]:
        raise ConceptError(f"{path}: metadata lacks {', '.join(missing)}")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
