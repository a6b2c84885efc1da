"""A bank's folder: names, cards and previews, whole whatever happens to those who write it."""

from __future__ import annotations

import gc
import json
import os
import re
import threading
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import cache_stress as stress
import pytest
import torch
from conftest import TEXT_LENGTH, make_concept, make_pipeline
from filelock import FileLock
from PIL import Image

from benchmarks import rows
from benchmarks.model_shapes import write_model
from weaver import FusionPlan, load_concept
from weaver.cache import Cache
from weaver.concepts import bank_folder
from weaver.concepts.bank_folder import BankFolder, Kept
from weaver.concepts.concept import Concept, ConceptError, attn2_projections
from weaver.concepts.formats.convert import convert
from weaver.errors import WeaverError
from weaver.fusion import ConceptUse
from weaver.memory.shapes import load_shapes
from weaver_kernels import LowRank

PICTURES = (Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue"))
ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")
MEASURED = ROOT / "benchmarks" / "results" / "concept_memory.csv"


@pytest.fixture(scope="module")
def rex(pipe):
    return replace(make_concept(pipe, 1, "dog"), name="rex", settings={"steps": 5})


@pytest.fixture
def bank(tmp_path):
    return BankFolder(tmp_path / "bank")


def files(bank):
    return sorted(path.name for path in bank.folder.iterdir())


def faults(bank):
    return {name: found for name in bank.names() if (found := bank.faults(name))}


def test_what_is_added_is_there(bank, rex):
    (card,) = bank.add([Kept(rex, PICTURES)])
    assert files(bank) == [".lock", "rex.json", "rex.preview-0.png", "rex.preview-1.png", "rex.safetensors"]
    assert bank.card("rex") == card and [entry.card for entry in bank.entries()] == [card] and not faults(bank)
    assert (card.token, card.word, card.base, card.ranks) == ("<v1>", "dog", rex.base_hash, [])
    assert card.settings == {"steps": 5} and card.bytes == bank.path("rex").stat().st_size
    again = Concept.load(bank.path("rex"))
    assert all(torch.equal(again.deltas[key], delta) for key, delta in rex.deltas.items())


def test_the_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("WEAVER_BANK", str(tmp_path / "mine"))
    assert BankFolder().folder == tmp_path / "mine"
    monkeypatch.delenv("WEAVER_BANK")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert BankFolder().folder == tmp_path / ".local" / "share" / "concept-weaver" / "bank"
    assert BankFolder().names() == [] and list(tmp_path.iterdir()) == []


def test_without_a_home_the_variable_is_told_and_a_named_folder_will_do(monkeypatch, tmp_path):
    monkeypatch.delenv("WEAVER_BANK", raising=False)
    monkeypatch.delenv("WEAVER_CACHE")
    monkeypatch.setattr(Path, "expanduser", Mock(side_effect=RuntimeError("Could not determine home directory.")))
    with pytest.raises(WeaverError, match="no home folder is known here: set WEAVER_BANK to a folder"):
        BankFolder()
    with pytest.raises(WeaverError, match="set WEAVER_CACHE to a folder"):
        Cache()
    assert Cache(tmp_path).folder == tmp_path


@pytest.mark.parametrize(
    "name", ["../x", ".x", "a/b", "a\\b", "", "x.", "x ", "-x", "<v1>", "a\n", "a" * 101, "/x", "a:b"], ids=repr
)
def test_a_name_that_is_no_files_is_refused(bank, rex, name):
    if name:  # no concept is without one
        with pytest.raises(ConceptError, match="is no name in a bank: letters, digits"):
            bank.add([Kept(replace(rex, name=name))])
    for use in (bank.path, bank.card, bank.faults, lambda name: bank.remove([name])):
        with pytest.raises(ConceptError, match="is no name in a bank: letters, digits"):
            use(name)
    assert not bank.folder.exists()


@pytest.mark.parametrize("name", ["rex", "Rex 2", "r.e-x_", "café", "a" * 100], ids=repr)
def test_names_that_are(bank, rex, name):
    bank.add([Kept(replace(rex, name=name), PICTURES[:1])])
    assert bank.names() == [name] and not faults(bank)


def test_nothing_is_added_where_one_name_is_taken(bank, rex):
    bank.add([Kept(rex)])
    tom = Kept(replace(rex, name="tom"))
    with pytest.raises(ConceptError, match="has 'rex' already: give --replace, or another --name"):
        bank.add([tom, Kept(rex)])
    with pytest.raises(ConceptError, match="two of the files have the name 'tom'"):
        bank.add([tom, tom])
    assert bank.names() == ["rex"]


def test_what_is_replaced_leaves_no_preview(bank, rex):
    other = Kept(replace(rex, name="rex.preview-1"), PICTURES)
    bank.add([Kept(rex, PICTURES), other])
    bank.add([Kept(replace(rex, word="cat"), PICTURES[:1])], replace=True)
    assert bank.card("rex").word == "cat" and not faults(bank)
    assert [name for name in files(bank) if name.startswith("rex.preview-1.")] == [
        *(f"rex.preview-1.{kind}" for kind in ("json", "preview-0.png", "preview-1.png", "safetensors")),
    ]
    bank.remove(["rex"])
    assert bank.names() == ["rex.preview-1"] and not faults(bank)
    with pytest.raises(ConceptError, match="'rox' is not there"):
        bank.remove(["rex.preview-1", "rox"])
    assert bank.names() == ["rex.preview-1"]


def _cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def _half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _lacking(path):
    card = json.loads(path.read_text())
    del card["base"]
    path.write_text(json.dumps(card))


def _other(path):
    card = json.loads(path.read_text())
    path.write_text(json.dumps(card | {"word": "cat", "previews": []}))


def _outside(path):
    card = json.loads(path.read_text())
    path.write_text(json.dumps(card | {"previews": ["../x.png"]}))


@pytest.mark.parametrize(
    ("file", "fault", "expected"),
    [
        ("rex.safetensors", _cut, "cut short .*is not what was added"),
        ("rex.safetensors", _flip, "is not what was added: its file has SHA-256"),
        ("rex.safetensors", Path.unlink, "has a card and no file"),
        ("rex.json", Path.unlink, "has no card: a writer was killed"),
        ("rex.json", _cut, "has a card that can't be read"),
        ("rex.json", lambda path: path.write_text("[]"), "has a file rex.json that is no card"),
        ("rex.json", _lacking, "has a card that is not whole: base"),
        ("rex.json", _other, "has a card that says otherwise than its file: word"),
        ("rex.json", _outside, "has a card that names previews elsewhere"),
        ("rex.preview-1.png", Path.unlink, "a preview can't be opened: .*rex.preview-1.png"),
        ("rex.preview-1.png", _half, "a preview can't be opened: .*rex.preview-1.png"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_every_fault_is_told_and_no_other_concept_is_touched(bank, rex, file, fault, expected):
    bank.add([Kept(rex, PICTURES), Kept(replace(rex, name="tom"))])
    fault(bank.folder / file)
    (found,) = faults(bank).values()
    assert re.search(expected, "; ".join(found))
    assert [entry.name for entry in bank.entries()] == ["rex", "tom"] and bank.entries()[1].card
    bank.add([Kept(rex, PICTURES)], replace=True)
    assert not faults(bank)


def test_a_card_of_another_is_told(bank, rex):
    bank.add([Kept(rex)])
    for suffix in ("json", "safetensors"):
        os.rename(bank.folder / f"rex.{suffix}", bank.folder / f"max.{suffix}")
    assert faults(bank) == {"max": ["has the card of 'rex'"]}


def test_with_a_model_a_concept_of_another_is_told(bank, pipe, rex):
    bank.add([Kept(rex)])
    assert bank.faults("rex", pipe) == []
    (fault,) = bank.faults("rex", make_pipeline(dtype=torch.float32, seed=5))
    assert "belongs to another base model" in fault


def test_with_a_model_a_lora_of_another_is_told_where_no_cross_attention_is_changed(bank, pipe, rex, tmp_path):
    path = next(path for path, module in pipe.unet.named_modules() if path.endswith("attn1.to_q"))
    width = pipe.unet.get_submodule(path).in_features
    for wide, fits in ((width, True), (width + 8, False)):
        concept = replace(rex, deltas={}, outside={path: LowRank(torch.ones(2, wide), torch.ones(wide, 2))})
        bank.add([Kept(concept)], replace=True)
        faults = bank.faults("rex", pipe)
        assert faults == [] if fits else "1 of the 1 modules that it changes outside of cross-attention" in faults[0]
        file = tmp_path / "rex.safetensors"
        concept.save(file)
        if fits:
            assert load_concept(file, pipe).outside.keys() == {path}
        else:
            with pytest.raises(ConceptError, match="belongs to another base model"):
                load_concept(file, pipe)
        assert load_concept(file).outside.keys() == {path}  # its cross-attention could be used alone


def killed_at(number, bank, kept):
    """Add a concept in a process that is killed at its rename `number`, as if the power went."""
    count, rename = 0, os.replace

    def renamed(*args):
        nonlocal count
        if count == number:
            os._exit(0)
        count += 1
        rename(*args)

    os.replace = renamed
    bank.add(kept, replace=True)


@pytest.mark.parametrize("before", [False, True], ids=["new", "replaced"])
@pytest.mark.parametrize("number", range(5))  # of the concept's own writing, the file, two previews and the card
def test_a_killed_writer_leaves_whole_files(bank, rex, before, number):
    bank.add([Kept(replace(rex, name="tom")), *([Kept(rex)] if before else [])])
    os.waitpid(stress.in_child(killed_at, number, bank, [Kept(replace(rex, word="cat"), PICTURES)]), 0)
    assert any(bank.folder.glob(".partial-*"))
    told = faults(bank)
    assert told in (
        {},
        {"rex": ["has no card: a writer was killed, or the file was copied here; add it with --replace"]},
    )
    assert (told == {}) == (number < 2 and not (before and number == 1))
    if "rex" in bank.names():
        assert Concept.load(bank.path("rex")).word == ("cat" if number > 1 else "dog")
    bank.add([Kept(rex, PICTURES)], replace=True)
    assert not faults(bank) and not any(bank.folder.glob(".partial-*"))


def test_two_writers_at_once(bank, rex):
    """Each adds names of its own, and one that both want: one of them gets it."""
    refused = []

    def write(number):
        own = BankFolder(bank.folder)
        for count in range(5):
            own.add([Kept(replace(rex, name=f"{number}-{count}"), PICTURES)])
            try:
                own.add([Kept(replace(rex, name=f"both-{count}", token=f"<{number}>"), PICTURES[:number])])
            except ConceptError as error:
                refused.append(str(error))

    threads = [threading.Thread(target=write, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(bank.names()) == 15 and len(refused) == 5 and not faults(bank)
    for count in range(5):
        card = bank.card(f"both-{count}")
        assert card.token == f"<{len(card.previews)}>"


def test_a_folder_that_cannot_be_written_is_told(bank, rex, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WeaverError, match="can't be changed"):
        BankFolder(tmp_path / "file").add([Kept(rex)])
    with pytest.raises(WeaverError, match="can't be read"):
        BankFolder(tmp_path / "file").names()
    bank.add([Kept(rex)])
    monkeypatch.setattr(bank_folder, "_WAIT", 0.05)
    with FileLock(bank.folder / ".lock"), pytest.raises(WeaverError, match="can't be changed"):
        bank.remove(["rex"])
    assert not faults(bank)


def held() -> int:
    """Bytes of all tensors' storages that are alive."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter) and x.device.type == "cpu"]
    tensors = [x for x in tensors if not torch._C._functorch.is_functorch_wrapped_tensor(x)]  # which other tests left
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def test_ten_concepts_hold_ten_deltas(pipe, rex, tmp_path):
    """Of files with whole weights in them too, from which deltas are made."""
    path = convert(rex, "custom-diffusion", tmp_path / "rex.bin", pipe=pipe).files[0]
    load_concept(path, pipe, word="dog")
    before = held()
    concepts = [load_concept(path, pipe, word="dog") for _ in range(10)]
    deltas = 2 * sum(linear.weight.numel() for linear in attn2_projections(pipe.unet).values())  # half precision
    vectors = sum(x.numel() for x in rex.embeddings.values())
    assert 10 * deltas <= held() - before <= 10 * (deltas + 4 * vectors)
    assert len({id(x.deltas) for x in concepts}) == 10


def test_what_a_concept_takes_of_stable_diffusion(pipe, rex, tmp_path):
    """The page's figures, from the true shapes; that a plan keeps no more is seen on the tiny model."""
    linears = attn2_projections(load_shapes(str(write_model("sd21", tmp_path)), device="cpu").pipe.unet).values()
    assert len(linears) == 32
    before = 2 * sum(linear.weight.numel() for linear in linears) / 1e6
    after = 2 * 77 * sum(linear.out_features for linear in linears) / 1e6
    assert before < 55 and after < 4
    assert f"{before:.1f} MB" in PAGE and f"{after:.1f} MB" in PAGE
    measured = {row["what"]: float(row["mb_each"]) for row in rows.read(MEASURED) if row["model"] == "sd21"}
    assert measured == {"loaded": pytest.approx(before, rel=0.01), "keys and values": pytest.approx(after, rel=0.01)}
    plan = FusionPlan.build(pipe, [ConceptUse(rex)], torch.ones(1, 32, 32), prompt="a dog", height=32, width=32)
    of_one = sum(x.numel() // len(x) for kv in plan.keys_values.values() for x in (kv.keys, kv.values))
    assert of_one == TEXT_LENGTH * sum(linear.out_features for linear in attn2_projections(pipe.unet).values())
