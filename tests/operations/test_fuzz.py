"""Random cases, the same ones every time, and what happens when one is wrong. `make fuzz` draws others."""

from __future__ import annotations

import pytest
import torch

from operations import fuzz

CASES, INTERPRETED = 100, 6
LORAS, INTERPRETED_LORAS = 60, 4


@pytest.mark.parametrize(
    ("kind", "number"), [("live", CASES), ("lora", LORAS), ("kernel", INTERPRETED), ("lora-kernel", INTERPRETED_LORAS)]
)
def test_random_cases(kind, number, capsys):
    assert fuzz.run_many(kind, range(number)) == [], capsys.readouterr().out


def test_a_wrong_case_is_told_and_can_be_run_alone(monkeypatch, capsys):
    monkeypatch.setattr(fuzz, "context_attention", lambda **case: torch.zeros_like(case["q"]))
    plain = [seed for seed in range(40) if not fuzz.draw("live", seed)[1]["plan"]][:3]
    failed = fuzz.run_many("live", plain)
    assert failed
    assert f"again: make fuzz ARGS='--replay live:{failed[0]}'" in capsys.readouterr().out
    with pytest.raises(AssertionError):
        fuzz.main(["--replay", f"live:{failed[0]}"])


def test_a_seed_is_a_case():
    assert fuzz.draw("live", 5) == fuzz.draw("live", 5) != fuzz.draw("live", 6)
