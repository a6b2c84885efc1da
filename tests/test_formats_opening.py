"""Any file is opened or refused in one line, within two seconds; nothing in it is run, nor more read than it has."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import re
import resource
import struct
import time
import zipfile
from collections import OrderedDict

import format_contents as contents
import format_files as files
import format_mutations as mutations
import pytest
import torch
from safetensors.torch import save

from weaver.concepts.concept import Concept, ConceptError
from weaver.concepts.formats import read_concept_file
from weaver.concepts.formats.opening import open_tensors

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
SUFFIXES = pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt", ".ckpt"])
SAVERS = pytest.mark.parametrize("saver", contents.CONTAINERS, ids=lambda saver: saver.__name__.removeprefix("as_"))


class Trap:
    """Makes a file when it is unpickled by Python's own unpickler."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def refusal(path) -> str:
    """The one line of the error, which names the file and comes within two seconds."""
    start = time.monotonic()
    with pytest.raises(ConceptError) as raised:
        read_concept_file(path)
    assert time.monotonic() - start < mutations.LIMIT
    assert str(raised.value).startswith(f"{path}: ") and "\n" not in str(raised.value)
    return str(raised.value)


def archive(pickled: bytes, storages: dict[str, bytes], compression=zipfile.ZIP_STORED) -> bytes:
    """A file as `torch.save` writes it, of any pickle."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/byteorder", "little")
        for key, data in storages.items():
            file.writestr(f"archive/data/{key}", data)
        file.writestr("archive/version", "3\n")
    return out.getvalue()


def torch_pickle(data: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return next(file.read(name) for name in file.namelist() if name.endswith("/data.pkl"))


@SUFFIXES
@SAVERS
def test_content_decides_not_the_name(saver, suffix, tmp_path):
    path = tmp_path / f"concept{suffix}"
    path.write_bytes(saver(TENSORS, {}))
    opened = open_tensors(path)
    assert opened.container == ("safetensors" if saver is contents.as_safetensors else "torch")
    assert sorted(opened.names()) == ["a", "b"]
    loaded = opened.loaded().tensors
    assert all(torch.equal(loaded[name], x) and loaded[name].dtype == x.dtype for name, x in TENSORS.items())


@pytest.mark.parametrize("saver", contents.CONTAINERS[1:], ids=["torch", "old_torch"])
def test_a_torch_file_keeps_its_nesting(saver, tmp_path):
    x = torch.nn.Parameter(torch.randn(3, 2))
    tree = {"unet": OrderedDict(w=x, again=x), "l": [x.detach().t(), "text", None, 2, 0.5, True], "token": {"*": 3}}
    path = tmp_path / "c.bin"
    path.write_bytes(saver(tree, {}))
    loaded = open_tensors(path).loaded().tensors
    assert torch.equal(loaded["unet"]["w"], x) and loaded["unet"]["w"] is loaded["unet"]["again"]
    assert torch.equal(loaded["l"][0], x.t()) and loaded["l"][1:] == ["text", None, 2, 0.5, True]
    assert loaded["token"] == {"*": 3} and not loaded["unet"]["w"].requires_grad


def test_metadata_is_read(tmp_path):
    path = tmp_path / "c.safetensors"
    path.write_bytes(save(TENSORS, {"ss_network_dim": "4"}))
    assert open_tensors(path).metadata == {"ss_network_dim": "4"}


def test_our_own_file_is_a_concept_by_any_name(tmp_path):
    tensors, texts = contents.contents()["own"]
    path = tmp_path / "rex.bin"
    path.write_bytes(save(tensors, texts))
    assert isinstance(concept := read_concept_file(path), Concept) and concept.token == "<v1>"


@SUFFIXES
@pytest.mark.parametrize("kind", ["pickle", "pickle-in-zip", "old-torch", "torch-save"])
def test_code_is_not_run(kind, suffix, tmp_path):
    trap = tmp_path / "trap"
    tree = {"<a>": torch.ones(3), "code": Trap(trap)}
    path = tmp_path / f"concept{suffix}"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(tree["code"]))
    elif kind == "pickle-in-zip":
        path.write_bytes(archive(pickle.dumps(tree["code"], protocol=2), {}))
    else:
        torch.save(tree, path, _use_new_zipfile_serialization=kind == "torch-save")
    message = refusal(path)
    assert "not run" in message and "safetensors" in message
    assert not trap.exists()
    if kind == "pickle":
        pickle.loads(path.read_bytes()).close()
        assert trap.exists()  # the trap is one


@SAVERS
def test_every_length_of_a_file_that_is_cut_short(saver, tmp_path):
    data = saver({"<a>": torch.ones(3)}, {})
    path = tmp_path / "c.bin"
    for length in range(1, len(data), 1 + len(data) // 60):
        path.write_bytes(data[:length])
        refusal(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\x89PNG\r\n\x1a\n" + b"x" * 99, "neither a safetensors file nor one of `torch.save`"),
        (b"x", "neither"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer.*git lfs pull"),
        (struct.pack("<Q", 50 << 30) + b'{"a":', "header claims 53687091200 bytes of 13"),
        (struct.pack("<Q", 2) + b"{}", "its tensors .none"),
        (struct.pack("<Q", 5) + b"{nope", "no whole safetensors file"),
        (b"PK\x03\x04" + b"x" * 99, "no whole file of `torch.save`"),
    ],
    ids=["empty", "png", "one-byte", "html", "lfs", "header-of-50-GB", "nothing", "no-json", "no-zip"],
)
def test_what_is_no_container(content, message, tmp_path):
    path = tmp_path / "c.safetensors"
    path.write_bytes(content)
    assert re.search(message, refusal(path))


ENTRIES = {
    "50-GB": {"dtype": "F32", "shape": [50 << 28], "data_offsets": [0, 50 << 30]},
    "overlap": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
    "backwards": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]},
    "shape": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 8]},
    "overflow": {"dtype": "F32", "shape": [1 << 63, 2], "data_offsets": [0, 0]},
    "negative": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
    "dtype": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]},
}


@pytest.mark.parametrize("lie", ENTRIES)
def test_a_safetensors_header_that_lies(lie, tmp_path):
    text = json.dumps({"<a>": ENTRIES[lie]}).encode()
    path = tmp_path / "c.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 8)
    assert "no whole safetensors file" in refusal(path)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def sized(count: int, shape: int, stride: int = 1) -> bytes:
    """The pickle of `{"<a>": tensor}` with a storage, a shape and a stride that may lie."""
    named = text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + number(count)
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n((" + named + b"tQK\0" + number(shape) + b"\x85" + number(stride)
    return b"\x80\x02}" + text("<a>") + tensor + b"\x85\x89ccollections\nOrderedDict\n)RtRs."


def test_pickles_by_hand_are_torchs_own(tmp_path):
    path = tmp_path / "c.pt"
    path.write_bytes(archive(sized(2, 2), {"0": b"\0\0\x80?" * 2}))
    assert read_concept_file(path).embeddings["<a>"]["text_encoder"].tolist() == [[1.0, 1.0]]


DOUBLED = b"".join(b"q%ch%ce" % (i, i) for i in range(40))  # each list twice in the next
BOMBS = {
    "storage-of-50-GB": (sized(50 << 28, 50 << 28), "claims 53687091200 bytes, and the file has 8"),
    "storage-beyond-its-record": (sized(3, 3), "claims 12 bytes, and the file has 8"),
    "storage-of-less-than-none": (sized(-1, 2), "in a way that PyTorch does not"),
    "storage-that-is-not-there": (sized(2, 2).replace(text("0"), text("7")), "and the file has 0"),
    "one-number-a-billion-times": (sized(2, 1 << 30, 0), "a tensor claims 4294967296 bytes of a storage of 8"),
    "names-of-names": (
        b"\x80\x02}" + b")" + b"q\x00h\x00\x86" * 64 + b"NsN.",
        "names that are neither text nor numbers",
    ),
    "a-tuple-without-end": (b"\x80\x02(" + b"N" * 500_000 + b"t.", "a tuple of 500000"),
    "lists-of-lists": (b"\x80\x02}" + text("a") + b"](" * 40 + b"]" + DOUBLED + b"s.", "deeper"),
    "a-list-copied-again-and-again": (
        b"\x80\x02]q\x00(" + b"]" * 1000 + b"e" + b"ccollections\nOrderedDict\n(h\x00tR" * 9 + b".",
        "a call that PyTorch does not write",
    ),
    "a-byte-array-of-4-GB": (b"\x80\x02c__builtin__\nbytearray\n" + number(1 << 32) + b"\x85R.", "code in it"),
    "deep": (b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", "bare list"),
    "no-end": (b"\x80\x02}", "no whole file"),
    "nothing-to-take": (b"\x80\x02t.", "no whole file"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_torch_file_that_claims_more_than_it_has(bomb, tmp_path):
    pickled, message = BOMBS[bomb]
    path = tmp_path / "c.pt"
    path.write_bytes(archive(pickled, {"0": b"\0\0\x80?" * 2}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert message in refusal(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # kB


def test_a_zip_bomb(tmp_path):
    path = tmp_path / "c.pt"
    path.write_bytes(archive(b"\0" * (200 << 20), {}, zipfile.ZIP_DEFLATED))
    assert "compressed zip archive" in refusal(path)


def test_an_index_too_large_for_a_concept(tmp_path):
    path = tmp_path / "c.pt"
    path.write_bytes(archive(b"\x80\x02" + b"N0" * (1 << 20) + b"N.", {}))
    assert "too large for a concept" in refusal(path)
    path.write_bytes(archive(b"\x80\x02}.", {str(i): b"" for i in range(20_000)}))
    assert "too large for a concept" in refusal(path)


def test_views_of_one_storage_do_not_become_many(tmp_path):
    x = torch.ones(3, 100_000)
    path = files.save({f"<{i}>": x.t() for i in range(9)}, tmp_path / "c.bin")
    assert "save clones" in refusal(path)


@SAVERS
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_what_is_not_finite(saver, value, tmp_path):
    path = tmp_path / "c.bin"
    path.write_bytes(saver({"<a>": torch.tensor([[1.0, value]])}, {}))
    assert "'<a>' has NaN or infinite values" in refusal(path)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_dtypes_that_are_no_weights(dtype, tmp_path):
    path = tmp_path / "c.safetensors"
    path.write_bytes(save({"<a>": torch.ones(3).to(dtype)}))
    assert f"has dtype {dtype}, expected" in refusal(path)


def test_nothing_in_a_tensor(tmp_path):
    assert "has shape (0, 3): nothing is in it" in refusal(files.save({"<a>": torch.ones(0, 3)}, tmp_path / "c.bin"))


def test_paths_that_are_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "there is no such file" in refusal(tmp_path / "none.bin")
    assert "is a folder" in refusal(tmp_path)
    assert "is no ordinary file" in refusal(tmp_path / "pipe")
    assert "can't be read" in refusal(tmp_path / ("x" * 300))
    assert "can't be read" in refusal(tmp_path / "a\0b")


def test_a_file_without_permission(tmp_path):
    path = files.save({"<a>": torch.ones(3)}, tmp_path / "c.bin")
    path.chmod(0)
    root = os.geteuid() == 0
    if root:  # who may read everything: as somebody else
        os.seteuid(65534)
    try:
        message = refusal(path)
    finally:
        if root:
            os.seteuid(0)
    assert "can't be read ('Permission denied')" in message


def test_a_whole_checkpoint_is_told_without_reading_it(tmp_path):
    """4 GB that are not on the disk: only names are looked at."""
    tensors = {"model.diffusion_model.input_blocks.0.0.weight": 1 << 30}
    entries = {name: {"dtype": "F32", "shape": [n], "data_offsets": [0, 4 * n]} for name, n in tensors.items()}
    text = json.dumps(entries).encode()
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + (4 << 30))
    assert "is a whole checkpoint" in refusal(path)


def sparse(path, shape):
    """Files of gigabytes that are not on the disk, with one tensor of this shape, named as a token is."""
    size = 4 * math.prod(shape)
    text = json.dumps({"<a>": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + size)
    return path


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ([75, 10**7], "'<a>' has shape (75, 10000000), too large for a token"),
        ([10**7, 75], "'<a>' has shape (10000000, 75), too large for a token"),
        ([10, 10**4, 10**4], "its tensors ('<a>', ...) are of no format that is known"),
    ],
    ids=["wide", "many", "unknown"],
)
def test_gigabytes_of_another_kind_are_told_without_reading_them(tmp_path, shape, message):
    path = sparse(tmp_path / "c.safetensors", shape)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert message in refusal(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # kB


def test_two_hundred_damaged_files(tmp_path):
    counts = mutations.stress(tmp_path, 200, seed=1)
    assert counts["read"] > 10 and counts["refused"] > 100
