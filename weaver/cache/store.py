"""Tensors on disk, addressed by what they were made from.

An entry is a folder named by the SHA-256 of its identity, with `tensors.safetensors` and `entry.json` (the identity,
and the tensors' own SHA-256). It appears by one rename and goes by one rename, so that a reader finds a whole entry or
none, whenever a writer is killed. Writers take turns by a lock that dies with its process.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from weaver.errors import WeaverError
from weaver.folder import LOCK, PARTIAL, home_folder, writing_alone, written_through
from weaver.sizes import format_bytes

__all__ = ["Cache", "CacheWarning", "Entry", "default_folder"]

FORMAT = 1
_LIMIT = 8 * 2**30
_WAIT = 60.0  # seconds for other writers; a gigabyte takes a few
_TENSORS, _CARD = "tensors.safetensors", "entry.json"
_CHANNELS_LAST = "#channels_last"
_DAMAGED = {"kind": "damaged"}
# Of a disk, too long a wait for the lock (a TimeoutError) among them; and of a file system that has no locks.
_FAULTS = (OSError, NotImplementedError)


class CacheWarning(UserWarning):
    """The cache could not keep, or had to throw away something; the run goes on without it."""


@dataclass(frozen=True)
class Entry:
    """One entry: its key and identity, its size in bytes, when it was last used (seconds since 1970).

    One that lost a file, or whose card is not the one that was written, is `damaged` and never found again.
    """

    key: str
    identity: Mapping
    nbytes: int
    used: float

    @property
    def damaged(self) -> bool:
        return self.identity == _DAMAGED


def default_folder() -> Path:
    """`$WEAVER_CACHE`, or `~/.cache/concept-weaver`; raises `WeaverError` where nobody's home is known."""
    return home_folder("WEAVER_CACHE", ".cache/concept-weaver")


