"""Files and folders that are written: seen to be fit before a run, whole or not at all, by one writer at a time."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock

from weaver.errors import WeaverError

__all__ = [
    "LOCK",
    "PARTIAL",
    "all_or_nothing",
    "check_folder",
    "clashes",
    "home_folder",
    "make_folder",
    "whole_file",
    "writing_alone",
    "written_through",
]

LOCK = ".lock"
PARTIAL = ".partial-"  # of the scratch folders


def make_folder(field: str, folder: str | os.PathLike) -> None:
    """Make a folder that the argument `field` names, unless it is there; raises `WeaverError` where that can't be."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WeaverError(f"{field}: {folder} can't be made a folder ({error}): name another") from error


def home_folder(variable: str, default: str) -> Path:
    """The folder that an environment variable names, or one in the user's home.

    Raises `WeaverError` where there is no home, as for a user that the system does not know.
    """
    try:
        return Path(os.environ.get(variable) or f"~/{default}").expanduser()
    except RuntimeError as error:
        raise WeaverError(f"no home folder is known here: set {variable} to a folder") from error


def check_folder(folder: Path, results: Iterable[Path]) -> None:
    """Raise `WeaverError` unless results can be written into a folder, there already or not; leaves nothing there.

    `results` are the files, relative to the folder.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise WeaverError(f"out: {there} is a file, not a folder; choose another with --out")
    try:  # what os.access says is not so for an administrator, on Windows and in folders of the system
        os.rmdir(tempfile.mkdtemp(prefix=PARTIAL, dir=there))
    except OSError as error:
        raise WeaverError(f"out: {there} is not writable ({error.strerror}); choose another with --out") from error
    for result in results:
        if (folder / result).is_dir():
            raise WeaverError(
                f"out: {folder / result} is a folder, a result is to have its name; move it, or choose another "
                "with --out"
            )
        for parent in result.parents[:-1]:
            if (folder / parent).exists() and not (folder / parent).is_dir():
                raise WeaverError(f"out: {folder / parent} is a file; move it, or choose another folder with --out")


def clashes(folder: Path, results: Iterable[Path], read: Mapping[str, Path]) -> list[str]:
    """Which of the files and folders of pictures that a run reads, by their fields, its results would change."""
    targets, reasons = [folder / result for result in results], []
    for field, path in read.items():
        if path.is_dir():
            if folder.exists() and folder.samefile(path):
                reasons.append(f"{field}: results in {path} would be among its pictures; choose another --out")
        elif any(target.exists() and target.samefile(path) for target in targets):
            reasons.append(f"{field}: {path} would be overwritten by a result; choose another --out")
    return reasons


@contextmanager
def all_or_nothing(folder: Path) -> Iterator[Path]:
    """A scratch folder whose files move into `folder` at the end, unless something goes wrong, then too."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=folder))
    try:
        yield partial
        _move_in(partial, folder)
    except BaseException:
        shutil.rmtree(partial)
        for path in new:
            if any(path.iterdir()):
                break
            path.rmdir()
        raise
    shutil.rmtree(partial)


@contextmanager
def writing_alone(folder: Path, wait: float) -> Iterator[None]:
    """Alone among writers of a folder, for which others are given `wait` seconds; a lock dies with its process.

    What a killed writer left half-written goes first: nobody else can be at it. Raises `OSError`, or
    `NotImplementedError` on a file system that has no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / LOCK, timeout=wait):
        for left in folder.glob(f"{PARTIAL}*"):
            shutil.rmtree(left, ignore_errors=True)
        yield


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A scratch file beside `path` that takes its place at the end, unless something goes wrong: then it is gone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        os.chmod(partial, 0o666 & ~_umask())  # mkstemp makes files only their owner can read
        os.replace(partial, path)
    except BaseException:
        partial.unlink()
        raise


def written_through(path: Path) -> None:
    """Return when what was written into a file is on the disk, so that a rename after it can't overtake it."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _move_in(partial: Path, folder: Path) -> None:
    """Move all files of one folder into another; if one fails, what was there before is there again.

    How to undo a move is noted before it is made, so that an interrupt between the two loses nothing.
    """
    paths = sorted(partial.rglob("*"))
    earlier = Path(tempfile.mkdtemp(dir=partial))
    with ExitStack() as undo:
        for number, path in enumerate(paths):
            target, aside = folder / path.relative_to(partial), earlier / str(number)
            if path.is_dir():
                if not target.is_dir():
                    undo.callback(_remove, target)
                    target.mkdir()
                continue
            os.chmod(path, 0o666 & ~_umask())  # some libraries write files that only their owner can read
            if target.is_file():
                undo.callback(_put_back, aside, target)
                os.replace(target, aside)
                os.replace(path, target)
            else:
                undo.callback(_remove, target)
                os.replace(path, target)
        undo.pop_all()


def _put_back(aside: Path, target: Path) -> None:
    if aside.exists():
        os.replace(aside, target)


def _remove(made: Path) -> None:
    if made.is_file():
        made.unlink()
    elif made.is_dir() and not any(made.iterdir()):
        made.rmdir()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
