"""`weaver bank`, and jobs that name concepts of a bank."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from conftest import make_concept, make_pipeline
from jobs import SIDE
from PIL import Image
from safetensors.torch import save_file
from test_formats_lora import saved

from weaver.cli import main
from weaver.concepts.bank_folder import BankFolder
from weaver.concepts.concept import Concept, attn2_projections
from weaver.hashing import file_hash
from weaver.job import JobError
from weaver.job.inputs import read_inputs
from weaver.job.parse import job_from_mapping


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The default bank of every test."""
    monkeypatch.setenv("WEAVER_BANK", str(tmp_path / "bank"))
    return tmp_path / "bank"


@pytest.fixture
def rex(pipe, tmp_path):
    """Our own file."""
    return replace(make_concept(pipe, 1, "dog"), name="rex").save(tmp_path / "any.safetensors")


@pytest.fixture
def inversion(tmp_path):
    """A textual inversion."""
    path = tmp_path / "tom.safetensors"
    save_file({"<tom>": torch.ones(2, 16)}, path)
    return path


@pytest.fixture
def weights(pipe, tmp_path):
    """Custom Diffusion's weights, in the place of the base model's, and the token beside them."""
    path = tmp_path / "custom" / "hills.safetensors"
    path.parent.mkdir()
    projections = attn2_projections(pipe.unet).items()
    save_file(
        {f"{key.replace('to_', 'processor.to_')}_custom_diffusion.weight": x.weight + 0.1 for key, x in projections},
        path,
    )
    save_file({"<new1>": torch.ones(16)}, path.with_name("<new1>.safetensors"))
    return path


