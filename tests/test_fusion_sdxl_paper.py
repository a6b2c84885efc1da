"""The stock SDXL pipeline under `attach` against the paper's equations, as `paper_reference` writes them out."""

from __future__ import annotations

import pytest
from conftest import make_concept
from paper_comparison import compare, make_templates
from paper_reference import Case, Sites
from test_fusion_regional import make_lora
from tiny_sdxl import make_sdxl

BOTH = Sites("both", resnets=(1,), attentions=(1, 4), resnet_window=0.8, attention_window=0.4)
CASES = [
    Case("one", 1),
    Case("three-background-negative", 3, background=True, negative="ugly, blurry"),
    Case("four-all", 4, lam=0.3, background=True, negative="ugly", soft=True, sites=BOTH),
    Case("two-wide-injected", 2, pixels=(32, 48), lam=0.2, sites=BOTH),
    Case("two-tall", 2, pixels=(48, 32), lam=0.2),
    Case("no-guidance", 2, omega=1.0, lam=0.3, sites=BOTH),
    Case("windows", 2, windows={0: (0.0, 0.4), 1: (0.2, 1.0), 2: (0.4, 0.8)}, lam=0.4, background=True, sites=BOTH),
    Case("strengths-scaled", 2, strengths=(0.5, 0.0, 0.25), lam=0.4, background=True, scale=0.5),
]
SITES = [
    Sites("resnet-1", resnets=(1,), resnet_window=1.0),
    Sites("resnets-of-every-block", resnets=(0, 5, 8), resnet_window=0.5),
    Sites("attention-of-three-blocks", attentions=(1,), attention_window=1.0),
    Sites("attention-of-every-layer", attentions=tuple(range(6)), attention_window=0.5),
    Sites("both-other-windows", resnets=(1,), attentions=(1, 4), resnet_window=0.6, attention_window=0.9),
]


@pytest.fixture(scope="module")
def templates():
    return make_templates()


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_stock_pipeline_under_attach_equals_the_paper(case, tiny_sdxl, concepts_sdxl, templates):
    compare(case, tiny_sdxl, concepts_sdxl, templates)


@pytest.mark.parametrize("sites", SITES, ids=[sites.name for sites in SITES])
def test_injection_equals_the_three_row_formulation(sites, tiny_sdxl, concepts_sdxl, templates):
    """The template's prompt is another than the base prompt, and so its pooled embedding."""
    compare(Case(sites.name, 1, sites=sites, lam=0.2), tiny_sdxl, concepts_sdxl, templates)


def test_velocity_prediction(templates):
    pipe = make_sdxl("v_prediction", seed=1)
    concepts = [make_concept(pipe, 1, "dog")]
    compare(Case("v", 1, "v_prediction", sites=BOTH, lam=0.2), pipe, concepts, templates)


@pytest.mark.parametrize("sites", [None, BOTH], ids=["noise", "injected"])
def test_whole_loras_each_in_its_region(sites, tiny_sdxl, templates):
    """Of every module that has a region, the several transformer blocks of a layer among them."""
    concepts = [make_lora(tiny_sdxl, number, word) for number, word in enumerate(("dog", "cat"), 1)]
    compare(Case("whole", 2, lam=0.3, negative="ugly", soft=True, sites=sites), tiny_sdxl, concepts, templates)
