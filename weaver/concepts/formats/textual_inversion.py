"""Textual inversion (arXiv 2208.01618): a token's vectors, as diffusers, AUTOMATIC1111 and trainers of SDXL keep it."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from weaver.concepts.formats.opening import OpenedFile
from weaver.concepts.formats.parsed import ParsedFile
from weaver.errors import told

__all__ = ["as_vectors", "parse", "recognises", "refuse_large"]

_PARTS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "emb_params": "text_encoder"}
_MOST = 75  # positions between the start and the end of CLIP's text
_WIDEST = 2048  # of a vector; SDXL's second text encoder has 1280
_BRACKETED = re.compile(r"<\S+>")
_NO_TOKEN = re.compile(
    r"(^|[._])(weight|bias|alpha|beta|gamma|scale|shift|mean|std|var|variance|min|max|latents?|embeds?|embeddings?)$"
)


def recognises(opened: OpenedFile) -> bool:
    """Whether a file is of any of the layouts, by names and shapes: it need not be loaded.

    Raises `ConceptError` for vectors of a size that none of these models' has, and for names that are no tokens.
    """
    tree = opened.tensors
    automatic = tree.get("string_to_param")
    if isinstance(automatic, Mapping):
        tree = automatic
    elif not tree.keys() & _PARTS.keys():
        if not _are_tokens(tree):
            return False
        _check_tokens(opened, [str(key) for key in tree])
    for key, value in tree.items():
        refuse_large(opened, key, value)
    return True


def refuse_large(opened: OpenedFile, name: str, value: object) -> None:
    """Raise `ConceptError` for a tensor that is larger than a token's vectors can be, from its shape alone."""
    shape = tuple(value.shape) if isinstance(value, torch.Tensor) else ()
    if shape and (shape[-1] > _WIDEST or value.numel() > _MOST * _WIDEST):
        raise opened.error(
            f"{told(name)} has shape {shape}, too large for a token of Stable Diffusion (up to {_MOST} vectors "
            f"of width {_WIDEST}): it is of another kind, or of another model"
        )


def parse(opened: OpenedFile) -> ParsedFile | None:
    """Read any of the layouts; None for files of another kind.

    diffusers has ``{token: [C] or [V, C]}``. The others name no token: it is the file's name, as in their programs.
    A file of vectors is one only by its names: one of any name that could be a token, or several in brackets.
    """
    tree = opened.tensors
    if isinstance(tree.get("string_to_param"), Mapping):
        return _automatic(opened)
    if tree.keys() & _PARTS.keys():
        if odd := sorted(tree.keys() - _PARTS.keys()) or len(tree) > 1 and "emb_params" in tree:
            raise opened.error(f"it has {told(odd or sorted(tree))}, expected emb_params, or clip_l and clip_g, alone")
        vectors = {_PARTS[key]: as_vectors(opened, key, value) for key, value in tree.items()}
        if len(counts := {len(part) for part in vectors.values()}) > 1:
            raise opened.error(f"clip_l and clip_g have different numbers of vectors, {sorted(counts)}: save it again")
        return ParsedFile("textual inversion", embeddings={_token_of(opened): vectors})
    if _are_tokens(tree):
        embeddings = {key: {"text_encoder": as_vectors(opened, key, value)} for key, value in tree.items()}
        return ParsedFile("textual inversion of diffusers", embeddings=embeddings)
    return None


def as_vectors(opened: OpenedFile, name: str, value: object) -> torch.Tensor:
    """A token's vectors [V, C], of [C] or [V, C]; raises `ConceptError` for anything else."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.ndim not in (1, 2):
        found = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
        raise opened.error(f"token {told(name)} has {found}, expected vectors [V, C] or one vector [C]")
    value = value.reshape(-1, value.shape[-1])
    if len(value) > _MOST:
        raise opened.error(f"token {told(name)} has {len(value)} vectors, a prompt has room for {_MOST}")
    return value


def _automatic(opened: OpenedFile) -> ParsedFile:
    tree = opened.tensors
    parameters = tree["string_to_param"]
    others = [key for key, value in tree.items() if isinstance(value, torch.Tensor)]
    if len(parameters) != 1 or others:
        raise opened.error(f"it has {told([*parameters, *others])}, expected the vectors of one placeholder '*'")
    ((placeholder, value),) = parameters.items()
    told_of = {key: tree[key] for key in ("step", "sd_checkpoint", "sd_checkpoint_name") if _is_plain(tree.get(key))}
    embeddings = {_token_of(opened, tree.get("name")): {"text_encoder": as_vectors(opened, placeholder, value)}}
    return ParsedFile("textual inversion of AUTOMATIC1111", embeddings=embeddings, settings=told_of)


def _token_of(opened: OpenedFile, name: object = None) -> str:
    """The file's name, which AUTOMATIC1111's prompts use; where it has white space, the name that is in the file."""
    for token in (opened.path.stem, name):
        if isinstance(token, str) and token and not any(c.isspace() for c in token):
            return token
    raise opened.error("its name is its token, and has white space in it: rename the file")


def _are_tokens(tree: Mapping) -> bool:
    """Whether all are vectors, and none is named as a parameter or a statistic is."""
    return bool(tree) and all(
        isinstance(value, torch.Tensor) and value.ndim in (1, 2) and not _NO_TOKEN.search(str(key))
        for key, value in tree.items()
    )


def _check_tokens(opened: OpenedFile, names: list[str]) -> None:
    """Raise `ConceptError` for several vectors whose names tell nothing: no program writes tokens so."""
    plain = [name for name in names if not _BRACKETED.fullmatch(name)]
    if plain and len(names) > 1:
        raise opened.error(
            f"it has {len(names)} vectors or matrices, {told(plain[0])} among them, and a textual inversion has one "
            "token: if these are tokens, save them one by one, or under names in brackets, such as '<toy>'"
        )


def _is_plain(value: object) -> bool:
    return isinstance(value, str | int | float)
