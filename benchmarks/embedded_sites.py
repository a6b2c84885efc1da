"""Which injection sites hold the embedded model's composition? ``python benchmarks/embedded_sites.py``

Injection sites are a property of a model: with 16x16 latents the paper's l=4 is a 4x4 map and holds nothing. This
sweep fuses the concepts that ship into drawn templates with true masks, for several tables of sites, windows,
guidance, suppression and eta. For each it prints how often a concept is nearest to its own pictures, its mean margin
over base and others, and the PSNR of what no mask covers against the template (with the background left to the base
model).
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from weaver import Concept, ConceptUse, collect_features, compose_masks, invert
from weaver.defaults import embedded_defaults
from weaver.embedded import CONCEPTS, concept_hashes, concept_path, load_pipeline, model_hash
from weaver.embedded.identity import score
from weaver.embedded.world import draw_scene
from weaver.evaluation.measures import psnr_outside
from weaver.fusion.plan import FusionPlan
from weaver.fusion.sampler import sample_fusion
from weaver.latents import decode_latents, tensor_to_images
from weaver.layers import EMBEDDED, PAPER, PLUG_AND_PLAY, InjectionSites
from weaver.pictures import grid
from weaver.schedule import ddim_scheduler

RESULTS = Path(__file__).parent / "results"
ALL_ATTENTION = tuple(range(4, 12))
DEFAULTS = embedded_defaults()


@dataclass(frozen=True)
class Arm:
    """One setting of the sweep."""

    sites: InjectionSites
    guidance: float = DEFAULTS.guidance
    suppression: float = DEFAULTS.suppression
    eta: float = DEFAULTS.eta

    @property
    def label(self) -> str:
        return f"{self.sites.name} g{self.guidance:g} lambda{self.suppression:g} eta{self.eta:g}"


def _sites(name: str, resnets: tuple[int, ...], window: float, attention_window: float | None = None) -> InjectionSites:
    return InjectionSites(
        f"{name} {window:g}/{window if attention_window is None else attention_window:g}",
        resnets,
        ALL_ATTENTION,
        window,
        window if attention_window is None else attention_window,
    )


def arms() -> list[Arm]:
    """The settings that are compared."""
    tables = [InjectionSites("none"), PAPER, PLUG_AND_PLAY]
    tables.append(_sites("q,k only", (), 0.5))
    for window in (0.3, 0.5, 0.8):
        tables.append(_sites("up1", (3, 4, 5), window))
        tables.append(_sites("up1+up2", (3, 4, 5, 6, 7, 8), window))
        tables.append(_sites("all up", tuple(range(3, 12)), window))
    others = [Arm(EMBEDDED, guidance) for guidance in (2.0, 4.0)] + [Arm(EMBEDDED, suppression=0.3)]
    others += [Arm(EMBEDDED, eta=eta) for eta in (0.0, 1.0)]
    return [Arm(table) for table in [*tables, EMBEDDED]] + others


@torch.no_grad()
def measure(pipe, arm: Arm, templates: list, steps: int) -> tuple[dict, list[Image.Image]]:
    """The figures of one arm over all templates, and its pictures."""
    won, margins, kept, pictures = [], [], [], []
    for scene, uses, masks, inversion in templates:
        features = collect_features(pipe, inversion, arm.sites, reconstruct=False)
        amounts = {"suppression": arm.suppression, "guidance": arm.guidance}
        plan = FusionPlan.build(pipe, uses, masks, prompt=scene.caption, features=features, **amounts)
        noise = {"eta": arm.eta, "generator": torch.Generator().manual_seed(0)}
        z = sample_fusion(pipe.unet, features.z_T, ddim_scheduler(pipe.scheduler), plan, **noise)
        image = tensor_to_images(decode_latents(pipe.vae, z))[0]
        pictures.append(image)
        for index, use in enumerate(uses):
            found = score(image, scene.mask(index), use.concept.name)
            margin = found["own"] - max(found["base"], found["others"])
            won.append(margin > 0)
            margins.append(margin)
        outside = masks[-1].numpy() > 0.5
        reference = tensor_to_images(decode_latents(pipe.vae, inversion.z_0))[0]
        kept.append(psnr_outside(image, reference, ~outside))
    figures = {"own": np.mean(won), "margin": np.mean(margins), "background_psnr": np.mean(kept)}
    return {key: round(float(value), 3) for key, value in figures.items()}, pictures


def animals() -> list[str]:
    """Names of the concepts that are swept with."""
    return [card.name for card in CONCEPTS.values() if card.kind == "animal"]


def make_templates(pipe, count: int, steps: int) -> list:
    """Drawn pairs of animals whose concepts ship, inverted, with their true masks."""
    names = animals()
    concepts = {name: Concept.load(concept_path(name)) for name in names}
    pairs = list(itertools.permutations(names, 2))
    random.Random(1).shuffle(pairs)
    templates = []
    for index in range(count):
        pair = pairs[index % len(pairs)]
        scene = draw_scene(random.Random(700 + index), animals=[CONCEPTS[n].word for n in pair], varied=False)
        uses = [ConceptUse(concepts[name]) for name in pair]
        masks = compose_masks(np.stack([scene.mask(i) for i in range(2)]), dilation=1)
        templates.append((scene, uses, masks, invert(pipe, scene.image, scene.caption, steps)))
    return templates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--templates", type=int, default=6)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("outputs/sites"))
    parser.add_argument("--record", action="store_true", help="keep the figures in benchmarks/results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    pipe = load_pipeline()
    templates = make_templates(pipe, args.templates, args.steps)
    rows, strips = [], []
    for arm in tqdm(arms(), disable=None):
        figures, pictures = measure(pipe, arm, templates, args.steps)
        rows.append({"arm": arm.label, **figures})
        strips.append(pictures)
        print(f"{arm.label:28} {figures}", flush=True)
    for folder in [args.out] + [RESULTS] * args.record:
        told = {
            "model": model_hash(),
            "concepts": concept_hashes(animals()),
            "templates": args.templates,
            "steps": args.steps,
            "rows": rows,
        }
        (folder / "embedded_sites.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    grid([[template[0].image for template in templates], *strips], 128).save(args.out / "sites.png")


if __name__ == "__main__":
    main()
