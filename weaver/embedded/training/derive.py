"""What ships beside the trained model and follows from it, rebuilt by one command: ``... training derive``.

Figures, tables and pictures outside of the package follow from these again: ``python -m benchmarks.rederive``.
Helpers, concept files and figures are worth nothing with another model, so ``derived.json`` records for each file its
own hash, the part of the model it was made with and that part's hash, and a test compares them. The helpers learn from
pictures through the autoencoder alone: while that stays, ``derive`` keeps them, and their own stages train them anew.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import AutoencoderTiny

from weaver.concepts.images import load_images
from weaver.concepts.train import TrainSettings, train_concept
from weaver.embedded.catalog import CONCEPTS, concept_images, concept_path, concept_scenes
from weaver.embedded.identity import IDENTITY_FILE
from weaver.embedded.model import MODEL_DIR, load_pipeline, model_hash
from weaver.embedded.prior import prior_scenes
from weaver.embedded.segmenter import SEGMENTER_FILE, load_segmenter
from weaver.embedded.training.bank import load_bank, make_bank
from weaver.embedded.training.card import CARD_FILE, CURVE_FILE, write_card
from weaver.embedded.training.gates import Gate, measure_gates, sample_sheet
from weaver.embedded.training.identity import measure_identity, train_identity
from weaver.embedded.training.segmenter import train_segmenter
from weaver.embedded.woven import woven_scenes
from weaver.errors import WeaverError

__all__ = ["DERIVED_FILE", "run"]

_ROOT = Path(__file__).parent.parent
DERIVED_FILE = _ROOT / "derived.json"
GATES_FILE = _ROOT / "gates.json"
SHEET_FILE = _ROOT / "samples.png"
_HELPER_SCENES = 20_000


def draw_concept_pictures() -> None:
    """Draw the pictures of every shipped concept, each with its caption in a text file beside it."""
    for name, card in CONCEPTS.items():
        folder = concept_images(name)
        folder.mkdir(parents=True, exist_ok=True)
        for index, scene in enumerate(concept_scenes(name)):
            caption = scene.caption.replace(card.word, "{token} {word}", 1)
            scene.image.save(folder / f"{index}.png", optimize=True)
            (folder / f"{index}.txt").write_text(caption + "\n", encoding="utf-8")


def _train_one_concept(name: str) -> None:
    torch.set_num_threads(1)
    card = CONCEPTS[name]
    pictures = load_images(concept_images(name), card.token, card.word)
    concept = train_concept(
        load_pipeline(),
        pictures,
        token=card.token,
        word=card.word,
        name=name,
        prior=prior_scenes(),
        woven=woven_scenes(pictures, card.token, card.word),
        settings=TrainSettings.embedded(**card.training),
    )
    concept.save(concept_path(name))


def train_concepts() -> None:
    """Train the file of every shipped concept from its pictures, as the demonstration does."""
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        pool.map(_train_one_concept, CONCEPTS, chunksize=1)


def _name(file: Path) -> str:
    return file.relative_to(_ROOT).as_posix()


def _made(file: Path, part: str) -> dict[str, str]:
    """What ``derived.json`` says of a file made with a part of the model ("." for all of it)."""
    return {
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "part": part,
        "model": model_hash((MODEL_DIR / part).resolve()),
    }


def _records() -> dict[str, dict[str, str]]:
    return json.loads(DERIVED_FILE.read_text(encoding="utf-8")) if DERIVED_FILE.exists() else {}


def _record(files: Iterable[Path], part: str = ".") -> None:
    """Note in ``derived.json`` which part of the model the files were made with."""
    records = _records()
    for file in files:
        file.chmod(0o644)  # safetensors leaves files that only their owner can read
        records[_name(file)] = _made(file, part)
    DERIVED_FILE.write_text(json.dumps(dict(sorted(records.items())), indent=2) + "\n", encoding="utf-8")


def _to_make(stage: str, wanted: str, file: Path) -> bool:
    """Whether a helper is to be trained: asked for by name, or not there as this autoencoder made it."""
    kept = file.exists() and _records().get(_name(file)) == _made(file, "vae")
    return wanted == stage or (wanted == "derive" and not kept)


def _recorded_gates() -> list[Gate]:
    """The gates of `GATES_FILE`; `WeaverError` where they are another model's, or were changed."""
    if _records().get(_name(GATES_FILE)) != _made(GATES_FILE, "."):
        raise WeaverError(f"{GATES_FILE.name} was not measured with this model: run the stage gates")
    return [Gate(**row) for row in json.loads(GATES_FILE.read_text(encoding="utf-8"))]


def run(stage: str, work: Path, helper_minutes: float = 10.0) -> None:
    """Run one stage on the package's own model, or all of them for ``derive``.

    work : scratch folder; helper_minutes : budget of the segmenter's training, of which the identity classifier's takes
    two fifths
    """
    if _to_make("segmenter", stage, SEGMENTER_FILE):
        vae = AutoencoderTiny.from_pretrained(MODEL_DIR / "vae").float()
        bank = make_bank(work / "bank_helpers", _HELPER_SCENES, for_helpers=True)
        train_segmenter(load_bank(bank), vae, SEGMENTER_FILE, helper_minutes)
        _record([SEGMENTER_FILE], "vae")
    if _to_make("identity", stage, IDENTITY_FILE):
        train_identity(MODEL_DIR / "vae", IDENTITY_FILE, 0.4 * helper_minutes)
        _record([IDENTITY_FILE], "vae")
    if stage in ("concepts", "derive"):
        draw_concept_pictures()
        train_concepts()
        _record(map(concept_path, CONCEPTS))
    if stage in ("gates", "derive"):
        pipe = load_pipeline()
        segmenter = load_segmenter()
        gates = measure_gates(pipe, segmenter, measure_identity())
        for gate in gates:
            print(
                f"{'pass' if gate.passed else 'FAIL'}  {gate.name}: {gate.value:.3f}{gate.unit} (at least {gate.least})"
            )
        rows = [{"name": g.name, "value": round(g.value, 4), "least": g.least, "unit": g.unit} for g in gates]
        GATES_FILE.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        sample_sheet(pipe).save(SHEET_FILE, optimize=True)
        write_card(gates, segmenter)
        _record([GATES_FILE, SHEET_FILE, CARD_FILE, CURVE_FILE])
    if stage == "card":
        write_card(_recorded_gates(), load_segmenter())
        _record([CARD_FILE, CURVE_FILE])
