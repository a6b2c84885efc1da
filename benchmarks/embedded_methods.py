"""Which way of learning a concept holds it best? ``python -m benchmarks.embedded_methods``

Learns two animals of the embedded model in several ways, each in a process of its own on one thread, and fuses them
before a trained background over ten seeds: every way by itself, and mixed, the first animal by Custom Diffusion and the
second as a LoRA. Prints what each way takes for a concept, seconds of a processor and bytes, and how similar the
animals are inside their masks to their own pictures (`own`), to their base class and to the nearest other concept. In
so many seeds every concept `shows`, both animals and the background: `own` is the largest of the three.

The textual inversion is the token's vectors of the first way alone, as diffusers writes them.
Results go to ``outputs/methods``: one folder a run, ``embedded_methods.json`` and ``methods.png``, a row a way;
``--record`` keeps them, and ``docs/methods.png``, and writes the table into ``docs/concepts.md``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import mean

import torch
from PIL import Image
from safetensors.torch import save_file
from tqdm.auto import tqdm

from benchmarks.records import RESULTS, made_with, picture_for_docs, write_record
from benchmarks.tables import DOCS, into_page, table
from weaver import Concept, TrainSettings, train_concept
from weaver.commands.seeds import with_seed
from weaver.concepts.bank import prior_and_scenes
from weaver.concepts.images import load_images
from weaver.demo import demo_job, with_shipped_concepts
from weaver.embedded import CONCEPTS, load_pipeline
from weaver.embedded.catalog import concept_images
from weaver.embedded.identity import score, shows
from weaver.models import quiet_libraries
from weaver.pictures import grid
from weaver.run import run_job
from weaver.version import __version__

PAGE = DOCS / "concepts.md"
MARKS = (
    "<!-- ways to learn: written by python -m benchmarks.embedded_methods --record -->",
    "<!-- ways to learn end -->",
)
ANIMALS, GROUND = ("tuxedo-cat", "blue-panda"), "autumn-forest"
_ADAMW = {"optimiser": "adamw", "learning_rate": 2e-3, "steps": 350, "woven_batch": 3, "prior_batch": 2}


@dataclass(frozen=True)
class Method:
    """A way of learning: its name, and what its settings change of the embedded model's."""

    name: str
    changes: dict = field(default_factory=dict)


METHODS = (
    Method("Custom Diffusion"),
    Method("Custom Diffusion by AdamW", _ADAMW),
    Method("LoRA of rank 16", {"rank": 16}),
    Method("LoRA of rank 4", {"rank": 4}),
    Method("LoRA of all layers", {"layers": "all"}),
)
TOKEN_ONLY, MIXED = "textual inversion", "Custom Diffusion and a LoRA"


def learn(name: str, changes: dict, file: Path) -> float:
    """Learn one concept into `file`, on one thread; seconds of the processor, the model's loading left out."""
    torch.set_num_threads(1)
    quiet_libraries()
    pipe, card, settings = load_pipeline(), CONCEPTS[name], TrainSettings.embedded(**changes)
    began = time.process_time()
    pictures = load_images(concept_images(name), card.token, card.word)
    prior, woven = prior_and_scenes(pipe, pictures, card.token, card.word, settings)
    named = {"token": card.token, "word": card.word, "name": name}
    concept = train_concept(pipe, pictures, prior=prior, woven=woven, settings=settings, progress=False, **named)
    seconds = time.process_time() - began
    concept.save(file)
    return seconds


def save_token(concept: Path, file: Path) -> None:
    """The token's vectors alone, as diffusers' textual inversion example saves them."""
    read = Concept.load(concept)
    save_file({read.token: read.embeddings["text_encoder"].float()}, file)


