"""Any file that may hold a concept, opened without running anything in it: tensors by name, and texts about them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from weaver.concepts.concept_file import ConceptError
from weaver.concepts.formats.torch_file import OLD, ZIP, torch_mapped, torch_read
from weaver.concepts.formats.untrusted import Refusal, damaged, short
from weaver.errors import told

__all__ = ["OpenedFile", "open_tensors"]

_LARGEST_HEADER = 1 << 23  # bytes of names, shapes and what trainers tell; a checkpoint has 300 kB
_DEEPEST, _MOST = 6, 50_000  # levels and entries of a file's mappings
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PICKLE = b"\x80"
_OTHERS = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: fetch it with `git lfs pull`",
    b"<": "a web page, not the file that a link promised: download it again, signed in where that is needed",
}


@dataclass(frozen=True, eq=False)
class OpenedFile:
    """What a file holds.

    Parameters
    ----------
    path, container : the file, and which it is: "safetensors" or "torch"
    tensors : ``{name: tensor}``; of a torch file values may also be mappings, lists, texts, numbers and None
    metadata : the texts in a safetensors file's header
    """

    path: Path
    container: str
    tensors: Mapping[str, object]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def names(self) -> list[str]:
        """The name of every tensor, joined by dots where they are nested."""
        return [name for name, value in _leaves(self.path, self.tensors) if isinstance(value, torch.Tensor)]

    def loaded(self) -> OpenedFile:
        """The same in memory, each tensor checked; before, nothing but names, shapes and dtypes has been read.

        Raises `ConceptError` for a tensor without entries, of whole numbers (single ones are counters, and stay), or
        with NaN or infinity.
        """
        seen: dict[int, torch.Tensor] = {}
        for name, value in _leaves(self.path, self.tensors):
            if isinstance(value, torch.Tensor) and id(value) not in seen:
                seen[id(value)] = _checked(self.path, name, value)
        return replace(self, tensors=_with(self.tensors, seen))

    def error(self, reason: str) -> ConceptError:
        """An error that names the file."""
        return ConceptError(f"{self.path}: {reason}")


def open_tensors(path: str | os.PathLike) -> OpenedFile:
    """Open a safetensors file or one of `torch.save`, told apart by what is in them.

    Data stays in the file until it is used: see `OpenedFile.loaded`. Code in a pickle is never run.

    Raises `ConceptError` for everything else, and for what claims more than the file has.
    """
    path = Path(path)
    try:
        status, head = path.stat(), b""
        if ordinary := stat.S_ISREG(status.st_mode):  # a pipe would be waited for
            with path.open("rb") as file:
                head = file.read(64)
    except FileNotFoundError as error:
        raise ConceptError(f"{path}: there is no such file: correct its path") from error
    except (OSError, ValueError) as error:
        raise ConceptError(f"{path}: can't be read ({short(error)}): check the path and its permissions") from error
    if not ordinary:
        what = "a folder" if stat.S_ISDIR(status.st_mode) else "no ordinary file"
        raise ConceptError(f"{path}: is {what}: name the concept's file itself")
    if not head:
        raise ConceptError(f"{path}: is empty: download or save it again")
    try:
        if head.startswith(ZIP):
            return _opened(path, "torch", torch_mapped(path))
        if head.startswith(OLD):
            return _opened(path, "torch", torch_read(path, status.st_size))
        if head[8:9] == b"{":  # asked before pickles: a header of 128 bytes starts as they do
            return _opened(path, "safetensors", *_safetensors_mapped(path, head, status.st_size))
        if head.startswith(_PICKLE):
            raise Refusal(
                "it is a Python pickle and no file of `torch.save`: a pickle can hold code, and this one was not run; "
                "ask for a safetensors file"
            )
    except Refusal as refusal:
        raise ConceptError(f"{path}: {refusal}") from refusal
    what = next((text for start, text in _OTHERS.items() if head.lstrip().startswith(start)), None)
    raise ConceptError(
        f"{path}: is {what or 'neither a safetensors file nor one of `torch.save`: name the file of the concept'}"
    )


def _opened(path: Path, container: str, tensors: object, metadata: Mapping[str, str] | None = None) -> OpenedFile:
    if not isinstance(tensors, Mapping):
        raise Refusal(f"it holds a bare {type(tensors).__name__}, without a name: save {{name: tensor}}")
    found = {id(x): x.nbytes for _, x in _leaves(path, tensors) if isinstance(x, torch.Tensor)}
    total, size = sum(found.values()), path.stat().st_size
    if total > size:  # views of one storage, each of which would become a tensor of its own
        raise Refusal(f"its tensors claim {total} bytes, and the file has {size}: save clones of them, not views")
    return OpenedFile(path, container, tensors, metadata or {})


def _safetensors_mapped(path: Path, head: bytes, size: int) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    header = int.from_bytes(head[:8], "little")
    if header > min(size - 8, _LARGEST_HEADER):
        raise Refusal(
            f"its header claims {header} bytes of {size}: the file is cut short or damaged; download it again"
        )
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise damaged("safetensors file", error) from error


def _leaves(path: Path, tree: object) -> Iterator[tuple[str, object]]:
    """Every value that is no mapping or list, by its name; a tree that grows beyond a concept's is refused."""
    pending, seen = [((), tree)], 0
    while pending:
        at, value = pending.pop()
        inner = value.items() if isinstance(value, Mapping) else None
        if isinstance(value, list | tuple):
            inner = enumerate(value)
        if inner is None:
            yield ".".join(map(str, at)), value
            continue
        pending += reversed([((*at, key), entry) for key, entry in inner])
        seen += len(value)
        if len(at) >= _DEEPEST or seen > _MOST:
            raise ConceptError(f"{path}: it nests deeper or holds more than a concept file does; it is of another kind")


def _checked(path: Path, name: str, tensor: torch.Tensor) -> torch.Tensor:
    name = told(name)
    if tensor.numel() == 0:
        raise ConceptError(f"{path}: {name} has shape {tuple(tensor.shape)}: nothing is in it; save the file again")
    if tensor.ndim == 0 and tensor.dtype in (torch.int64, torch.int32):
        return tensor.clone()
    if tensor.dtype not in _DTYPES or tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise ConceptError(
            f"{path}: {name} has dtype {tensor.dtype}, expected float16, bfloat16, float32 or float64: convert it"
        )
    tensor = tensor.detach().clone(memory_format=torch.contiguous_format)
    if not torch.isfinite(tensor).all():
        raise ConceptError(f"{path}: {name} has NaN or infinite values: its training failed, or the file is damaged")
    return tensor


def _with(tree: object, loaded: Mapping[int, torch.Tensor]) -> object:
    if isinstance(tree, Mapping):
        return {str(key): _with(value, loaded) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_with(value, loaded) for value in tree]
    return loaded.get(id(tree), tree)
