"""Files of `torch.save`, opened after their claims are checked: those since PyTorch 1.6, and those before."""

from __future__ import annotations

import io
import warnings
import zipfile
from pathlib import Path
from typing import BinaryIO

import torch

from weaver.concepts.formats.pickled import scan_pickle
from weaver.concepts.formats.untrusted import Refusal, damaged
from weaver.errors import told

__all__ = ["OLD", "ZIP", "torch_mapped", "torch_read"]

ZIP = b"PK\x03\x04"
OLD = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""The start of files before PyTorch 1.6: its magic number, pickled."""

_LARGEST_INDEX = 1 << 19  # bytes of names and shapes; of a checkpoint with 1100 tensors they are 300 kB
_LARGEST_OLD = 1 << 29  # bytes of a file that can't be mapped, and is read whole


def torch_mapped(path: Path) -> dict[str, object]:
    """The content of a file of `torch.save` since PyTorch 1.6, a zip archive whose storages are mapped, not read."""
    try:
        with _Index(path) as file, zipfile.ZipFile(file) as archive:
            records = _records(archive)

            def claim(key: str, nbytes: int) -> None:
                there = records.get(f"data/{key}", 0)
                if nbytes > there:
                    raise Refusal(f"storage {told(key)} claims {nbytes} bytes, and the file has {there} of it")

            if records.get("data.pkl", _LARGEST_INDEX + 1) > _LARGEST_INDEX:
                raise Refusal("it is a zip archive without a torch file's index, or with one too large for a concept")
            pickle = next(info for info in archive.infolist() if info.filename.partition("/")[2] == "data.pkl")
            scan_pickle(io.BytesIO(archive.read(pickle)), claim)
        if path.suffix == ".safetensors":  # torch.load would take it for one by its name, and maps nothing else
            with path.open("rb") as file:
                return _torch_loaded(file)
        return _torch_loaded(path, mmap=True)
    except Refusal:
        raise
    except Exception as error:  # a parser of untrusted bytes raises whatever they lead it to
        raise damaged("file of `torch.save`", error) from error


def torch_read(path: Path, size: int) -> dict[str, object]:
    """The content of a file from before: four pickles, storage keys, and then the storages."""
    if size > _LARGEST_OLD:
        raise Refusal("it is in PyTorch's format from before 1.6, and larger than a concept: save it again")
    claims: dict[str, int] = {}

    def claim(key: str, nbytes: int) -> None:
        claims[key] = nbytes
        if sum(claims.values()) > size:
            raise Refusal(f"storage {told(key)} claims {nbytes} bytes, and the file has {size}")

    try:
        data = path.read_bytes()
        stream = io.BytesIO(data[:_LARGEST_INDEX])
        for _ in range(5):
            scan_pickle(stream, claim)
        return _torch_loaded(io.BytesIO(data))
    except Refusal:
        raise
    except Exception as error:  # as above
        raise damaged("file of `torch.save`", error) from error


def _torch_loaded(source: Path | BinaryIO, **options) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on TorchScript archives and old storages, which are refused or read
        return torch.load(source, weights_only=True, map_location="cpu", **options)


class _Index(io.FileIO):
    """A zip archive that is asked for its directory and for the pickle, each of which must be small."""

    def read(self, size: int = -1) -> bytes:
        if size > _LARGEST_INDEX:
            raise Refusal(f"its index claims {size} bytes, too large for a concept")
        return super().read(size)


def _records(archive: zipfile.ZipFile) -> dict[str, int]:
    """Bytes of each record by its name without the archive's own folder."""
    records = {}
    for info in archive.infolist():
        name = info.filename.partition("/")[2].lower()
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise Refusal("it is a compressed zip archive: unpack it, and name the file in it")
        if name in records:
            raise Refusal(f"it has two records {told(name)}: the file is damaged; download it again")
        records[name] = info.file_size
    return records
