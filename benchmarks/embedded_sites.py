"""Which injection sites hold the embedded model's composition? ``python benchmarks/embedded_sites.py``

Injection sites are a property of a model: with 16x16 latents the paper's l=4 is a 4x4 map. This sweep fuses the
concepts that ship into drawn templates with true masks, before the base model's background in half of them and before a
background concept in the others, for several tables of sites, windows, guidance, suppression and eta. For each it
prints the objective of `weaver.evaluation.sweep` (J: right identities, less leaks, less what the background lacks of 20
dB, and the mask IoU) and the mean margin; and apart, how many animals and how many backgrounds are right, the PSNR of
the background that was left to the base model, and the mask IoU.

What holds most of a template holds its background too, against a concept for it: J counts both. Settings are drawn
several at once, one a core.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from benchmarks.records import RESULTS, made_with, write_record
from weaver import Concept, ConceptUse, collect_features, compose_masks, invert
from weaver.apart import call_all, cores
from weaver.defaults import default_dilation, embedded_defaults
from weaver.embedded import CONCEPTS, concept_path, load_pipeline
from weaver.embedded.world import IMAGE_SIZE, Scene, draw_scene
from weaver.evaluation.measures import measure
from weaver.evaluation.sweep import OBJECTIVE, objective
from weaver.fusion.plan import FusionPlan
from weaver.fusion.sampler import sample_fusion
from weaver.inversion import Inversion
from weaver.latents import decode_latents, tensor_to_images
from weaver.layers import EMBEDDED, PAPER, PLUG_AND_PLAY, InjectionSites
from weaver.models import quiet_libraries
from weaver.pictures import grid
from weaver.progress import Stages
from weaver.schedule import ddim_scheduler

KINDS = ("animal", "background")
ALL_ATTENTION = tuple(range(4, 12))
DEFAULTS = embedded_defaults()
DILATION = default_dilation((IMAGE_SIZE, IMAGE_SIZE), DEFAULTS.dilation)


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
    others = [Arm(EMBEDDED, guidance) for guidance in (3.0, 4.0)]
    others += [Arm(EMBEDDED, suppression=suppression) for suppression in (0.0, 0.5)]
    others += [Arm(EMBEDDED, eta=eta) for eta in (0.0, 0.5, 1.0) if eta != DEFAULTS.eta]
    return [Arm(table) for table in [*tables, EMBEDDED]] + others


@dataclass(frozen=True)
class Template:
    """A drawn scene, the concepts that are to stand in it, and its inversion."""

    scene: Scene
    animals: tuple[str, ...]
    ground: str | None
    inversion: Inversion | None = None

    @property
    def dense(self) -> list[np.ndarray]:
        """The true mask of every animal."""
        return [self.scene.mask(index) for index in range(len(self.animals))]


@torch.no_grad()
def fused(pipe, arm: Arm, template: Template, concepts: dict[str, Concept]) -> Image.Image:
    """The picture of an arm."""
    features = collect_features(pipe, template.inversion, arm.sites, reconstruct=False)
    uses = [ConceptUse(concepts[name]) for name in template.animals]
    options = {"background": template.ground and ConceptUse(concepts[template.ground])}
    options |= {"features": features, "suppression": arm.suppression, "guidance": arm.guidance}
    masks = compose_masks(np.stack(template.dense), dilation=DILATION)
    plan = FusionPlan.build(pipe, uses, masks, prompt=template.scene.caption, **options)
    noise = {"eta": arm.eta, "generator": torch.Generator().manual_seed(0)}
    z = sample_fusion(pipe.unet, features.z_T, ddim_scheduler(pipe.scheduler), plan, **noise)
    return tensor_to_images(decode_latents(pipe.vae, z))[0]


def figures(templates: Sequence[Template], pictures: Sequence[Image.Image]) -> dict:
    """One row of the table."""
    found = [
        asdict(
            measure(
                picture,
                one.animals,
                one.scene.caption,
                background=one.ground,
                template=one.scene.image,
                masks=one.dense,
            )
        )
        for one, picture in zip(templates, pictures, strict=True)
    ]
    right = {kind: [c["right"] for one in found for c in one["concepts"] if c["kind"] == kind] for kind in KINDS}
    psnr = [one["background_psnr"] for one in found if one["background_psnr"] is not None]
    outlines = float(np.mean([one["mask_iou"] for one in found]))
    total, margin = objective(found)
    shares = {f"{kind}s right": f"{sum(of)} of {len(of)}" for kind, of in right.items()}
    return {
        "J": round(total, 3),
        "margin": round(margin, 3),
        **shares,
        "background_psnr": round(float(np.mean(psnr)), 2),
        "mask_iou": round(outlines, 3),
    }


def templates_of(count: int) -> list[Template]:
    """Drawn pairs of animals whose concepts ship; every second one is to have a background concept. Not inverted."""
    names = {kind: [card.name for card in CONCEPTS.values() if card.kind == kind] for kind in KINDS}
    pairs = list(itertools.permutations(names["animal"], 2))
    random.Random(1).shuffle(pairs)
    templates = []
    for index in range(count):
        pair, ground = pairs[index % len(pairs)], None
        if index % 2:
            ground = names["background"][index // 2 % len(names["background"])]
        options = {"varied": False, "background": ground and CONCEPTS[ground].word}
        scene = draw_scene(random.Random(700 + index), animals=[CONCEPTS[n].word for n in pair], **options)
        templates.append(Template(scene, pair, ground))
    return templates


@cache
def prepared(count: int, steps: int) -> tuple[StableDiffusionPipeline, dict[str, Concept], list[Template]]:
    """This process's model and concepts, and the templates, inverted."""
    torch.set_num_threads(1)
    quiet_libraries()
    pipe = load_pipeline()
    concepts = {name: Concept.load(concept_path(name)) for name in CONCEPTS}
    templates = templates_of(count)
    return (
        pipe,
        concepts,
        [replace(one, inversion=invert(pipe, one.scene.image, one.scene.caption, steps)) for one in templates],
    )


def draw(arm: Arm, count: int, steps: int, move) -> tuple[dict, list[Image.Image]]:
    """An arm's row of the table, and its pictures."""
    pipe, concepts, templates = prepared(count, steps)
    pictures = []
    for template in templates:
        pictures.append(fused(pipe, arm, template, concepts))
        move(len(pictures), count)
    return {"arm": arm.label, **figures(templates, pictures)}, pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--templates", type=int, default=12)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("outputs/sites"))
    parser.add_argument("--record", action="store_true", help="keep the figures in benchmarks/results")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    jobs, total = [(arm, args.templates, args.steps) for arm in arms()], len(arms()) * args.templates
    with Stages().bar("drawing", total, left=True) as move:
        found = call_all(draw, jobs, move, total, cores())
    rows, strips = [row for row, _ in found], [pictures for _, pictures in found]
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    templates = templates_of(args.templates)
    used = sorted({name for one in templates for name in (*one.animals, one.ground) if name})
    told = {**made_with(used), "objective": OBJECTIVE, "drawn_by_default": Arm(EMBEDDED).label}
    told |= {"templates": args.templates, "steps": args.steps, "rows": rows}
    for folder in [args.out] + [RESULTS] * args.record:
        write_record(folder, "embedded_sites", told)
    grid([[template.scene.image for template in templates], *strips], 128).save(args.out / "sites.png")


if __name__ == "__main__":
    main()
