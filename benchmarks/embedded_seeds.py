"""Does every concept show, for any pair, in either order, over ten seeds? ``python benchmarks/embedded_seeds.py``

Runs ``weaver demo --quick`` for seeds 0 to 9, each with another ordered pair of the animals that ship and one of the
backgrounds, and prints each concept's similarities. A seed counts when ``own`` exceeds ``base`` and ``others`` for
every concept. Results go to ``outputs/seeds``: one folder a seed, ``embedded_seeds.json`` and ``seeds.png``
(template and result of every seed); ``--record`` keeps the figures, and ``docs/seeds.png``.
"""

from __future__ import annotations

import argparse
import itertools
import random
from pathlib import Path

import torch

from benchmarks.records import RESULTS, made_with, picture_for_docs, write_record
from weaver.commands.seeds import with_seed
from weaver.demo import demo_job, with_shipped_concepts
from weaver.embedded import CONCEPTS
from weaver.embedded.identity import shows
from weaver.models import quiet_libraries
from weaver.pictures import grid
from weaver.run import run_job


def choose(seed: int) -> tuple[str, str]:
    """Two animals, in an order, and a background for one seed: every ordered pair has its turn."""
    animals = [card.name for card in CONCEPTS.values() if card.kind == "animal"]
    grounds = [card.name for card in CONCEPTS.values() if card.kind == "background"]
    pairs = list(itertools.permutations(animals, 2))
    random.Random(0).shuffle(pairs)
    return ",".join(pairs[seed % len(pairs)]), grounds[seed % len(grounds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("outputs/seeds"))
    parser.add_argument("--record", action="store_true", help="keep the figures in benchmarks/results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    quiet_libraries()
    rows, pictures = [], []
    for seed in range(args.seeds):
        names, ground = choose(seed)
        job = with_seed(with_shipped_concepts(demo_job(names, ground)), seed)
        run = run_job(job, args.out / f"seed{seed}", source="demo")
        concepts = run.report["concepts"]
        rows.append({"seed": seed, "concepts": concepts, "shows": all(map(shows, concepts.values()))})
        pictures += [run.result.template, run.result.image]
        told = "  ".join(f"{n} {s['own']:.2f}/{s['base']:.2f}/{s['others']:.2f}" for n, s in concepts.items())
        print(f"seed {seed}  {'yes' if rows[-1]['shows'] else 'NO '}  own/base/others: {told}", flush=True)
    hits = sum(row["shows"] for row in rows)
    print(f"every concept nearest to its own pictures in {hits} of {len(rows)}")
    told = {**made_with(CONCEPTS), "shows": f"{hits} of {len(rows)}", "rows": rows}
    sheet = grid([pictures[i : i + 10] for i in range(0, len(pictures), 10)], 192)
    sheet.save(args.out / "seeds.png")
    if args.record:
        told |= picture_for_docs("seeds.png", sheet, 192)
    for folder in [args.out] + [RESULTS] * args.record:
        write_record(folder, "embedded_seeds", told)


if __name__ == "__main__":
    main()
