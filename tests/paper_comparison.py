"""The stock pipeline under `attach` beside the paper's equations as `paper_reference` has them written out."""

from __future__ import annotations

from dataclasses import asdict

import torch
from paper_reference import STEPS, Case, Reference, masks_of, prompts_of

from weaver.features import collect_features
from weaver.fusion import ConceptUse, FusionPlan, attach
from weaver.inversion import invert
from weaver.layers import InjectionSites


def compare(case: Case, pipe, concepts, templates):
    masks = masks_of(case)
    base, own = prompts_of(case)
    uses = [
        ConceptUse(
            concept,
            strength=case.strengths[i],
            window=case.windows.get(i, (0.0, 1.0)),
            scale=case.scale,
            negative_prompt=case.own_negatives.get(i),
        )
        for i, concept in enumerate(concepts[: case.n] + ([concepts[4]] if case.background else []))
    ]
    features = None
    z = torch.randn(1, 4, *(n // 2 for n in case.pixels), generator=torch.Generator().manual_seed(9)).double()
    if case.sites is not None:
        inversion = templates(pipe, case.prediction, case.pixels)
        features, z = collect_features(pipe, inversion, InjectionSites(**asdict(case.sites))), inversion.z_T
    plan = FusionPlan.build(
        pipe,
        uses[: case.n],
        masks if case.n else None,
        prompt=base,
        negative_prompt=case.negative,
        background=uses[case.n] if case.background else None,
        suppression=case.lam,
        guidance=case.omega,
        features=features,
        steps=STEPS,
        height=case.pixels[0],
        width=case.pixels[1],
    )
    assert list(plan.prompts) == [case.negative, base, *own, *case.own_negatives.values()]
    with attach(pipe, plan):
        ours = pipe(
            base,
            negative_prompt=case.negative,
            guidance_scale=plan.guidance,
            num_inference_steps=STEPS,
            height=case.pixels[0],
            width=case.pixels[1],
            latents=z,
            output_type="latent",
        ).images
    with torch.no_grad():
        theirs = Reference(pipe, case, concepts, masks, source="a dog and a cat" if features else None).run(z)
    scale = theirs.abs().max()
    assert (ours - theirs).abs().max() < 1e-10 * scale


def make_templates():
    """Returns a function that inverts one picture for each kind of prediction and each size that is asked for."""
    made = {}

    def get(pipe, prediction, pixels):
        if (prediction, pixels) not in made:
            z = torch.randn(1, 4, *(n // 2 for n in pixels), generator=torch.Generator().manual_seed(5)).double()
            made[prediction, pixels] = invert(pipe, z, "a dog and a cat", STEPS)
        return made[prediction, pixels]

    return get
