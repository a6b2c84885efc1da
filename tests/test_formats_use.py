"""Files of others where they are used: in a job, in the library, and told about on the command line."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace

import pytest
import torch
from conftest import make_concept
from jobs import job_of, write_folder
from safetensors.torch import load_file, save_file

from weaver import ConceptUse, FusionPlan, WeaverError, load_concept, weave
from weaver.cli import main
from weaver.concepts.changes import norm_of
from weaver.concepts.concept import Concept
from weaver.concepts.formats.reading import ConceptReading
from weaver.concepts.formats.unused import UnusedPartsWarning
from weaver.job import JobError
from weaver.job.file import read_job
from weaver.run import run_job

INSIDE, OUTSIDE = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", "time_embedding.linear_1"


def write_lora(path, *, outside: bool = True) -> None:
    """Rank 2 of one projection of cross-attention [8, 16], and with `outside` of the embedding of time [32, 8]."""
    tensors = {f"unet.{INSIDE}.lora_A.weight": torch.ones(2, 16), f"unet.{INSIDE}.lora_B.weight": torch.ones(8, 2)}
    if outside:
        tensors[f"unet.{OUTSIDE}.lora_A.weight"] = torch.ones(2, 8)
        tensors[f"unet.{OUTSIDE}.lora_B.weight"] = torch.ones(32, 2)
    save_file(tensors, path)


@pytest.fixture(scope="module")
def folder(tiny_pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("formats")
    write_folder(tiny_pipe, folder)
    write_lora(folder / "style.safetensors")
    write_lora(folder / "plain.safetensors", outside=False)
    save_file({"<spot>": torch.ones(2, 16)}, folder / "spot.safetensors")
    return folder


def mixed(folder, **of_lora):
    """A LoRA, a textual inversion and a Custom Diffusion concept in one picture."""
    lora = {"file": "style.safetensors", "word": "cat", "token": "sks", "mask": {"box": [0, 0.2, 0.4, 0.8]}}
    spot = {"file": "spot.safetensors", "word": "fox", "mask": {"box": [0.4, 0.2, 0.6, 0.8]}}
    rex = {"file": "rex.safetensors", "mask": {"box": [0.6, 0.2, 1, 0.8]}}
    return job_of(folder, prompt="a cat and a dog and a fox, mountain", concepts=[lora | of_lora, rex, spot])


def test_concepts_of_three_kinds_in_one_picture(folder, tmp_path):
    with pytest.warns(
        UnusedPartsWarning, match=r"concepts\[0\].file: 1 of its changes, time_embedding.linear_1 among them, act"
    ):
        run = run_job(mixed(folder), tmp_path / "out")
    entries = json.loads((tmp_path / "out" / "manifest.json").read_text())["record"]["concepts"]
    assert [entry["prompt"] for entry in entries] == [
        "a sks cat, mountain",
        "a <v2> dog, mountain",
        "a <spot> fox, mountain",
    ]
    assert [entry["token"] for entry in entries] == ["sks", "<v2>", "<spot>"]
    assert run.concepts[0].outside and not run.concepts[2].deltas
    job, manifest = read_job(tmp_path / "out" / "manifest.json")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnusedPartsWarning)
        again = run_job(job, tmp_path / "again", manifest=manifest)
    assert again.result.image.tobytes() == run.result.image.tobytes()


def test_layers_that_the_model_has_not_are_told_before_anything_is_drawn(folder, tiny_pipe, tmp_path, monkeypatch):
    path = "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2"
    tensors = load_file(folder / "plain.safetensors")
    tensors |= {f"unet.{path}.lora_A.weight": torch.ones(2, 99), f"unet.{path}.lora_B.weight": torch.ones(8, 2)}
    save_file(tensors, folder / "wide.safetensors")
    monkeypatch.setattr("weaver.job.choose.template_picture", lambda *a, **k: pytest.fail("sampling began"))
    wide = {"file": "wide.safetensors"}
    with pytest.raises(JobError, match=r"concepts\[0\].file: .*1 of the 1 changes .* do not fit the U-Net, .*net.2"):
        run_job(mixed(folder, **wide), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    concept = ConceptReading.of(folder / "wide.safetensors", word="cat", token="sks").concept(tiny_pipe)
    monkeypatch.setattr("weaver.pipeline.template_picture", lambda *a, **k: pytest.fail("sampling began"))
    with pytest.raises(WeaverError, match=r"1 of the 1 changes that wide makes outside cross-attention do not fit"):
        weave(tiny_pipe, "a cat", [concept], steps=1)


def test_two_concepts_of_one_token_in_one_picture(tiny_pipe):
    """Each has the keys and values that it has alone: files of strangers often call their token alike."""
    first, second = (
        replace(make_concept(tiny_pipe, number, word), token="<new1>") for number, word in ((1, "dog"), (2, "cat"))
    )
    masks = torch.zeros(2, 32, 32)
    masks[0, :, :16] = masks[1, :, 16:] = 1
    options = {"prompt": "a dog and a cat", "height": 32, "width": 32}
    together = FusionPlan.build(tiny_pipe, [first, second], masks, **options)
    assert together.prompts[2:] == ("a <new1> dog", "a <new1> cat")
    for number, concept in enumerate((first, second)):
        use = ConceptUse(concept, prompt=f"a <new1> {concept.word}")
        alone = FusionPlan.build(tiny_pipe, [use], masks[number : number + 1], **options)
        for path, kv in alone.keys_values.items():
            of_both = together.keys_values[path]
            for part in ("keys", "values"):
                found, expected = getattr(of_both, part)[2 + number], getattr(kv, part)[2]
                torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    kv = next(iter(together.keys_values.values()))
    assert (kv.values[2] - kv.values[3]).abs().max() > 0.1


def test_what_is_not_used_can_be_refused(folder, tmp_path):
    with pytest.raises(
        WeaverError, match=r"concepts\[0\].file: 1 of its changes, time_embedding.linear_1 among them, act"
    ) as error:
        run_job(mixed(folder), tmp_path / "out", on_unused="refuse")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
    with pytest.raises(WeaverError, match="on_unused is 'drop', expected one of warn, refuse"):
        run_job(mixed(folder), tmp_path / "out", on_unused="drop")


def test_in_the_library(folder, tiny_pipe):
    with pytest.warns(
        UnusedPartsWarning, match="style.safetensors: 1 of its changes, .*, 67% of it by the squared norm"
    ):
        concept = load_concept(folder / "style.safetensors", tiny_pipe, word="cat")
    assert (concept.name, concept.token, concept.word, concept.base_hash) == ("style", "", "cat", "")
    with pytest.raises(WeaverError, match="style.safetensors"):
        load_concept(folder / "style.safetensors", tiny_pipe, word="cat", on_unused="refuse")
    own = load_concept(folder / "rex.safetensors", tiny_pipe, token="<mine>")
    assert (own.name, own.token, own.word) == ("rex", "<mine>", "dog")


@pytest.mark.parametrize(
    ("file", "options", "message"),
    [
        ("style.safetensors", {}, "a diffusers LoRA does not tell its class word, such as 'dog': name it"),
        ("spot.safetensors", {"word": "fox", "token": "<v9>"}, "no token '<v9>': the file has <spot>"),
        ("tom.safetensors", {"token": "two words"}, "white space in it"),
        ("left.png", {"word": "cat"}, "is neither a safetensors file nor one of `torch.save`"),
        ("none.safetensors", {"word": "cat"}, "there is no such file"),
    ],
)
def test_what_must_be_told(folder, file, options, message):
    with pytest.raises(WeaverError, match=message) as error:
        ConceptReading.of(folder / file, **options)
    assert file in str(error.value) or "concept" in str(error.value)


def test_in_a_job_the_field_is_named(folder, tmp_path):
    job = mixed(folder, word=None)
    spot = replace(job.concepts[2], token="<v9>")
    message = r"concepts\[0\].file: .*style.safetensors: a diffusers LoRA does not tell its class word.*; "
    with pytest.raises(WeaverError, match=message + r"concepts\[2\].file: .*no token '<v9>'"):
        run_job(replace(job, concepts=(*job.concepts[:2], spot)), tmp_path / "out")


def test_norms_are_those_of_what_is_added(folder, tiny_pipe):
    with pytest.warns(UnusedPartsWarning):
        concept = load_concept(folder / "style.safetensors", tiny_pipe, word="cat")
    assert norm_of(concept.deltas.values()) == pytest.approx(inside := 2 * math.sqrt(8 * 16))
    assert norm_of(concept.outside.values()) == pytest.approx(outside := 2 * math.sqrt(32 * 8))
    everything = [*concept.deltas.values(), *concept.outside.values()]
    assert norm_of(everything) == pytest.approx(math.hypot(inside, outside))


def test_inspect(folder, capsys):
    assert main(["inspect", str(folder / "style.safetensors")]) == 0
    told = capsys.readouterr().out
    assert "style.safetensors: diffusers LoRA, " in told
    assert "keys and values of cross-attention: 1 weights, rank 2, 33% of the squared norm\n" in told
    assert "time and other embeddings: 1 weights, rank 2, 67% of the squared norm, not used" in told
    assert main(["inspect", "--json", str(folder / "rex.safetensors")]) == 0
    summary = json.loads(capsys.readouterr().out)
    concept = Concept.load(folder / "rex.safetensors")
    assert summary["tokens"] == {"<v2>": 1} and summary["base"] == concept.base_hash
    assert [(part["changes"], part["ranks"], part["share"]) for part in summary["parts"]] == [(32, [], 1.0)]
    assert main(["inspect", str(folder / "left.png")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_what_a_file_says_can_not_steer_the_terminal(folder, tmp_path, capsys):
    concept = Concept.load(folder / "rex.safetensors")
    odd = {"note": "evil\x1b[2J\nweaver: all fine", "long": "9" * 200_000}
    replace(concept, settings=dict(concept.settings) | odd).save(tmp_path / "odd.safetensors")
    assert main(["inspect", str(tmp_path / "odd.safetensors")]) == 0
    told = capsys.readouterr().out
    assert "\x1b" not in told and "  note: evil\\x1b[2J\\nweaver: all fine\n" in told and len(told) < 3000