def bank(capsys, *arguments):
    code = main(["bank", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def test_own_files_are_added_listed_shown_and_removed(capsys, folder, rex, tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "look.png")
    code, out, err = bank(capsys, "add", rex, "--preview", tmp_path / "look.png")
    assert (code, err) == (0, "") and out.startswith("rex: '<v1> dog', Concept Weaver, 26.")
    base = Concept.load(rex).base_hash
    code, out, _ = bank(capsys, "list")
    head, row, total = out.splitlines()
    assert code == 0 and head.split() == ["name", "token", "word", "method", "size", "base"]
    assert re.fullmatch(rf"rex +<v1> +dog +Concept Weaver +26\.\d kB +{base[:12]}", row)
    assert re.fullmatch(rf"{folder}: 1 concept \(26\.\d kB\)", total)
    code, out, _ = bank(capsys, "show", "rex")
    assert (
        code == 0 and "keys and values of cross-attention: 32 weights, whole matrices, 100% of the squared norm" in out
    )
    assert f"card: '<v1> dog', from Concept Weaver, SHA-256 {file_hash(folder / 'rex.safetensors')[:12]}" in out
    assert f"preview: {folder / 'rex.preview-0.png'}" in out
    assert bank(capsys, "remove", "rex") == (0, f"{folder}: rex thrown away, 0 concepts left\n", "")
    assert bank(capsys, "list") == (0, f"{folder}: 0 concepts (0 B)\n", "")


def test_cards_for_scripts(capsys, folder, rex, inversion, tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "look.png")
    bank(capsys, "add", rex, "--preview", tmp_path / "look.png")
    bank(capsys, "add", inversion, "--word", "cat")
    (folder / "tom.json").unlink()
    code, out, err = bank(capsys, "list", "--json")
    told = json.loads(out)
    assert (code, err, told["folder"]) == (0, "", str(folder))
    of_rex, of_tom = told["concepts"]
    path, preview = folder / "rex.safetensors", folder / "rex.preview-0.png"
    assert (of_rex["name"], of_rex["token"], of_rex["word"]) == ("rex", "<v1>", "dog")
    assert of_rex["base"] == Concept.load(rex).base_hash and of_rex["sha256"] == file_hash(path)
    assert (of_rex["file"], of_rex["previews"]) == (str(path), [str(preview)])
    assert of_tom.keys() == {"name", "fault"} and of_tom["name"] == "tom" and "has no card" in of_tom["fault"]
    code, out, err = bank(capsys, "show", "rex", "--json")
    shown = json.loads(out)
    assert (code, err, shown["card"]) == (0, "", of_rex)
    assert shown["parts"][0]["name"] == "keys and values of cross-attention" and shown["tokens"] == {"<v1>": 1}
    assert json.loads(bank(capsys, "show", "tom", "--json")[1])["card"] == of_tom
    bank(capsys, "remove", "rex", "tom")
    assert json.loads(bank(capsys, "list", "--json")[1]) == {"folder": str(folder), "concepts": []}


def test_several_files_and_names(capsys, folder, rex, inversion):
    code, out, _ = bank(capsys, "add", rex, inversion, "--word", "cat")
    assert code == 0 and out.startswith("rex: '<v1> cat'") and "tom: '<tom> cat', textual inversion of diffusers" in out
    code, out, _ = bank(capsys, "add", rex, "--name", "max", "--token", "<max>", "--folder", folder)
    assert code == 0 and out.startswith("max: '<max> dog'")
    assert Concept.load(folder / "max.safetensors").token == "<max>" and BankFolder().names() == ["max", "rex", "tom"]
    code, _, err = bank(capsys, "add", rex, inversion, "--word", "cat", "--name", "both")
    assert code == 2 and "--name, --token and --preview are of one concept: add the files one by one" in err


def test_a_name_that_is_taken_needs_replace(capsys, folder, rex):
    assert bank(capsys, "add", rex)[0] == 0
    code, out, err = bank(capsys, "add", rex, "--word", "cat")
    assert (code, out) == (2, "") and err == (
        f"weaver: the bank {folder} has 'rex' already: give --replace, or another --name\n"
    )
    assert bank(capsys, "add", rex, "--word", "cat", "--replace")[0] == 0 and BankFolder().card("rex").word == "cat"


def test_weights_in_the_place_of_the_bases_need_their_model(capsys, folder, pipe, model, weights):
    code, _, err = bank(capsys, "add", weights, "--word", "mountain")
    assert code == 2 and f"{weights}: its weights take the place of the base model's" in err and "--model" in err
    assert err.count("\n") == 1 and not folder.exists()
    code, out, _ = bank(capsys, "add", weights, "--word", "mountain", "--model", model, "--offline")
    told, added = out.splitlines()[:2]
    assert code == 0 and told == f"{weights}: its token <new1> was taken from <new1>.safetensors beside it"
    assert added.startswith("hills: '<new1> mountain', Custom Diffusion of diffusers")
    kept = Concept.load(folder / "hills.safetensors")
    kept.check_base(pipe)
    assert len(kept.deltas) == 32
    for delta in kept.deltas.values():
        torch.testing.assert_close(delta.float(), torch.full(delta.shape, 0.1), rtol=1e-3, atol=1e-6)
    code, out, _ = bank(capsys, "verify", "--model", model)
    assert code == 0 and "1 concept looked at, none of them broken" in out


def test_a_lora_is_kept_whole_and_what_is_not_used_is_told(capsys, folder, tmp_path):
    targets = ["to_k", "to_v", "ff.net.2", "linear_1"]
    file = saved(make_pipeline(dtype=torch.float32), tmp_path, unet_targets=targets)
    code, _, err = bank(capsys, "add", file)
    assert code == 2 and "a diffusers LoRA does not tell its class word, such as 'dog': name it" in err
    code, _, err = bank(capsys, "add", file, "--word", "dog", "--name", "lora")
    assert code == 0 and err.count("\n") == 1 and "of its changes, time_embedding.linear_1 among them, act" in err
    code, _, err = bank(capsys, "add", file, "--word", "dog", "--name", "none", "--on-unused", "refuse")
    assert (
        code == 2
        and "of its changes, time_embedding.linear_1 among them, act" in err
        and BankFolder().names() == ["lora"]
    )
    out = tmp_path / "out.safetensors"
    refused = bank(capsys, "convert", "lora", "--to", "kohya-lora", "--out", out, "--on-unused", "refuse")
    assert (
        refused[0] == 2 and "of its changes, time_embedding.linear_1 among them, act" in refused[2] and not out.exists()
    )
    card, kept = BankFolder().card("lora"), Concept.load(folder / "lora.safetensors")
    assert (card.ranks, card.method, card.base, card.token) == ([2, 3], "diffusers LoRA", "", "")
    assert len(kept.outside) and len(kept.text_deltas) and len(kept.deltas) == 32
    assert "any that it fits" in bank(capsys, "list")[1]


def test_what_is_broken_is_listed_and_told_one_line_each(capsys, folder, rex, inversion, model):
    bank(capsys, "add", rex, inversion, "--word", "dog")
    bank(capsys, "add", rex, "--name", "max")
    bank(capsys, "add", rex, "--name", "pug")
    (folder / "rex.json").unlink()
    (folder / "tom.safetensors").unlink()
    (folder / "pug.safetensors").write_bytes((folder / "pug.safetensors").read_bytes()[:-9])
    code, out, _ = bank(capsys, "list")
    assert (
        code == 0
        and re.search(r"^rex +- has no card", out, re.M)
        and re.search(r"^tom +- has a card and no", out, re.M)
    )
    code, out, err = bank(capsys, "verify", "--model", model)
    told = err.splitlines()
    assert code == 2 and "4 concepts looked at, 3 of them broken" in out
    assert [line.split(":")[1] for line in told] == [" pug", " pug", " rex", " tom"]
    assert "cut short" in told[0] and "is not what was added" in told[1]
    assert bank(capsys, "verify", "max")[::2] == (0, "")
    assert "card: has no card" in bank(capsys, "show", "rex")[1]
    code, _, err = bank(capsys, "verify", "maxi")
    assert code == 2 and err == "weaver: maxi: is not there; did you mean 'max'?\n"


def test_a_model_that_a_concept_does_not_fit_is_told(capsys, rex, tmp_path):
    bank(capsys, "add", rex)
    make_pipeline(dtype=torch.float32, seed=7).save_pretrained(tmp_path / "other")
    code, _, err = bank(capsys, "verify", "--model", tmp_path / "other")
    assert code == 2 and err.count("\n") == 1 and "rex: concept 'rex' belongs to another base model" in err
    code, _, err = bank(capsys, "add", rex, "--name", "max", "--model", tmp_path / "other")
    assert code == 2 and "belongs to another base model" in err and BankFolder().names() == ["rex"]


@pytest.mark.parametrize(
    "arguments",
    [("show", "../x"), ("remove", ".x"), ("verify", "a/b"), ("add", "{rex}", "--name", "../x")],
    ids=" ".join,
)
def test_a_name_that_is_no_files_is_one_line(capsys, folder, rex, arguments):
    code, out, err = bank(capsys, *(argument.format(rex=rex) for argument in arguments))
    assert code == 2 and out == "" and err.count("\n") == 1 and "is no name in a bank" in err
    assert ("give another with --name" in err) == (arguments[0] == "add") and not folder.exists()


def test_a_preview_that_is_no_picture_is_told_and_nothing_kept(capsys, folder, rex):
    code, _, err = bank(capsys, "add", rex, "--preview", rex)
    assert code == 2 and str(rex) in err and err.count("\n") == 1 and not folder.exists()


def test_a_concept_of_the_bank_is_converted_by_its_name(capsys, folder, rex, tmp_path, monkeypatch):
    bank(capsys, "add", rex)
    code, out, _ = bank(capsys, "convert", "rex", "--to", "kohya-lora", "--out", tmp_path / "out" / "k.safetensors")
    assert code == 0 and "32 matrices become factors of rank 16: relative error" in out
    assert f"{tmp_path / 'out' / '<v1>.safetensors'}: the token <v1>, to be loaded as textual inversion" in out
    assert "not told in this layout: name, class word 'dog', training settings\n" in out
    code, _, err = bank(capsys, "convert", "rox", "--to", "weaver", "--out", tmp_path / "x.safetensors")
    assert code == 2 and f"the bank {folder}: 'rox' is not there; did you mean 'rex'?" in err
    monkeypatch.chdir(tmp_path)
    rex.rename(tmp_path / "rex")  # a file of the same name, which has another word
    Concept.load(tmp_path / "rex")
    replace(Concept.load(tmp_path / "rex"), word="cat").save(tmp_path / "rex")
    for source, word in (("rex", "dog"), ("./rex", "cat")):
        options = ["--to", "weaver", "--out", "again.safetensors", "--replace"]
        assert bank(capsys, "convert", source, *options)[0] == 0
        assert Concept.load(tmp_path / "again.safetensors").word == word


def job(folder, file):
    mapping = {"prompt": "a dog", "concepts": [{"file": file, "mask": {"box": [0, 0, SIDE, SIDE]}}]}
    return job_from_mapping(mapping, folder=folder, source="job.yaml")


def test_a_job_takes_a_concept_of_the_bank_and_its_hash(capsys, folder, rex, tmp_path):
    bank(capsys, "add", rex)
    found = job(tmp_path, "bank:rex")
    assert found.concepts[0].name == "rex" and found.concepts[0].file == (folder / "rex.safetensors").resolve()
    (file,) = read_inputs(found)
    assert (file.field, file.sha256) == ("concepts[0].file", BankFolder().card("rex").sha256)


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("bank:rox", r"concepts\[0\]\.file: the bank .*: 'rox' is not there; did you mean 'rex'\?"),
        (
            "bank:zebra",
            r"concepts\[0\]\.file: the bank .*: 'zebra' is not there; `weaver bank list` shows what there is",
        ),
        ("bank:../rex", r"concepts\[0\]\.file: '\.\./rex' is no name in a bank"),
        ("bank:", r"concepts\[0\]\.file: '' is no name in a bank"),
    ],
)
def test_a_job_that_names_none_of_the_bank_is_told_which_are_like_it(capsys, rex, tmp_path, file, expected):
    bank(capsys, "add", rex)
    with pytest.raises(JobError, match=expected):
        job(tmp_path, file)


def test_a_run_records_the_hash_of_the_banks_file(capsys, pipe, model, rex, tmp_path):
    bank(capsys, "add", rex)
    text = f"model: {model}\nprompt: a dog on the beach\nsteps: 1\ntemplate: {{model: same, steps: 1}}\n"
    text += "concepts: [{file: 'bank:rex', mask: {box: [0, 0, 1, 1]}}]\n"
    (tmp_path / "job.yaml").write_text(text)
    assert main(["run", str(tmp_path / "job.yaml"), "--out", str(tmp_path / "out"), "--cache", "off"]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["inputs"] == {"concepts[0].file": BankFolder().card("rex").sha256}
    again = ["run", str(tmp_path / "out" / "manifest.json"), "--out", str(tmp_path / "again"), "--cache", "off"]
    assert main(again) == 0
    bank(capsys, "add", rex, "--word", "cat", "--replace")
    assert (
        main(again) == 2
        and "rex.safetensors is not what it was when the manifest was written" in capsys.readouterr().err
    )
