"""What does a whole LoRA in its region give, beside other ways to use the same files?

``python -m benchmarks.embedded_lora``

Takes the animals that ship, LoRAs of all layers, two a seed and every ordered pair in its turn, before a background of
the base model's. Forms:

- "whole, by region": what `weave` does.
- "cross-attention, by region": the same files, of which only keys, values, queries and outputs of cross-attention act.
- "every token, masked": the same as the first, computed by every adapter on every token times its mask; how far its
  pictures are from the first's is told, in levels of 255.
- "all merged": both files loaded by diffusers, in one picture drawn from one prompt with both tokens, without template;
  its animals are found by the segmenter.

Prints the means over all animals of the similarity to the concept's own pictures inside its mask (`own`), to its base
class (`base`), to the nearest other concept (`others`) and to the other one in the picture (`mixed`); in how many
pictures every animal is nearest to its own (`shows`); and in how many masks the animal is nearest to the picture's
other concept, of all that the classifier knows (`leaks`). Results go to ``outputs/lora``: a folder a form and
seed, ``embedded_lora.json`` and ``lora.png``, a row a form; ``--record`` keeps them, and ``docs/whole_loras.png``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from unittest import mock

import numpy as np
import torch
from PIL import Image

from benchmarks.embedded_seeds import choose, shows
from benchmarks.records import RESULTS, made_with, picture_for_docs, write_record
from weaver import Concept
from weaver.commands.seeds import with_seed
from weaver.concepts.formats.convert import convert
from weaver.defaults import defaults_for
from weaver.demo import demo_job, with_shipped_concepts
from weaver.embedded import concept_path, load_pipeline
from weaver.embedded.catalog import card_of
from weaver.embedded.identity import identity_of, score, similarities
from weaver.job import Job
from weaver.masks import MaskError, segmenter_masks
from weaver.models import quiet_libraries
from weaver.pictures import grid
from weaver.run import run_job
from weaver_kernels import routed_lora_reference

WHOLE, CROSS, MASKED, MERGED = "whole, by region", "cross-attention, by region", "every token, masked", "all merged"
FORMS = (WHOLE, CROSS, MASKED, MERGED)


@dataclass(frozen=True)
class Drawn:
    """A picture and where its animals are, by concept; none of those that were not found."""

    image: Image.Image
    masks: dict[str, np.ndarray]


def on_every_token(y, x, adapters, weights, index, *, plan, **geometry) -> None:
    """What `routed_lora` does, without looking where an adapter is alive."""
    y.copy_(routed_lora_reference(y, x, adapters, weights, index, **geometry))


def woven(job: Job, folder: Path, form: str) -> Drawn:
    """The picture of a job, in one of the forms that have regions."""
    if form == CROSS:
        job = replace(job, concepts=tuple(replace(spec, parts="cross-attention") for spec in job.concepts))
    dense = mock.patch("weaver.fusion.regional.routed_lora", on_every_token)
    with dense if form == MASKED else mock.MagicMock():
        result = run_job(job, folder, source="lora").result
    names = [spec.name for spec in job.concepts]
    return Drawn(result.image, dict(zip(names, (mask.numpy() for mask in result.masks), strict=False)))


def merged(job: Job, names: Sequence[str]) -> Drawn:
    """The picture of a prompt with every token, of the model with every file loaded."""
    pipe, prompt = load_pipeline(), job.prompt
    pipe.set_progress_bar_config(disable=True)
    with TemporaryDirectory() as folder:
        for number, name in enumerate(names):
            concept = Concept.load(concept_path(name))
            file, token = convert(concept, "diffusers-lora", Path(folder) / f"{number}.safetensors").files
            pipe.load_lora_weights(folder, weight_name=file.name, adapter_name=f"lora{number}")
            pipe.load_textual_inversion(str(token))
            prompt = prompt.replace(f"a {concept.word}", f"a {concept.token} {concept.word}", 1)
    pipe.set_adapters([f"lora{number}" for number in range(len(names))])
    seed = torch.Generator().manual_seed(job.seed)
    image = pipe(
        prompt, num_inference_steps=job.steps, guidance_scale=defaults_for(pipe).template_guidance, generator=seed
    ).images[0]
    try:
        words = [card_of(name).word for name in names]
        masks = dict(zip(names, segmenter_masks(image, words, job.prompt).numpy(), strict=True))
    except MaskError:  # an animal is missing: none of them is shown
        masks = {}
    return Drawn(image, masks)


def mixing(drawn: Drawn, name: str, names: Sequence[str]) -> tuple[float, bool]:
    """How near a concept's region is to another one of the picture, and whether nothing that is known is nearer."""
    found = similarities(drawn.image, drawn.masks[name])
    others = [identity_of(card_of(other)) for other in names if other != name]
    return max(found[other] for other in others), max(found, key=found.get) in others


def figures(form: str, drawn: Sequence[Drawn], pairs: Sequence[Sequence[str]]) -> dict:
    """One row of the table; an animal that was not found counts as not shown, and in no mean."""
    scores = [{name: score(one.image, mask, name) for name, mask in one.masks.items()} for one in drawn]
    every = [found for of_one in scores for found in of_one.values()]
    mixed = [mixing(one, name, names) for one, names in zip(drawn, pairs, strict=True) for name in one.masks]
    shown = sum(
        len(found) == len(names) and all(map(shows, found.values())) for found, names in zip(scores, pairs, strict=True)
    )
    row = {"form": form} | {key: round(mean(found[key] for found in every), 3) for key in ("own", "base", "others")}
    animals = sum(map(len, pairs))
    return row | {
        "mixed": round(mean(near for near, _ in mixed), 3),
        "shows": f"{shown} of {len(drawn)}",
        "leaks": f"{sum(leaks for _, leaks in mixed)} of {len(every)}",
        "found": f"{len(every)} of {animals}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("outputs/lora"))
    parser.add_argument("--record", action="store_true", help="keep the figures in benchmarks/results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    quiet_libraries()
    pairs = [choose(seed)[0].split(",") for seed in range(args.seeds)]
    found: dict[str, list[Drawn]] = {form: [] for form in FORMS}
    for seed, names in enumerate(pairs):
        job = with_seed(with_shipped_concepts(demo_job(",".join(names), "none")), seed)
        for form in FORMS:
            folder = args.out / form.replace(",", "").replace(" ", "-") / f"seed{seed}"
            found[form].append(merged(job, names) if form == MERGED else woven(job, folder, form))
    table = [figures(form, drawn, pairs) for form, drawn in found.items()]
    apart = max(
        int(np.abs(np.asarray(a.image, np.int16) - np.asarray(b.image, np.int16)).max())
        for a, b in zip(found[WHOLE], found[MASKED], strict=True)
    )
    table[FORMS.index(MASKED)]["levels_from_whole"] = apart
    for row in table:
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    animals = sorted({name for names in pairs for name in names})
    told = {**made_with(animals), "seeds": args.seeds, "rows": table}
    sheet = grid([[one.image for one in drawn] for drawn in found.values()], 160)
    sheet.save(args.out / "lora.png")
    if args.record:
        told |= picture_for_docs("whole_loras.png", sheet, 160)
    for place in [args.out] + [RESULTS] * args.record:
        write_record(place, "embedded_lora", told)


if __name__ == "__main__":
    main()
