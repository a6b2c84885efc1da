"""Custom Diffusion (arXiv 2212.04488): the `delta.bin` of its authors, and what diffusers' example writes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch

from weaver.concepts.changes import Delta
from weaver.concepts.concept import ConceptError
from weaver.concepts.concept_checks import OUTPUT_BIAS
from weaver.concepts.formats.opening import OpenedFile, open_tensors
from weaver.concepts.formats.parsed import ParsedFile
from weaver.concepts.formats.textual_inversion import as_vectors, refuse_large
from weaver.concepts.formats.token_file import TokenBeside
from weaver.errors import told
from weaver_kernels import LowRank

__all__ = ["parse", "recognises"]

_MOST_OF_A_TOKEN = 1 << 20  # bytes
_ENCODERS = ("text_encoder", "text_encoder_2")
_TOKENS = ("modifier_token", "modifier_token_2")
_CHANGED = re.compile(r"(.+\.attn2\.(?:to_q|to_k|to_v|to_out\.0))\.weight")
_BIAS = re.compile(r".+\.attn2\." + re.escape(OUTPUT_BIAS))
_PROCESSOR = re.compile(r"(.+)\.processor\.(to_[qkv]|to_out)_custom_diffusion((?:\.0)?\.(?:weight|bias))")
_LACKS = (
    "the file with its token (such as <new1>.bin) does not lie beside it: put it there, or tell as token the plain "
    "words that it was trained on"
)


def recognises(opened: OpenedFile) -> bool:
    """Whether a file is of either layout, by names and shapes: it need not be loaded."""
    tokens = [of for key in _TOKENS if isinstance(of := opened.tensors.get(key), Mapping)]
    for token, value in (entry for of in tokens for entry in of.items()):
        for part in value if isinstance(value, list | tuple) else [value]:
            refuse_large(opened, token, part)
    return _is_the_authors(opened) or _is_diffusers(opened)


def parse(opened: OpenedFile) -> ParsedFile | None:
    """Read either layout; None for files of another kind.

    Weights stand in the place of the base model's, factors u [out, r] and v [r, in] are added as u @ v. Parameters of
    the U-Net that a concept can't change are kept for a comparison with the base model.
    """
    if _is_the_authors(opened):
        return _of_the_authors(opened)
    return _of_diffusers(opened) if _is_diffusers(opened) else None


def _is_the_authors(opened: OpenedFile) -> bool:
    return any(isinstance(opened.tensors.get(key), Mapping) for key in ("unet", *_TOKENS))


def _is_diffusers(opened: OpenedFile) -> bool:
    return any(".processor." in str(key) and "_custom_diffusion." in str(key) for key in opened.tensors)


def _of_the_authors(opened: OpenedFile) -> ParsedFile:
    tree = opened.tensors
    odd = [key for key, value in tree.items() if key not in ("unet", *_TOKENS) and _holds_tensors(value)]
    if odd:
        raise opened.error(
            f"it has {told(odd[0])} beside 'unet' and 'modifier_token': a model trained as a whole is no concept; "
            "train it with freeze_model crossattn_kv, and the text encoder fixed"
        )
    weights, deltas, outside, unchanged = {}, {}, {}, {}
    for key, value in _mapping(opened, "unet").items():
        place = _CHANGED.fullmatch(key)
        if isinstance(value, Mapping):
            of = deltas if place else outside
            of[key.removesuffix(".weight")] = _factors(opened, key, value)
        elif place:
            weights[place[1]] = _matrix(opened, key, value)
        elif _BIAS.fullmatch(key):
            weights[key] = _vector(opened, key, value)
        else:
            unchanged[f"unet.{key}"] = _tensor(opened, key, value)
    kind = "Custom Diffusion's delta, compressed" if deltas or outside else "Custom Diffusion's delta"
    tokens = _tokens(opened)
    if not (weights or deltas or tokens):
        raise opened.error(
            "neither its 'unet' nor its 'modifier_token' has anything that could be fused: save it again"
        )
    lacks = "" if tokens else "it has no modifier token: tell as token the plain words that it was trained on"
    return ParsedFile(
        kind, weights, deltas, outside=outside, embeddings=tokens, unchanged=unchanged, lacks=lacks
    )  # fmt: skip


def _of_diffusers(opened: OpenedFile) -> ParsedFile:
    weights, unchanged = {}, {}
    for key, value in opened.tensors.items():
        if isinstance(value, Mapping) and not value:  # a layer that was not trained
            continue
        found = _PROCESSOR.fullmatch(key)
        if not found:
            raise opened.error(f"{told(key)} is no part of Custom Diffusion's weights: it is not known what it changes")
        name = f"{found[1]}.{found[2]}{found[3]}"
        if place := _CHANGED.fullmatch(name):
            weights[place[1]] = _matrix(opened, key, value)
        elif _BIAS.fullmatch(name):
            weights[name] = _vector(opened, key, value)
        else:
            unchanged[f"unet.{name}"] = _tensor(opened, key, value)
    if not weights:
        raise opened.error("none of its weights are a cross-attention's (attn2), so nothing could be fused")
    beside = _tokens_beside(opened)
    return ParsedFile("Custom Diffusion of diffusers", weights, unchanged=unchanged, **beside._asdict())


def _tokens(opened: OpenedFile) -> dict[str, dict[str, torch.Tensor]]:
    """The vectors of each token by text encoder: in one entry, or in an entry for each."""
    first, second = (_mapping(opened, key) for key in _TOKENS)
    if second and first.keys() != second.keys():
        raise opened.error(f"modifier_token has {told(list(first))}, and modifier_token_2 has {told(list(second))}")
    tokens = {}
    for token, value in first.items():
        parts = value if isinstance(value, list) else [value]
        parts = [*parts, second[token]] if second else parts
        if not 1 <= len(parts) <= len(_ENCODERS):
            raise opened.error(f"token {told(token)} has vectors for {len(parts)} text encoders, expected one or two")
        tokens[token] = {
            encoder: as_vectors(opened, token, part) for encoder, part in zip(_ENCODERS, parts, strict=False)
        }
    return tokens


def _tokens_beside(opened: OpenedFile) -> TokenBeside:
    """The tokens of the files in the same folder that are called after theirs, `<new1>.bin`, `{token: vector}` each."""
    tokens, files = {}, {}
    for path in sorted(opened.path.parent.iterdir()):
        if path.suffix in (".bin", ".safetensors", ".pt") and path.is_file() and _is_a_tokens(path):
            beside = open_tensors(path)
            for token, value in beside.tensors.items():
                refuse_large(beside, token, value)
            beside = beside.loaded()
            for token, value in beside.tensors.items():
                tokens[token], files[token] = {_ENCODERS[0]: as_vectors(beside, token, value)}, path.name
    return TokenBeside(tokens, files, "" if tokens else _LACKS)


def _is_a_tokens(path: Path) -> bool:
    """Whether a file is called <...>, or holds one entry, of its own name, and is as small as a token's file."""
    if path.stem.startswith("<") and path.stem.endswith(">"):
        return True
    if path.stat().st_size > _MOST_OF_A_TOKEN:
        return False
    with suppress(ConceptError):
        return list(open_tensors(path).tensors) == [path.stem]
    return False


