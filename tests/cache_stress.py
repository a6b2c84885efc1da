"""Faults of the disk and of processes, against the cache: `make stress` (N=200 kills).

Each fault is made for real: processes are killed while they write, files are cut off by the system, bits are flipped.
Afterwards every entry is either whole or not there. `tests/test_cache.py` runs the same in short form.
"""

from __future__ import annotations

import argparse
import errno
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

from weaver.cache import Cache, CacheWarning

NUMBERS = 1 << 20  # float32 numbers of an entry, 4 MB


def tensors_of(number: int, count: int = NUMBERS) -> dict[str, torch.Tensor]:
    """What is kept under `identity_of(number)`."""
    return {"latents": torch.full((count,), float(number)), "other": torch.arange(count // 64) + number}


def identity_of(number: int) -> dict:
    return {"kind": "inversion", "number": number}


def check_whole(cache: Cache, numbers: int, count: int = NUMBERS) -> int:
    """Every entry is what was put there; returns how many there are. A warning of damage is an error."""
    found = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheWarning)
        for number in range(numbers):
            kept = cache.get(identity_of(number))
            if kept is not None:
                found += 1
                assert all(torch.equal(kept[name], x) for name, x in tensors_of(number, count).items())
    return found


def in_child(function, *args) -> int:
    """Start a process that runs a function and ends; returns its id. A fork: it has what this one imported."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            function(*args)
            code = 0
        finally:
            os._exit(code)
    return child


def write_for_ever(folder: Path, numbers: int) -> None:
    """Put entries, and throw them away to make room, until killed."""
    cache = Cache(folder, limit=3 * 5 * NUMBERS)  # room for three
    number = 0
    while True:
        cache.put(identity_of(number % numbers), tensors_of(number % numbers))
        number += 1


def kills(folder: Path, count: int, rng: random.Random) -> tuple[int, int]:
    """Kill a writing process `count` times; returns how many had an entry half-written, and how many entries are left.

    Half-written is what a `.partial-` folder shows, which a process that ends well never leaves. A third of the kills
    come at any time, the others shortly after an entry was begun.
    """
    cache, numbers, midway = Cache(folder), 5, 0
    for number in range(count):
        child = in_child(write_for_ever, folder, numbers)
        time.sleep(rng.uniform(0.02, 0.12))
        while number % 3 and not any(folder.glob(".partial-*")):
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.008))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        midway += any(folder.glob(".partial-*"))
        check_whole(cache, numbers)
    assert cache.put(identity_of(0), tensors_of(0))  # the dead writer's lock is free
    assert not any(folder.glob(".partial-*")), "leftovers of killed writers stay"
    return midway, check_whole(cache, numbers)


def two_writers(folder: Path, seconds: float) -> int:
    """Two processes put and evict the same entries, a third reads; returns how many entries are left."""
    numbers = 5
    children = [in_child(write_for_ever, folder, numbers) for _ in range(2)]
    until = time.monotonic() + seconds
    try:
        while time.monotonic() < until:
            check_whole(Cache(folder), numbers)
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return check_whole(Cache(folder), numbers)


def full_disk(folder: Path) -> None:
    """The system refuses to write more than half an entry: one warning, nothing kept, nothing half-kept."""

    def write() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * NUMBERS, 2 * NUMBERS))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert not Cache(folder).put(identity_of(1), tensors_of(1))
        assert [w.category for w in caught] == [CacheWarning]
        assert os.strerror(errno.EFBIG) in str(caught[0].message)

    _, status = os.waitpid(in_child(write), 0)
    assert status == 0
    assert not any(folder.glob(".partial-*"))
    assert Cache(folder).get(identity_of(1)) is None


def flipped_bits(folder: Path, count: int, rng: random.Random) -> int:
    """Flip one bit of an entry, `count` times: it never comes back with other numbers. Returns how often it is gone."""
    cache, size, gone = Cache(folder), 1 << 10, 0
    for _ in range(count):
        assert cache.put(identity_of(7), tensors_of(7, size))
        place = next(place for place in folder.iterdir() if len(place.name) == 64)
        file = rng.choice(sorted(place.iterdir()))
        data = bytearray(file.read_bytes())
        bit = rng.randrange(len(data) * 8)
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            kept = cache.get(identity_of(7))
        if kept is None:
            gone += 1
            assert [w.category for w in caught] == [CacheWarning] and not place.exists()
        else:  # a space, or an indentation of the card
            assert all(torch.equal(kept[name], x) for name, x in tensors_of(7, size).items())
    return gone


def mounted(folder: Path, options: str, check) -> str:
    """Run `check` in a small file system of memory with these options; says why where that can't be had."""
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if done.returncode:
        return f"not tried, needs the right to mount ({done.stderr.strip()})"
    try:
        check(folder)
    finally:
        subprocess.run(["umount", folder], check=True)
    return "passed"


def small_disk(folder: Path) -> None:
    """Really full: 6 MB have room for one entry of 4 MB."""
    cache = Cache(folder)
    assert cache.put(identity_of(0), tensors_of(0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert not cache.put(identity_of(1), tensors_of(1))
    assert os.strerror(errno.ENOSPC) in str(caught[0].message)
    assert check_whole(cache, 2) == 1


def read_only(folder: Path) -> None:
    """Entries are read, nothing is kept, one warning."""
    assert Cache(folder).put(identity_of(0), tensors_of(0, 64))
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    cache = Cache(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert not cache.put(identity_of(1), tensors_of(1, 64))
    assert os.strerror(errno.EROFS) in str(caught[0].message)
    assert check_whole(cache, 2, 64) == 1


def main(argv: list[str] | None = None) -> int:
    """Command line; an error ends it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--flips", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=20.0, help="of two writers at once")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    rng = random.Random(arguments.seed)

    def folder() -> Path:
        return Path(tempfile.mkdtemp(dir=scratch))

    with tempfile.TemporaryDirectory() as scratch:
        midway, left = kills(folder(), arguments.kills, rng)
        print(f"kills: {arguments.kills}, {midway} of them with an entry half-written; {left} whole entries left")
        print(f"two writers and a reader, {arguments.seconds:g} s: {two_writers(folder(), arguments.seconds)} left")
        full_disk(folder())
        print("files cut off by the system: passed")
        print(f"a full disk: {mounted(folder(), 'size=6m', small_disk)}")
        print(f"a disk that is only read: {mounted(folder(), 'size=6m', read_only)}")
        gone = flipped_bits(folder(), arguments.flips, rng)
        print(f"flipped bits: {arguments.flips}, {gone} thrown away, the others without effect")
    if 2 * midway < arguments.kills:
        print(f"only {midway} kills were in the middle of an entry, fewer than half: not shown", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
