"""Tuning `routed_lora` without a GPU: what is compiled, what is measured, and where it is written."""

from __future__ import annotations

import json

import pytest
import torch

from operations.interpreted import needs_interpreter
from weaver_kernels import tune, tuning
from weaver_kernels.measure import eager_error, true_result, why_wrong
from weaver_kernels.measure_lora import make_lora_inputs, timed_layers
from weaver_kernels.tune import measured_before, stamp
from weaver_kernels.tune_lora import LoraRow, lora_rows
from weaver_kernels.tuning import LoraConfig, config_table, lora_config, tile_sizes, with_row, write_table
from weaver_kernels.unets import UNETS, Layer, linears

RIGHT = LoraConfig(16, 32, 32, 4, 1, 4)


def test_what_the_table_has_is_among_the_candidates_and_a_plan_has_their_tiles():
    for row in lora_rows():
        assert {config.tile for config in row.candidates(90)} <= set(tile_sizes("context_attention"))
        for arch in (80, 86, 89, 90, 100, 120):
            assert lora_config(row.rank, row.bits, arch, spread=row.spread) in row.candidates(arch), (row, arch)


def test_the_fastest_is_written_and_goes_before_a_row_for_both_layouts(monkeypatch):
    table, row, mark = config_table("routed_lora"), LoraRow(128, 32, True), {"device": "NVIDIA H200"}
    fast = lora_config(128, 32, 90)._replace(programs=512)
    done = tune.tune(
        [row], table, 90, mark, usable=iter([[fast]]), measure=lambda *_: {fast: 3.0}, write=lambda changed: None
    )
    assert measured_before(done.table, row, 90, mark) and not measured_before(table, row, 90, mark)
    monkeypatch.setattr(tuning, "config_table", lambda op: done.table)
    lookup = lora_config.__wrapped__
    assert lookup(128, 32, 90, spread=True) == fast != lookup(128, 32, 90) == lookup(128, 32, 80, spread=True)


def test_a_table_keeps_its_form(tmp_path):
    path = tmp_path / "routed_lora.json"
    write_table(path, config_table("routed_lora"))
    assert path.read_text() == (tune.CONFIGS / path.name).read_text(), (
        "written by hand: `write_table` gives it its form"
    )
    assert with_row(json.loads(path.read_text()), config_table("routed_lora")["rows"][0])["rows"]


def test_another_kernel_asks_for_another_measurement():
    assert stamp("GPU")["kernel"] != stamp("GPU", "routed_lora")["kernel"]


@pytest.mark.parametrize("taps", [0, 3], ids=["linear", "3x3"])
def test_results_are_compared_with_float64_before_anything_is_timed(taps):
    """The kernel interpreted, on the inputs the tuner makes."""
    needs_interpreter()
    torch.manual_seed(0)
    inputs = make_lora_inputs(Layer(4, 8, 8, 1), torch.float16, rank=4, tile_sizes=(16,), taps=taps, device="cpu")
    true = true_result(inputs)
    limit = 2 * eager_error(inputs, true)
    assert 0 < limit < 1e-2
    for again in (inputs, inputs):
        assert why_wrong(again, RIGHT, true, limit) == ""
    assert "wrong by" in why_wrong(inputs, RIGHT, true + 0.01, limit)
    assert torch.equal(inputs.out[1], inputs.y[1]), "the negative row has no adapters"


def test_what_is_timed_are_the_linears_of_a_unet_or_convolutions():
    layers = linears(UNETS["sd21"])
    assert sum(layer.count for layer in layers) == 16 * 10
    assert [(layer.inputs, layer.outputs) for layer in layers[:3]] == [(320, 320), (320, 2560), (1280, 320)]
    assert sum(layer.count for layer in linears(UNETS["sdxl"])) == 70 * 8 + 11 * 2
    assert [count for count, _ in timed_layers(16, torch.float16, False)] == [layer.count for layer in layers]
    assert len(timed_layers(16, torch.float16, True)) == 8