def fuse(files: dict[str, Path], folder: Path, seeds: int) -> tuple[list[dict], list[Image.Image]]:
    """Each seed's similarities of every concept, and its picture."""
    rows, pictures = [], []
    shipped = with_shipped_concepts(demo_job(",".join(ANIMALS), GROUND))
    named = {name: {"token": CONCEPTS[name].token, "word": CONCEPTS[name].word} for name in files}
    concepts = tuple(replace(spec, file=files[spec.name], **named[spec.name]) for spec in shipped.concepts)
    for seed in range(seeds):
        job = with_seed(replace(shipped, concepts=concepts), seed)
        run = run_job(job, folder / f"seed{seed}", source="methods")
        places = zip((*ANIMALS, GROUND), run.result.masks, strict=True)
        rows.append({name: score(run.result.image, mask.numpy(), name) for name, mask in places})
        pictures.append(run.result.image)
    return rows, pictures


def figures(name: str, rows: list[dict], files: dict[str, Path], seconds: float | None) -> dict:
    """One row of the table."""
    every = [row[name] for row in rows for name in ANIMALS]
    shown = sum(all(map(shows, row.values())) for row in rows)
    told = {key: round(mean(scores[key] for scores in every), 3) for key in ("own", "base", "others")}
    size = round(mean(file.stat().st_size for file in files.values()))
    return {
        "method": name,
        "seconds": None if seconds is None else round(seconds),
        "bytes": size,
        **told,
        "shows": f"{shown} of {len(rows)}",
    }


def markdown(rows: Sequence[Mapping]) -> str:
    """The rows as a table for the page on concepts."""
    head = ["learned as", "own", "base class", "nearest other", "every concept shows", "kB", "seconds"]
    lines = []
    for row in rows:
        seconds = "" if row["seconds"] is None else row["seconds"]
        similar = [f"{row[key] + 0.0:.2f}" for key in ("own", "base", "others")]
        lines.append([row["method"], *similar, row["shows"], f"{row['bytes'] / 1000:.3g}", seconds])
    return table(head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--processes", type=int, default=2, help="concepts that are learned at once (2)")
    parser.add_argument("--out", type=Path, default=Path("outputs/methods"))
    parser.add_argument("--record", action="store_true", help="keep the figures in benchmarks/results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    quiet_libraries()
    folder = args.out / "concepts"
    folder.mkdir(parents=True, exist_ok=True)
    ways = {method.name: {name: _file(folder, method.name, name) for name in ANIMALS} for method in METHODS}
    tasks = [(name, m.changes, ways[m.name][name]) for m in METHODS for name in ANIMALS]
    with get_context("spawn").Pool(args.processes, maxtasksperchild=1) as pool:
        took = pool.starmap(learn, tqdm(tasks, desc="learning", disable=None), chunksize=1)
    seconds = {m.name: mean(took[i * len(ANIMALS) : (i + 1) * len(ANIMALS)]) for i, m in enumerate(METHODS)}
    full, lora = ways["Custom Diffusion"], ways["LoRA of rank 16"]
    ways[MIXED] = {ANIMALS[0]: full[ANIMALS[0]], ANIMALS[1]: lora[ANIMALS[1]]}
    ways[TOKEN_ONLY] = {name: _file(folder, TOKEN_ONLY, name) for name in ANIMALS}
    for name in ANIMALS:
        save_token(full[name], ways[TOKEN_ONLY][name])
    found, sheet = [], []
    for name, files in ways.items():
        rows, pictures = fuse(files, args.out / name.replace(" ", "-").lower(), args.seeds)
        found.append(figures(name, rows, files, seconds.get(name)))
        sheet.append(pictures)
        print("  ".join(f"{key} {value}" for key, value in found[-1].items()), flush=True)
    told = {**made_with([GROUND]), "animals": ANIMALS, "seeds": args.seeds}
    told |= {"versions": {"concept-weaver": __version__, "torch": torch.__version__}, "rows": found}
    whole = grid(sheet, 160)
    whole.save(args.out / "methods.png")
    if args.record:
        told |= picture_for_docs("methods.png", whole, 160)
        into_page(PAGE, MARKS, markdown(found))
    for place in [args.out] + [RESULTS] * args.record:
        write_record(place, "embedded_methods", told)


def _file(folder: Path, method: str, name: str) -> Path:
    return folder / f"{method.replace(' ', '-').lower()}-{name}.safetensors"


if __name__ == "__main__":
    main()
