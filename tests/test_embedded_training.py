"""The training command of the embedded model."""

import inspect
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from weaver.embedded import MODEL_DIR
from weaver.embedded.training import __main__ as command
from weaver.embedded.training import card, derive, loop, segmenter
from weaver.embedded.training.bank import Bank
from weaver.embedded.training.diffusion import encode_bank
from weaver.errors import WeaverError


def test_processes_of_a_training_start_no_others():
    """A child that started children of its own would do so without end."""
    given = ["diffusion", "--model", "here", "--batch", "7", "--compile", "--processes", "3", "--scenes", "500"]
    args = command._parser().parse_args(given)
    line = command._command("diffusion", args)
    assert line[line.index("--nproc-per-node") + 1] == "3"
    child = command._parser().parse_args(line[line.index("weaver.embedded.training") + 1 :])
    assert child.processes == 1
    assert {**vars(child), "processes": 3} == vars(args) and child.model == Path("here") and child.compile


@pytest.mark.parametrize("bfloat16", [True, False], ids=["bfloat16", "float32-only"])
def test_muon_is_used_where_bfloat16_is(monkeypatch, bfloat16):
    """Muon works in bfloat16, which a CPU without it takes 15 times as long for."""
    used, muon = [], torch.optim.Muon
    monkeypatch.setattr(loop, "has_bfloat16", lambda device: bfloat16)
    monkeypatch.setattr(torch.optim, "Muon", lambda *args, **kwargs: used.append(1) or muon(*args, **kwargs))
    assert torch.is_autocast_enabled("cpu") is False
    with loop.autocast(torch.device("cpu")):
        assert torch.is_autocast_enabled("cpu") is bfloat16
    matrix, before, bias = torch.nn.Parameter(torch.eye(4)), torch.eye(4), torch.nn.Parameter(torch.ones(4))
    settings = loop.LoopSettings(minutes=1e-3, learning_rate=0.1, batch=1)

    def loss_of(step: int) -> torch.Tensor:
        return (matrix + bias).square().sum()

    steps = loop.train([matrix, bias], loss_of, settings, save=lambda: None, matrices=[matrix])
    assert bool(used) is bfloat16 and steps >= 1
    assert not torch.equal(matrix.detach(), before)


def test_a_training_writes_down_all_it_follows_from(tmp_path):
    weight, curve = torch.nn.Parameter(torch.ones(3)), tmp_path / "curve.jsonl"
    settings = loop.LoopSettings(minutes=1e-3, learning_rate=0.1, batch=2)
    given = {"seed": 3, "bank": {"scenes": 500, "seed": 3}}
    loop.train([weight], lambda step: weight.sum(), settings, save=lambda: None, curve=curve, arguments=given)
    told = json.loads(curve.read_text().splitlines()[0])["settings"]
    assert asdict(settings).items() <= told.items() and told["arguments"] == given
    assert (told["optimiser"], told["processes"], told["device"]) == ("adamw", 1, "cpu")
    assert len(told["code"]["weaver/embedded"]) == 64 and told["code"]["torch"] == torch.__version__


def test_the_card_says_of_which_trainings_not_all_was_written_down(tmp_path):
    curve = tmp_path / "curve_unet.jsonl"
    old = {"minutes": 16, "learning_rate": 1e-3, "batch": 20, "processes": 2, "device": "cpu"}
    rows = [{"settings": old}, {"samples": 40, "held_out": 0.5}]
    rows += [{"settings": old | {"code": {}, "arguments": {}}}, {"samples": 80, "held_out": 0.4}]
    curve.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [line.split(" | ")[-1] for line in card._trainings(curve, "held_out")] == ["these |", "all |"]


def test_the_card_tells_how_each_concept_was_learned_from_its_file():
    text = card.CARD_FILE.read_text(encoding="utf-8")
    assert "token and LoRA of rank 8 of all layers: 280 steps of muon at 0.005" in card._learned("pug")
    assert "token and whole matrices of keys and values: 450 steps" in card._learned("autumn-forest")
    for name in card.CONCEPTS:
        assert any(f"`{name}`" in line and card._learned(name) in line for line in text.splitlines()), name


def test_no_card_is_written_of_other_gates(tmp_path, monkeypatch):
    assert len(derive._recorded_gates()) == len(json.loads(derive.GATES_FILE.read_text()))
    monkeypatch.setattr(derive, "_made", lambda file, part: {"model": "another"})
    with pytest.raises(WeaverError, match="gates.json was not measured with this model: run the stage gates"):
        derive._recorded_gates()


def test_the_segmenter_is_gated_on_scenes_that_its_training_did_not_watch():
    assert inspect.signature(segmenter.held_out_scenes).parameters["seed"].default == segmenter.GATE_SEED
    watched = inspect.getclosurevars(segmenter.train_segmenter).globals
    assert watched["_WATCHED_SEED"] != segmenter.GATE_SEED and "GATE_SEED" not in watched


@pytest.mark.parametrize(
    ("stage", "left"), [("diffusion", {"vae", "curve_vae.jsonl"}), ("autoencoder", set()), ("all", set())]
)
def test_from_scratch_removes_what_the_stage_makes(tmp_path, monkeypatch, stage, left):
    for folder in ("vae", "unet", "text_encoder"):
        (tmp_path / folder).mkdir()
    for file in ("curve_vae.jsonl", "curve_unet.jsonl", "model_index.json"):
        (tmp_path / file).write_text("")
    ran = []
    monkeypatch.setattr(command, "run", lambda stage, args: ran.append(stage))
    monkeypatch.setattr(command, "MODEL_DIR", tmp_path)
    command.main([stage, "--model", str(tmp_path), "--processes", "1", "--from-scratch"])
    assert ran[-1] == ("derive" if stage == "all" else stage)
    assert {path.name for path in tmp_path.iterdir()} == left


@pytest.mark.parametrize("stage", ["bank", "gates", "derive"])
def test_from_scratch_is_refused_where_no_model_is_trained(capsys, monkeypatch, stage):
    monkeypatch.setattr(command, "_forget", lambda *args, **options: pytest.fail("something was removed"))
    with pytest.raises(SystemExit):
        command.main([stage, "--from-scratch"])
    assert f"--from-scratch: {stage} does not train the model" in capsys.readouterr().err


def test_latents_are_those_of_the_autoencoder_and_one_set_is_kept(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), dtype=np.uint8)
    bank = Bank(pictures, np.zeros((2, 64, 64), np.uint8), ["a cat", "a dog"], [["cat"], ["dog"]], {})
    first = np.array(encode_bank(bank, MODEL_DIR / "vae", tmp_path))
    other = Path(shutil.copytree(MODEL_DIR / "vae", tmp_path / "vae"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"scaling_factor": 2 * config["scaling_factor"]}))
    np.testing.assert_allclose(encode_bank(bank, other, tmp_path), 2 * first, rtol=2e-3)
    (kept,) = tmp_path.glob("latents-*")
    before = kept.stat().st_mtime_ns
    encode_bank(bank, other, tmp_path)
    assert kept.stat().st_mtime_ns == before