def _mapping(opened: OpenedFile, key: str) -> Mapping[str, object]:
    value = opened.tensors.get(key)
    if not isinstance(value, Mapping | None):
        raise opened.error(f"{key} is a {type(value).__name__}, expected tensors by name")
    return value or {}


def _factors(opened: OpenedFile, key: str, value: Mapping[str, object]) -> Delta:
    if set(value) != {"u", "v"}:
        raise opened.error(f"{told(key)} has {told(sorted(value))}, expected the factors u and v")
    up, down = _matrix(opened, f"{key} u", value["u"]), _matrix(opened, f"{key} v", value["v"])
    if up.shape[1] != down.shape[0]:
        raise opened.error(f"{told(key)} has factors {tuple(up.shape)} and {tuple(down.shape)}, which do not multiply")
    return LowRank(down, up)


def _matrix(opened: OpenedFile, key: str, value: object) -> torch.Tensor:
    if _tensor(opened, key, value).ndim != 2:
        raise opened.error(f"{told(key)} has shape {tuple(value.shape)}, expected two axes")
    return value


def _vector(opened: OpenedFile, key: str, value: object) -> torch.Tensor:
    if _tensor(opened, key, value).ndim != 1:
        raise opened.error(f"{told(key)} has shape {tuple(value.shape)}, expected one axis")
    return value


def _tensor(opened: OpenedFile, key: str, value: object) -> torch.Tensor:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        raise opened.error(f"{told(key)} is a {type(value).__name__}, expected a tensor of weights")
    return value


def _holds_tensors(value: object) -> bool:
    return isinstance(value, torch.Tensor) or (isinstance(value, Mapping | list) and len(value) > 0)
