"""A concept's file: one safetensors file with everything in it, written whole or not at all."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from weaver.concepts.changes import Delta, parts_of
from weaver.errors import WeaverError
from weaver.folder import whole_file
from weaver_kernels import LowRank

__all__ = ["FORMAT", "FORMAT_VERSION", "ConceptError", "read_concept_tensors", "write_concept_tensors"]

FORMAT = "concept-weaver/concept"
FORMAT_VERSION = 3
_READABLE = (1, 2, 3)  # version 1 had neither factors nor parts beside keys and values, 2 no biases
_TEXTS = ("name", "token", "word", "base_hash")
_OBJECTS = ("settings", "versions")


class ConceptError(WeaverError):
    """A concept file, or a concept's values, that can't be used; names the file or the field, in one line."""

    def __init__(self, reason: str):
        super().__init__(re.sub(r"\s*[\r\n]\s*", " ", reason))  # names of tensors are the file's, and may have any text


def write_concept_tensors(path: Path, texts: Mapping[str, object], groups: Mapping[str, Mapping[str, Delta]]) -> None:
    """Write texts (strings, and objects that become JSON) and groups of tensors by their names."""
    tensors = {}
    for group, entries in groups.items():
        for key, value in entries.items():
            for part, x in parts_of(value).items():
                tensors["/".join(filter(None, (group, key, part)))] = x.detach().cpu().contiguous()
    metadata = {"format": FORMAT, "format_version": str(FORMAT_VERSION)}
    metadata |= {key: texts[key] for key in _TEXTS}
    metadata |= {key: json.dumps(dict(texts[key]), sort_keys=True) for key in _OBJECTS}
    content = save(dict(sorted(tensors.items())), metadata)
    with whole_file(path) as partial:
        partial.write_bytes(_with_sorted_metadata(content))


def _with_sorted_metadata(content: bytes) -> bytes:
    """A safetensors file whose metadata are in order, which the library writes in another one each time: the same
    concept is the same file."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    written = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    written += b" " * (-len(written) % 8)
    return len(written).to_bytes(8, "little") + written + content[8 + length :]


def read_concept_tensors(path: Path, groups: tuple[str, ...]) -> tuple[dict[str, object], dict[str, dict[str, Delta]]]:
    """What `write_concept_tensors` wrote. Raises `ConceptError`, which names the file, for anything else."""
    if not path.is_file():
        raise ConceptError(f"{path}: no such concept file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_metadata(path, metadata)
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        texts = {key: metadata[key] for key in _TEXTS} | {key: json.loads(metadata[key]) for key in _OBJECTS}
        json.dumps(texts, ensure_ascii=False).encode()  # half of a pair of surrogates can't be written again
    except ConceptError:
        raise
    except (SafetensorError, ValueError, RecursionError, OSError) as error:
        raise ConceptError(f"{path}: not a readable safetensors file, or cut short ({error})") from error
    found: dict[str, dict] = {group: {} for group in groups}
    for key, tensor in tensors.items():
        group, _, rest = key.partition("/")
        if group not in found or not rest:
            raise ConceptError(f"{path}: unknown tensor {key!r}; expected {', '.join(f'{g}/...' for g in groups)}")
        name, _, part = rest.rpartition("/")
        if part in LowRank._fields and name:
            found[group].setdefault(name, {})[part] = tensor
        else:
            found[group][rest] = tensor
    for group, entries in found.items():
        for name, value in entries.items():
            if isinstance(value, dict):
                if missing := set(LowRank._fields) - set(value):
                    raise ConceptError(f"{path}: {group}/{name} lacks its factor {missing.pop()!r}")
                entries[name] = LowRank(**value)
    return texts, found


def _check_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise ConceptError(f"{path}: not a concept file (format {metadata.get('format')!r}, expected {FORMAT!r})")
    version = metadata.get("format_version")
    if version not in map(str, _READABLE):
        raise ConceptError(f"{path}: concept format version {version}, this release reads up to {FORMAT_VERSION}")
    if missing := [key for key in (*_TEXTS, *_OBJECTS) if key not in metadata]:
        raise ConceptError(f"{path}: metadata lacks {', '.join(missing)}")
