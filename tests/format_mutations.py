"""Damaged and hostile concept files, by the thousand: `make stress` (tests/test_formats_opening.py runs 200).

Valid files of every kind are cut short, flipped, renamed, reshaped, poisoned, put under another container's header and
spliced with each other. Whatever comes of it is either read or refused in one line, within two seconds.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from format_contents import as_old_torch, as_torch, containers_of, contents

from weaver.concepts.concept import Concept, ConceptError
from weaver.concepts.formats import read_concept_file

LIMIT = 2.0  # seconds for one file


# Mutations of what is saved: (rng, tree) -> tree.


def _edited(rng: random.Random, tree: Mapping, edit: Callable) -> dict:
    """The tree with one of its entries, at any depth, replaced by those that `edit` gives for it."""
    at = rng.randrange(len(tree))
    out = {}
    for i, (key, value) in enumerate(tree.items()):
        if i != at:
            out[key] = value
        elif isinstance(value, Mapping) and value and rng.random() < 0.9:
            out[key] = _edited(rng, value, edit)
        else:
            out |= edit(key, value)
    return out


def rename(rng, tree):
    parts = (
        "unet",
        "clip_l",
        "emb_params",
        "attn1",
        "to_q",
        "to_out.0",
        "bias",
        "modifier_token",
        "lokr_w1",
        "",
        "\n",
        "é",
    )

    def edit(key, value):
        pieces = str(key).split(".")
        pieces[rng.randrange(len(pieces))] = rng.choice(parts)
        return {".".join(pieces): value}

    return _edited(rng, tree, edit)


def drop(rng, tree):
    return _edited(rng, tree, lambda key, value: {})


def reshape(rng, tree):
    shapes = [(), (0,), (1,), (5,), (0, 3), (3, 0), (4, 3), (7, 3), (80, 3), (2, 2, 2), (4, 3, 1, 1)]
    return _edited(rng, tree, lambda key, value: {key: torch.ones(rng.choice(shapes))})


def retype(rng, tree):
    kinds = [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8, torch.complex64,
             torch.float8_e4m3fn]  # fmt: skip
    return _edited(rng, tree, lambda key, value: {key: torch.ones(2, 3).to(rng.choice(kinds))})


def poison(rng, tree):
    def edit(key, value):
        shape = value.shape if isinstance(value, torch.Tensor) else (2, 3)
        bad = torch.rand(shape) < rng.choice([0.2, 1.0])
        return {key: torch.ones(shape).masked_fill(bad, rng.choice([torch.nan, torch.inf]))}

    return _edited(rng, tree, edit)


def replace_value(rng, tree):
    values = [None, 3, "x", [], {}, {"u": torch.ones(2, 2)}, [torch.ones(3)] * 3, {"*": torch.ones(1, 3)}, (1, 2), 1.5]
    return _edited(rng, tree, lambda key, value: {key: rng.choice(values)})


def join(rng, tree):
    return tree | rng.choice(list(contents().values()))[0]


# Mutations of a file: (rng, bytes) -> bytes.


def flip(rng, data):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 8])):
        bit = rng.randrange(len(data) * 8)
        data[bit // 8] ^= 1 << bit % 8
    return bytes(data)


def flip_index(rng, data):
    """Flip among the first bytes, where names, shapes and offsets are."""
    return flip(rng, data[:600]) + data[600:]


def cut(rng, data):
    return data[: rng.randrange(len(data))]


def lengthen(rng, data):
    return data + rng.randbytes(rng.choice([1, 100, 5000]))


def overwrite(rng, data):
    start, length = rng.randrange(len(data)), rng.choice([1, 4, 8, 64])
    return data[:start] + rng.choice([b"\xff", b"\0", b"\x7f", b"9"]) * length + data[start + length :]


def header(rng, data):
    """Edit a safetensors header: lengths, offsets, shapes and types that lie."""
    size = int.from_bytes(data[:8], "little")
    if data[8:9] != b"{":
        return overwrite(rng, data)
    if rng.random() < 0.2:
        return struct.pack("<Q", rng.choice([0, 1, size - 1, size + 1, 50 << 30, 2**64 - 1])) + data[8:]
    entries = json.loads(data[8 : 8 + size])
    if (texts := entries.get("__metadata__")) and rng.random() < 0.3:
        odd = [
            "[" * 100_000,
            '{"a": ' + "1" * 5000 + "}",
            '{"a": "\\ud800"}',
            "null",
            "[]",
            "\x1b[2J",
            "",
            "9" * 100_000,
        ]
        texts[rng.choice(sorted(texts))] = rng.choice(odd)
        text = json.dumps(entries).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + size :]
    entry = entries[rng.choice([key for key in entries if key != "__metadata__"])]
    field = rng.choice(["dtype", "shape", "data_offsets"])
    entry[field] = rng.choice(
        [[50 << 30, 1], [-1, 3], [2**63, 2**63], [0, 50 << 30], [8, 0], [], None, "F16", "F64", "F4", [1.5], [[3]]]
    )
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def repack(rng, data):
    """Write a torch file's zip archive again: records compressed, lost, doubled, exchanged or empty."""
    if not data.startswith(b"PK"):
        return flip_index(rng, data)
    out, how = io.BytesIO(), rng.choice(["compress", "lose", "double", "exchange", "empty", "rename"])
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a name twice
        infos = old.infolist()
        which = rng.choice(infos)
        for info in infos:
            name, content = info.filename, old.read(info)
            if info is which and how == "lose":
                continue
            if info is which and how == "exchange":
                content = old.read(rng.choice(infos))
            if info is which and how == "rename":
                name = rng.choice(["data.pkl", "../x", "archive/data/0", "constants.pkl", "/"])
            kind = zipfile.ZIP_DEFLATED if how == "compress" else zipfile.ZIP_STORED
            new.writestr(name, b"" if info is which and how == "empty" else content, kind)
            if info is which and how == "double":
                new.writestr(name.upper(), content)
    return out.getvalue()


