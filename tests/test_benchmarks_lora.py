"""The benchmark of `routed_lora`: every way is right, and what it adds is told. Nothing here asserts a time."""

from __future__ import annotations

import pytest
import torch

from benchmarks import harness, lora_providers, rows, shapes
from benchmarks import routed_lora as benchmark
from benchmarks.floors import Rates
from benchmarks.lora_report import added, forward_ms, lora
from weaver_kernels.unets import Layer, linears

CPU = torch.device("cpu")
TINY = shapes.UNet("tiny", 8, (shapes.Geometry(8, 2, 8, 2, 2),))


def test_all_ways_agree_with_the_reference():
    layer = benchmark.make_layer(Layer(8, 12, 20, 1), shapes.blob_masks(3, 32)[:3], torch.float32, CPU)
    x = torch.randn(2, 64, 12)
    alone, changed = benchmark.truths(layer, x)
    assert not torch.equal(alone[0], changed[0]) and torch.equal(alone[1], changed[1])
    for name, provider in lora_providers.LORA_PROVIDERS.items():
        out = provider(layer)(x)[:, :, None]
        true = alone if name == "base" else changed
        assert harness.token_error(out, true) < harness.tolerance(torch.float32), name


def test_work_follows_what_is_alive():
    layer = benchmark.make_layer(Layer(8, 12, 20, 1), torch.ones(1, 8, 8), torch.float32, CPU)
    x = torch.zeros(2, 64, 12)
    alone, changed = (benchmark.work(layer, x, with_adapters) for with_adapters in (False, True))
    assert alone.n_bytes == changed.n_bytes == 4 * (2 * 64 * 32 + 240)
    assert (alone.flops, changed.flops - alone.flops) == (2 * 2 * 64 * 240, 2 * 64 * 16 * 32)


def test_a_run_records_and_tells_what_is_added(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(shapes.MODELS, "sd15", TINY)
    monkeypatch.setattr(benchmark, "measure_rates", lambda *_: Rates(1e9, 1e9))
    off = type("Off", (lora_providers.Base,), {"__call__": lambda *a: 0})
    monkeypatch.setitem(lora_providers.LORA_PROVIDERS, "masked, together", off)
    run = ("--quick", "--device", "cpu", "--rounds", "1", "--concepts", "2", "--out", str(tmp_path))
    assert benchmark.main([*run, "--providers", "base", "ours", "masked, together"]) == 0
    found = rows.read(tmp_path / "routed_lora.csv")
    assert {(row["provider"], row["N"], row["layer"]) for row in found} == {
        (name, "2", str(layer)) for name in ("base", "ours") for layer in linears(TINY)
    }
    assert all((row["provider"] == "ours") == bool(row["implementation"]) for row in found)
    told = capsys.readouterr().out
    assert "not measured: masked, together, N = 2: TypeError" in told and "ours                 N = 2:" in told
    assert "## LoRAs in their regions" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_what_is_added_by_hand(monkeypatch):
    monkeypatch.setitem(shapes.MODELS, "sd15", TINY)
    about = {"device": "a CPU", "dtype": "float32", "model": "sd15", "masks": "hard", "N": "1"}
    times = [("base", 1000), ("ours", 1100)]
    found = [
        {**about, "layer": str(layer), "provider": name, "p50_us": str(us)}
        for layer in linears(TINY)
        for name, us in times
    ]
    sums = forward_ms(found, "sd15")
    assert sums["base", 1] == pytest.approx(14 + 2 + 2)
    assert (added(sums, "ours", 1), added(sums, "base", 1)) == (" (+10%)", "")
    assert "| ours | 19.8 (+10%) | not yet measured |" in lora(found)[-1]
    assert lora([]) == ["## LoRAs in their regions", "not yet measured"]
