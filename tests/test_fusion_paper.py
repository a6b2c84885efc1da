"""The stock pipeline under `attach` against the paper's equations, as `paper_reference` writes them out."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import pytest
from conftest import WORDS_OF_CONCEPTS, make_concept
from paper_comparison import compare, make_templates
from paper_reference import Case, Sites

BOTH = Sites("both", resnets=(3, 4), attentions=(4, 7, 9), resnet_window=0.8, attention_window=0.4)
CASES = [
    Case("one", 1),
    Case("two-suppressed", 2, lam=0.4),
    Case("three-background-negative", 3, background=True, negative="ugly, blurry"),
    Case("four-all", 4, lam=0.3, background=True, negative="ugly", soft=True, sites=BOTH),
    Case("two-wide-injected", 2, pixels=(32, 48), lam=0.2, sites=BOTH),
    Case("v-one-suppressed", 1, "v_prediction", lam=0.5),
    Case("v-three-background-injected", 3, "v_prediction", background=True, sites=BOTH, negative="low"),
    Case("v-four-tall-soft", 4, "v_prediction", pixels=(48, 32), soft=True, lam=0.3),
    Case("no-guidance", 2, omega=1.0, lam=0.3, sites=BOTH),
    Case("no-concepts-background", 0, background=True, lam=0.5),
    Case("strengths", 2, strengths=(0.5, 0.0, 0.25), lam=0.4, background=True),
    Case("windows", 2, windows={0: (0.0, 0.4), 1: (0.2, 1.0), 2: (0.4, 0.8)}, lam=0.4, background=True, sites=BOTH),
    Case("scaled-deltas", 1, scale=0.5, lam=0.2),
    Case("own-negatives", 2, own_negatives={0: "a cat", 2: "ugly beach"}, negative="low", background=True, lam=0.3),
    Case("own-negative-windows", 2, own_negatives={1: "dog"}, windows={1: (0.2, 0.7)}, strengths=(1, 0.6), sites=BOTH),
    Case("own-negatives-unguided", 2, own_negatives={0: "ugly"}, omega=1.0),
]
SITES = [
    Sites("resnet-4", resnets=(4,), resnet_window=1.0),
    Sites("resnets-3-4-5-half", resnets=(3, 4, 5), resnet_window=0.5),
    Sites("resnets-shallow", resnets=(0, 8, 11), resnet_window=0.7),
    Sites("attention-4", attentions=(4,), attention_window=1.0),
    Sites("attention-4-to-11-part", attentions=tuple(range(4, 12)), attention_window=0.5),
    Sites("both-other-windows", resnets=(4,), attentions=(4, 7, 9), resnet_window=0.6, attention_window=0.9),
    Sites("never", resnets=(4,), attentions=(4,), resnet_window=0.0, attention_window=0.1),
]


LORA_CASES = [
    Case("one", 1, lam=0.3),
    Case("four-all", 4, lam=0.3, background=True, negative="ugly", soft=True, sites=BOTH, scale=0.5),
    Case("windows", 3, windows={0: (0.0, 0.4), 1: (0.2, 1.0)}, strengths=(1.0, 0.5, 1.0), own_negatives={1: "dog"}),
    Case("no-guidance", 2, omega=1.0),
]


@pytest.fixture(scope="module")
def lora_concepts(tiny_pipe):
    """Of some all is changed, of others the queries, the output or its bias alone, or only some layers."""
    every = ("to_k", "to_v", "to_q", "to_out.0", "to_out.0.bias")
    parts = [every, ("to_k", "to_v", "to_q"), ("to_out.0",), ("to_k", "to_v", "to_out.0.bias"), every]
    made = [
        make_concept(tiny_pipe, i + 1, word, changed=names)
        for i, (word, names) in enumerate(zip(WORDS_OF_CONCEPTS, parts, strict=True))
    ]
    some = {path: delta for path, delta in made[1].deltas.items() if "to_q" not in path or "up_blocks" in path}
    made[1] = dataclasses.replace(made[1], deltas=some)
    return made


@pytest.fixture(scope="module")
def templates():
    return make_templates()


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_stock_pipeline_under_attach_equals_the_paper(case, request, templates):
    suffix = "_v" if case.prediction == "v_prediction" else ""
    pipe, concepts = request.getfixturevalue(f"tiny_pipe{suffix}"), request.getfixturevalue(f"concepts{suffix}")
    compare(case, pipe, concepts, templates)


@pytest.mark.parametrize("case", LORA_CASES, ids=[case.name for case in LORA_CASES])
def test_changed_queries_and_output_projections_equal_the_paper(case, tiny_pipe, lora_concepts, templates):
    compare(case, tiny_pipe, lora_concepts, templates)


@pytest.mark.parametrize("sites", SITES, ids=[sites.name for sites in SITES])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_injection_equals_the_three_row_formulation(sites, prediction, request, templates):
    suffix = "_v" if prediction == "v_prediction" else ""
    pipe, concepts = request.getfixturevalue(f"tiny_pipe{suffix}"), request.getfixturevalue(f"concepts{suffix}")
    compare(Case(sites.name, 1, prediction, sites=sites, lam=0.2), pipe, concepts, templates)


def test_the_reference_imports_nothing_of_the_package():
    source = (Path(__file__).parent / "paper_reference.py").read_text(encoding="utf-8")
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {node.module if isinstance(node, ast.ImportFrom) else name.name for node in nodes for name in node.names}
    assert names == {"__future__", "copy", "dataclasses", "functools", "torch", "torch.nn.functional"}