def other_head(rng, data):
    """Another container's start."""
    heads = [
        b"PK\x03\x04",
        b"\x80\x02",
        b"\x80\x04\x95",
        as_old_torch({}, {})[:30],
        struct.pack("<Q", 60) + b"{",
        b"<html>",
    ]
    head = rng.choice(heads)
    return head + data[rng.choice([0, len(head)]) :]


def splice(rng, data):
    tensors, texts = rng.choice(list(contents().values()))
    other = rng.choice(containers_of(tensors))(tensors, texts)
    return data[: rng.randrange(len(data))] + other[rng.randrange(len(other)) :]


OF_TREES = (rename, rename, drop, reshape, retype, poison, replace_value, join)
OF_BYTES = (flip, flip_index, flip_index, cut, lengthen, overwrite, other_head, splice)
OF_WHOLE_FILES = (header, header, repack)


def mutated(rng: random.Random) -> tuple[str, bytes]:
    """What was done, and a file."""
    kind, (tree, texts) = rng.choice(list(contents().items()))
    steps = []
    while rng.random() < 0.5 and tree:
        change = rng.choice(OF_TREES)
        tree = change(rng, tree)
        steps.append(change.__name__)
    container = rng.choice(containers_of(tree))
    try:
        data = container(tree, texts)
    except (ValueError, TypeError, RuntimeError):  # a name twice, or a shape that safetensors does not write
        data = as_torch(tree, texts)
    choices = OF_BYTES + OF_WHOLE_FILES if tree else OF_BYTES
    while not steps or rng.random() < 0.4:
        change, choices = rng.choice(choices), OF_BYTES
        data = change(rng, data) or b"\0"
        steps.append(change.__name__)
    return f"{kind} {container.__name__} {' '.join(steps)}", data


def outcome(path: Path) -> str:
    """ "read" or "refused"; an error of any other kind is not caught, one that takes too long or lines is raised."""
    start = time.monotonic()
    try:
        parsed = read_concept_file(path)
        groups = (parsed.deltas, parsed.outside, parsed.text_deltas)
        assert isinstance(parsed, Concept) or parsed.embeddings or parsed.weights or any(groups), "nothing was read"
        found = "read"
    except ConceptError as error:
        text = str(error)
        assert text.startswith(str(path)), f"the file is not named: {text}"
        assert "\n" not in text and len(text) < 600 + len(str(path)), f"not one short line: {text}"
        found = "refused"
    taken = time.monotonic() - start
    assert taken < LIMIT, f"took {taken:.1f} s"
    return found


def stress(folder: Path, count: int, seed: int) -> Counter:
    """Read `count` mutated files; how many were read and how many refused. An error names the one that broke it."""
    counts: Counter = Counter()
    suffixes = (".safetensors", ".bin", ".pt", ".ckpt")
    for number in range(count):
        rng = random.Random(f"{seed}:{number}")
        torch.manual_seed(number)
        what, data = mutated(rng)
        path = folder / f"concept{rng.choice(suffixes)}"
        path.write_bytes(data)
        before = set(os.listdir(folder))
        try:
            counts[outcome(path)] += 1
        except Exception as error:
            raise AssertionError(f"file {number} of seed {seed} ({what}): {type(error).__name__}: {error}") from error
        assert set(os.listdir(folder)) == before, f"file {number} of seed {seed} ({what}) wrote something"
        path.unlink()
    return counts


def main(argv: list[str] | None = None) -> int:
    """Command line; an error ends it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        counts = stress(Path(folder), arguments.files, arguments.seed)
    print(f"damaged concept files: {arguments.files}, {counts['read']} read, {counts['refused']} refused in one line")
    return 0


if __name__ == "__main__":
    sys.exit(main())
