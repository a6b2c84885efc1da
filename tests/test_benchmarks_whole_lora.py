"""The benchmark of LoRAs that are used whole runs, and its forms are four things. Nothing here asserts a time."""

from __future__ import annotations

import torch

from benchmarks import rows
from benchmarks import whole_lora as benchmark
from weaver.concepts.concept import attn2_hash
from weaver.embedded import load_pipeline


def test_every_form_is_another_step_of_the_same_latents():
    pipe = load_pipeline()
    base_hash = attn2_hash(pipe.unet)
    loras = [benchmark.make_lora(pipe, number, word, 2, base_hash) for number, word in enumerate(("cat", "dog"))]
    z = torch.randn(2, pipe.unet.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    found = {form: benchmark.make_step(pipe, loras, form, 8, z, base_hash)() for form in benchmark.FORMS}
    plain, texts, whole, switched = found.values()
    assert plain.shape == z.shape and not torch.equal(plain, texts) and not torch.equal(texts, whole)
    torch.testing.assert_close(switched[:1], plain[:1])  # the negative row has no adapter
    assert not torch.equal(switched[1], plain[1])


def test_a_run_records_a_row_of_each(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path / "whole_lora.csv")
    given = "--model embedded --device cpu --cells 8 --concepts 1 --rounds 1 --rank 2 --record".split()
    benchmark.main(given)
    found = rows.read(tmp_path / "whole_lora.csv")
    assert {(row["N"], row["form"]) for row in found} == {("1", form) for form in benchmark.FORMS}
    assert capsys.readouterr().out.count("1.000 x plain") >= 1