class Cache:
    """Results kept on disk by the content that they follow from. Safe for several processes at once.

    Whatever goes wrong with the disk is one `CacheWarning` and no more: what could not be kept is computed again. An
    entry that is damaged is thrown away and not returned.

    Parameters
    ----------
    folder : where; None is `default_folder()`. Made when something is first kept
    limit : bytes that all entries may take; what was not used for longest goes first
    features : keep features too, which take far more room than latents (for Stable Diffusion 2.1 at 768, 50 steps and
        `PAPER` sites 0.58 GB in float16, 1.15 GB in float32), and save the reverse pass on top of the inversion

    Raises `WeaverError` for a limit that is no number of bytes.
    """

    def __init__(self, folder: str | os.PathLike | None = None, *, limit: int = _LIMIT, features: bool = False):
        self.folder = Path(folder) if folder is not None else default_folder()
        self.limit = _checked(limit)
        self.features = features

    def get(self, identity: Mapping) -> dict[str, torch.Tensor] | None:
        """The tensors kept under `identity`, on the CPU; None where there are none. Counts as a use."""
        key = _key(identity)
        place = self.folder / key
        try:
            card = json.loads((place / _CARD).read_bytes())
            data = (place / _TENSORS).read_bytes()
            if _key(card["identity"]) != key or hashlib.sha256(data).hexdigest() != card["sha256"]:
                raise ValueError("its bytes are not those that were written")
            tensors = dict(_laid_out(*stored) for stored in load(data).items())
        except FileNotFoundError:
            # Never there, thrown away meanwhile, or half of it lost: then the next writer replaces it.
            return None
        except OSError as error:
            warnings.warn(f"cache entry {place} can't be read ({error.strerror})", CacheWarning, stacklevel=2)
            return None
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            self._discard(place, error)
            return None
        with suppress(OSError):  # of a folder that is only read the order of use stays
            os.utime(place / _CARD)
        return tensors

    def put(self, identity: Mapping, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Keep tensors under `identity`, a mapping of plain values; whether they are kept now."""
        key = _key(identity)
        data = save(dict(_flat(name, tensor.detach().cpu()) for name, tensor in tensors.items()))
        card = {"identity": dict(identity), "sha256": hashlib.sha256(data).hexdigest()}
        text = json.dumps(card, indent=1, ensure_ascii=False).encode()
        try:
            if len(data) + len(text) > self.limit:
                size, limit = format_bytes(len(data)), format_bytes(self.limit)
                raise OSError(0, f"{size} are more than the cache's limit of {limit}")
            with writing_alone(self.folder, _WAIT):
                if not _whole(self.folder / key):
                    self._write(key, data, text)
                    self._evict(self.limit, keep=key)
        except _FAULTS as error:
            reason = getattr(error, "strerror", None) or str(error)
            warnings.warn(f"nothing is kept in the cache {self.folder} ({reason})", CacheWarning, stacklevel=2)
            return False
        return True

    def entries(self) -> list[Entry]:
        """All entries, the last used first, damaged ones among them.

        Raises `WeaverError` where the folder is no cache or can't be read.
        """
        try:
            return self._entries()
        except OSError as error:
            raise WeaverError(f"the cache {self.folder} can't be read ({error.strerror})") from error

    def prune(self, limit: int | None = None) -> list[Entry]:
        """Throw away what was not used for longest until `limit` bytes remain (None: the cache's own).

        What is damaged and what killed writers left goes first, whatever the limit. Returns the entries that went.
        Raises `WeaverError` for a limit that is no number of bytes, and where the folder is no cache or can't be
        changed; where nothing is kept nothing is written.
        """
        limit = self.limit if limit is None else _checked(limit)
        try:
            if not self._places():
                return []
            with writing_alone(self.folder, _WAIT):
                return self._evict(limit)
        except _FAULTS as error:
            raise WeaverError(f"the cache {self.folder} can't be changed ({error})") from error

    def clear(self) -> list[Entry]:
        """Throw away everything; returns what went."""
        return self.prune(0)

    def _places(self) -> list[Path]:
        """Entries, and what is half-written. Raises `WeaverError` for a folder that others filled and no cache did."""
        if self.folder.exists() and not self.folder.is_dir():
            raise WeaverError(f"the cache {self.folder} is a file, not a folder")
        try:
            found = list(self.folder.iterdir())
        except FileNotFoundError:
            return []
        entries = [place for place in found if _is_entry(place)]
        if found and not entries and self.folder / LOCK not in found:
            raise WeaverError(
                f"{self.folder} is no cache: it holds {min(place.name for place in found)!r} and no entry; "
                "name a cache's folder, or one that is empty or not there yet"
            )
        return entries + [place for place in found if place.name.startswith(PARTIAL)]

    def _entries(self) -> list[Entry]:
        found = []
        for place in filter(_is_entry, self._places()):
            try:
                nbytes = sum(file.stat().st_size for file in place.iterdir())
                whole = _whole(place)
                used = (place / _CARD if whole else place).stat().st_mtime
                identity = _identity((place / _CARD).read_bytes(), place.name) if whole else _DAMAGED
            except OSError:  # thrown away meanwhile, or another user's
                continue
            found.append(Entry(place.name, identity, nbytes, used))
        return sorted(found, key=lambda entry: entry.used, reverse=True)

    def _write(self, key: str, data: bytes, text: bytes) -> None:
        partial = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=self.folder))
        try:
            for name, content in ((_TENSORS, data), (_CARD, text)):
                (partial / name).write_bytes(content)
                written_through(partial / name)
            self._remove(self.folder / key)  # a half that a disk lost
            os.rename(partial, self.folder / key)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def _remove(self, place: Path) -> None:
        if place.exists():
            aside = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=self.folder))
            os.rename(place, aside / place.name)
            shutil.rmtree(aside, ignore_errors=True)

    def _evict(self, limit: int, keep: str | None = None) -> list[Entry]:
        """Under the lock: what others are writing has no entry's name yet, so that half an entry is nobody's work."""
        entries, gone = self._entries(), []
        total = sum(entry.nbytes for entry in entries)
        for entry in sorted(reversed(entries), key=lambda entry: not entry.damaged):
            if total <= limit and not entry.damaged:
                break
            if entry.key != keep:
                self._remove(self.folder / entry.key)
                total -= entry.nbytes
                gone.append(entry)
        return gone

    def _discard(self, place: Path, error: Exception) -> None:
        what = f"cache entry {place} is damaged ({error})"
        try:
            with writing_alone(self.folder, _WAIT):
                self._remove(place)
            warnings.warn(f"{what}; it was thrown away", CacheWarning, stacklevel=3)
        except _FAULTS:
            warnings.warn(f"{what}; it can't be removed and is not used", CacheWarning, stacklevel=3)


def _checked(limit: int) -> int:
    if isinstance(limit, Real) and limit >= 0:  # not-a-number is not
        return limit
    raise WeaverError(
        f"the cache's limit is {limit!r}, expected a number of bytes, 0 or more, such as 2 * 10**9 for 2 GB"
    )


def _key(identity: Mapping) -> str:
    text = json.dumps({"format": FORMAT, **identity}, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _identity(text: bytes, key: str) -> Mapping:
    """What a card says that its entry was made from: `_DAMAGED` where that does not give the entry's key."""
    try:
        identity = json.loads(text)["identity"]
        return identity if _key(identity) == key else _DAMAGED
    except (ValueError, KeyError, TypeError):
        return _DAMAGED


def _flat(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    """A tensor as it is stored. Of one that lies with its channels last the name tells it: layout decides roundings."""
    if tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        return name + _CHANNELS_LAST, tensor.permute(0, 2, 3, 1)
    return name, tensor.contiguous()


def _laid_out(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    """`_flat` undone, copied to where any new tensor would be: in the file's bytes they lie askew."""
    if name.endswith(_CHANNELS_LAST):
        return name.removesuffix(_CHANNELS_LAST), tensor.clone().permute(0, 3, 1, 2)
    return name, tensor.clone()


def _is_entry(place: Path) -> bool:
    """Whether a folder is an entry, or what is left of one: a key for a name, and one of an entry's two files."""
    if not re.fullmatch("[0-9a-f]{64}", place.name):
        return False
    try:
        return not {_TENSORS, _CARD}.isdisjoint(os.listdir(place))
    except OSError as error:
        return isinstance(error, PermissionError)  # another user's


def _whole(place: Path) -> bool:
    return (place / _CARD).is_file() and (place / _TENSORS).is_file()
