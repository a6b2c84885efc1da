"""`weaver train`, as a user types it."""

from __future__ import annotations

import shutil
from dataclasses import fields
from functools import partial

import pytest
import torch
from jobs import picture
from PIL import Image

from weaver.cli import _parser, main
from weaver.concepts import train as training
from weaver.concepts.checkpoints import Checkpoint
from weaver.concepts.concept import Concept
from weaver.concepts.settings import TrainSettings
from weaver.concepts.validation import Validation
from weaver.embedded import concept_images, load_pipeline
from weaver.embedded.prior import prior_scenes
from weaver.models import load_model
from weaver_kernels import LowRank


@pytest.fixture(scope="module")
def folder(tiny_pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    tiny_pipe.save_pretrained(folder / "model")
    for number, name in enumerate(("pictures", "class")):
        (folder / name).mkdir()
        for seed in range(2):
            picture(2 * number + seed).save(folder / name / f"{seed}.png")
    return folder


def train(folder, *options, more=()):
    pictures = [str(folder / "pictures"), *map(str, more)]
    few = ["--steps", "2", "--prior-images", "2", "--prior-steps", "1"]
    return main(["train", *pictures, "--word", "cat", "--model", str(folder / "model"), *few, *options])


def test_a_concept_from_a_folder_of_pictures(folder, tmp_path, capsys):
    out = tmp_path / "new" / "tom.safetensors"
    assert train(folder, "--token", "<tom>", "--out", str(out), "--flip", "--views", "1") == 0
    assert f"{out}: <tom> cat, learned from 2 pictures in " in capsys.readouterr().out
    concept = Concept.load(out)
    assert (concept.name, concept.token, concept.word) == ("tom", "<tom>", "cat")
    told = {key: concept.settings[key] for key in ("steps", "flip", "views", "rank", "prior")}
    assert told == {"steps": 2, "flip": True, "views": 1, "rank": 0, "prior": "made by the base model"}
    assert [path.name for path in out.parent.iterdir()] == ["tom.safetensors"]


def test_every_setting_is_explained_with_its_defaults():
    train_parser = _parser()._subparsers._group_actions[0].choices["train"]
    told = {action.dest: action.help for action in train_parser._actions}
    usual, embedded, whole = TrainSettings(), TrainSettings.embedded(), TrainSettings.embedded(layers="all")
    said = {  # where it is not the default of `TrainSettings`
        "rank": "16; embedded 16",
        "learning_rate": "1e-05, a LoRA's 0.0001",
        "token_learning_rate": "as --learning-rate",
    }
    for name in (field.name for field in fields(TrainSettings)):
        one, other = getattr(usual, name), getattr(embedded, name)
        differs = one != other and name not in ("prior_images", "prior_steps", "prior_guidance")  # it makes none
        expected = said.get(name, str(one)) + (f"; embedded {other}" if differs else "")
        if name in ("rank", "steps", "learning_rate"):
            expected += f", {getattr(whole, name)} with --layers all"
        assert told[name].endswith(f" ({expected})") or (one is other is False and "(" not in told[name]), name
        assert 20 < len(told[name]) < 110, name
    assert all(told.values())


def test_validation_pictures_and_a_log_beside_the_concept(folder, tmp_path, monkeypatch):
    assert Validation(["a <v1> cat"], tmp_path).steps == 25
    monkeypatch.setattr("weaver.concepts.validation.Validation", partial(Validation, steps=2))
    out, log = tmp_path / "tom.safetensors", tmp_path / "log"
    watch = ["--validate", "a <v1> cat", "--validate", "a <v1> cat, mountain", "--validate-every", "1"]
    assert train(folder, "--out", str(out), *watch, "--log-dir", str(log), "--accumulate", "2", "--at-once", "1") == 0
    assert [file.name for file in sorted((tmp_path / "tom.validation").iterdir())] == [
        "step-000001.png",
        "step-000002.png",
    ]
    assert Image.open(tmp_path / "tom.validation" / "step-000002.png").size == (4 * 32, 2 * 32)
    assert len(list(log.iterdir())) == 1 and Concept.load(out).settings["accumulate"] == 2


def test_a_lora_with_class_pictures_of_ones_own(folder, tmp_path):
    out = tmp_path / "tom.safetensors"
    assert train(folder, "--out", str(out), "--method", "lora", "--class-images", str(folder / "class")) == 0
    concept = Concept.load(out)
    assert {len(delta.down) for delta in concept.deltas.values() if isinstance(delta, LowRank)} == {16}
    assert concept.settings["prior"] == "given" and concept.base_hash
    assert train(folder, "--out", str(out), "--method", "lora", "--rank", "3", "--prior-batch", "0", "--replace") == 0
    assert {len(delta.down) for delta in Concept.load(out).deltas.values()} == {3}


def test_class_pictures_that_are_the_concepts_own_are_told(folder, tmp_path, capsys):
    others = shutil.copytree(folder / "class", tmp_path / "class")
    shutil.copy(folder / "pictures" / "1.png", others / "2.png")
    assert train(folder, "--out", str(tmp_path / "tom.safetensors"), "--class-images", str(others)) == 2
    told = capsys.readouterr().err
    assert f"weaver: --class-images: {others / '2.png'} is a picture of the concept itself: " in told


def test_folders_and_pictures_together_and_what_of_them_is_not_used(folder, tmp_path, capsys):
    more = tmp_path / "more"
    more.mkdir()
    picture(5).save(more / "5.png")
    (more / "holiday.heic").write_bytes(b"no picture that is read")
    for name in ("holiday.txt", "5.txt", "6.txt", "6.mask.png"):  # of which the third and fourth have no picture
        (more / name).write_text("a <v1> cat")
    out = tmp_path / "tom.safetensors"
    sources = more, folder / "class" / "0.png"
    assert train(folder, "--out", str(out), "--prior-batch", "0", more=sources) == 0
    assert Concept.load(out).settings["pictures"] == 4
    told = capsys.readouterr().err
    assert (
        f"weaver: {more}: not used are holiday.heic: save as PNG or JPEG; 6.mask.png, 6.txt: beside no picture of that "
        "name\n"
    ) in told


def test_captions_beside_class_pictures_are_learned_from(folder, tmp_path):
    """Other captions are another training: in the same steps another concept comes of them."""
    others, found = shutil.copytree(folder / "class", tmp_path / "class"), []
    for caption in (None, "a dog, mountain background", "a cat"):
        for number in range(2 if caption else 0):
            (others / f"{number}.txt").write_text(caption)
        out = tmp_path / f"{len(found)}.safetensors"
        assert train(folder, "--out", str(out), "--class-images", str(others)) == 0
        found.append(Concept.load(out).deltas)
    same = [[torch.equal(x, found[0][key]) for key, x in deltas.items()] for deltas in found]
    assert all(same[2]) and not all(same[1])


@pytest.mark.parametrize("precision", [None, "float32", "float16", "bfloat16"])
def test_a_concept_learned_in_any_precision_is_of_the_same_base(folder, tmp_path, monkeypatch, precision):
    """Jobs load a model in float32 or float16, and must know it again as the one that the concept belongs to."""
    seen, learn = [], training.train_concept

    def seeing(pipe, *given, **options):
        seen.extend(getattr(pipe, part).dtype for part in ("unet", "vae", "text_encoder"))
        return learn(pipe, *given, **options)

    monkeypatch.setattr(training, "train_concept", seeing)
    out = tmp_path / "tom.safetensors"
    asked = ["--precision", precision] if precision else []
    assert train(folder, "--out", str(out), "--device", "cpu", *asked) == 0
    assert seen == 3 * [getattr(torch, precision or "float32")]
    concept = Concept.load(out)
    concept.check_base(load_model(str(folder / "model"), device="cpu"))
    assert all(delta.isfinite().all() for delta in concept.deltas.values())
    assert any(delta.any() for delta in concept.deltas.values())


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_the_embedded_model_learns_in_half_precision(tmp_path, precision, monkeypatch):
    monkeypatch.setattr("weaver.embedded.prior.prior_scenes", partial(prior_scenes, 4))  # it reads two
    out = tmp_path / "pug.safetensors"
    given = ["train", str(concept_images("pug")), "--word", "dog", "--token", "<pug>", "--out", str(out)]
    assert main([*given, "--steps", "2", "--precision", precision]) == 0
    concept = Concept.load(out)
    concept.check_base(load_pipeline())
    assert concept.settings["woven"] == 64 and any(delta.any() for delta in concept.deltas.values())


def test_the_embedded_models_own_defaults(tmp_path):
    out = tmp_path / "pug.safetensors"
    given = ["train", str(concept_images("pug")), "--word", "dog", "--token", "<pug>", "--out", str(out)]
    assert main([*given, "--steps", "1", "--woven-batch", "1"]) == 0
    settings = Concept.load(out).settings
    assert settings["optimiser"] == "muon" and settings["woven"] == 64 and settings["steps"] == 1
    assert settings["prior"] == "given"


def test_how_class_pictures_are_made_means_nothing_to_the_embedded_model(tmp_path, capsys):
    given = ["train", str(concept_images("pug")), "--word", "dog", "--token", "<pug>"]
    assert main([*given, "--prior-steps", "2", "--out", str(tmp_path / "pug.safetensors")]) == 2
    assert "--prior-steps: the embedded model makes no class pictures" in capsys.readouterr().err


def test_a_token_that_is_a_word_of_others_is_told_where_they_are_used(tmp_path, capsys):
    out = tmp_path / "pug.safetensors"
    given = ["train", str(concept_images("pug")), "--word", "dog", "--token", "cat", "--steps", "1", "--out", str(out)]
    given += ["--woven-batch", "0", "--batch", "1"]
    assert main(given) == 2
    assert "a caption of others; take one that is no word: '<v1>'" in capsys.readouterr().err
    assert main([*given, "--prior-batch", "0"]) == 0 and Concept.load(out).token == "cat"


def test_a_background_under_the_papers_token(tmp_path):
    out = tmp_path / "forest.safetensors"
    given = ["train", str(concept_images("autumn-forest")), "--word", "forest background", "--token", "[bg]"]
    assert main([*given, "--steps", "1", "--out", str(out)]) == 0
    concept = Concept.load(out)
    assert (concept.token, concept.word) == ("[bg]", "forest background")
    assert all("[bg] forest background" in caption for caption in concept.settings["captions"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank", "4"], "--rank: is 4 with --method custom-diffusion; add --method lora"),
        (["--method", "lora", "--rank", "0"], "--rank: is 0 with --method lora"),
        (
            ["--validate", "a cat", "--model", "nowhere"],
            "--validate: 'a cat' lacks the token '<v1>': put it before 'cat'",
        ),
        (
            ["--token", "a b", "--out", "a.safetensors", "--model", "nowhere"],
            "--token: token 'a b' is empty or has white",
        ),
        (["--token", "cat", "--model", "nowhere"], "--token: token 'cat' stands in the class word 'cat'; take one"),
        (["--validate", "a <v1> cat", "--validate-every", "0"], "validation: every is 0, expected 1 or more"),
        (["--token", "<../esc>"], "--token: '<../esc>' makes no name of a file; tell the concept's by --out"),
        (["--out", "."], "--out: . must end in .safetensors"),
        (["--at-once", "0"], "--at-once: is 0, expected 1 or more"),
        (["--word", " ", "--model", "nowhere"], "--word: ' ' is empty; write what it is, such as dog"),
        (["--checkpoint-every", "0"], "--checkpoint-every: is 0, expected 1 or more"),
        (["--vectors", "90"], "stands for 90 vectors, and the prompt 'a <v1> cat' has room for 13 of them"),
        (["--steps", "0"], "steps is 0, expected a whole number, 1 or more"),
        (["--out", "tom.bin"], "--out: tom.bin must end in .safetensors"),
        (["--class-images", "nowhere"], "nowhere: no such folder of pictures"),
        (["--model", "nowhere"], "'nowhere' can't be loaded"),
    ],
)
def test_mistakes_in_one_line(folder, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert train(folder, "--offline", *options) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_class_pictures_that_no_step_would_show_are_told(folder, capsys):
    assert train(folder, "--class-images", str(folder / "class"), "--prior-batch", "0") == 2
    assert "--class-images: none of them is in a step; leave out --prior-batch 0" in capsys.readouterr().err


def test_a_model_without_a_known_unet_is_told_before_its_weights_are_read(folder, tmp_path, capsys):
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline", "_diffusers_version": "0.42.1"}')
    assert train(folder, "--model", str(tmp_path)) == 2
    assert "is a FluxPipeline; concepts are learned in StableDiffusionPipeline and" in capsys.readouterr().err


def test_a_concept_that_is_there_is_not_written_over_unasked(folder, tmp_path, capsys):
    out = tmp_path / "tom.safetensors"
    out.write_bytes(b"mine")
    assert train(folder, "--out", str(out)) == 2
    assert "tom.safetensors is there already; name another file, or add --replace" in capsys.readouterr().err
    assert out.read_bytes() == b"mine"
    assert train(folder, "--out", str(out), "--replace") == 0 and Concept.load(out).word == "cat"


def test_what_was_learned_is_not_lost_where_it_cant_be_saved(folder, tmp_path, monkeypatch):
    """A full disk: the checkpoint of the last step is still there."""

    def full(*args):
        raise OSError("No space left on device")

    assert _parser().parse_args(["train", "a.png", "--word", "cat"]).checkpoint_every == 100
    out = tmp_path / "tom.safetensors"
    with monkeypatch.context() as patched:
        patched.setattr(Concept, "save", full)
        assert train(folder, "--checkpoint-every", "2", "--out", str(out), "--prior-batch", "0", "--batch", "1") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["tom.checkpoint"]
    assert train(folder, "--checkpoint-every", "2", "--out", str(out), "--prior-batch", "0", "--batch", "1") == 0
    assert [file.name for file in tmp_path.iterdir()] == ["tom.safetensors"]


def test_the_embedded_models_lora_of_all_layers_has_settings_of_its_own(tmp_path):
    out = tmp_path / "tom.safetensors"
    options = ["--word", "cat", "--out", str(out), "--method", "lora", "--layers", "all", "--steps", "1"]
    assert main(["train", str(concept_images("tuxedo-cat")), *options]) == 0
    settings = Concept.load(out).settings
    assert (settings["rank"], settings["learning_rate"]) == (8, 5e-3)


def test_checkpoints_as_often_as_asked(folder, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(Checkpoint, "after", lambda checkpoint, step: kept.append(checkpoint.every))
    assert train(folder, "--out", str(tmp_path / "tom.safetensors"), "--checkpoint-every", "1") == 0
    assert kept and set(kept) == {1}
