"""Intervals: what is known of them beforehand."""

from __future__ import annotations

import numpy as np
import pytest

from weaver.errors import WeaverError
from weaver.evaluation.bootstrap import difference, mean, resample


def test_resamples_draw_as_many_prompts_and_the_same_each_time():
    drawn = resample(7, 50)
    assert drawn.shape == (50, 7) and (drawn.sum(1) == 7).all() and (drawn == resample(7, 50)).all()
    with pytest.raises(WeaverError, match="0 prompts"):
        resample(0)


def test_an_interval_is_as_wide_as_the_normal_one():
    values = np.random.default_rng(1).normal(2.0, 1.0, size=400)
    found = mean(values, np.ones(400), resample(400))
    assert found.value == pytest.approx(values.mean()) and found.prompts == 400
    half = 1.96 * values.std() / 20
    assert found.low == pytest.approx(values.mean() - half, abs=0.02)
    assert found.high == pytest.approx(values.mean() + half, abs=0.02)


def test_prompts_count_by_their_values():
    found = mean(np.array([3.0, 0.0, 0.0]), np.array([3.0, 1.0, 0.0]), resample(3))
    assert found.value == 0.75 and (found.low, found.high) == (0, 1) and found.prompts == 2


def test_equal_prompts_have_no_interval_and_nothing_is_nan():
    drawn = resample(4)
    same = mean(np.full(4, 0.5), np.ones(4), drawn)
    assert same.value == same.low == same.high == 0.5
    nothing = mean(np.zeros(4), np.zeros(4), drawn)
    assert nothing.value != nothing.value and nothing.prompts == 0 and nothing.as_mapping()["low"] is None


def test_pairs_are_narrower_than_what_they_are_taken_of():
    rng = np.random.default_rng(2)
    level, drawn = rng.normal(0, 5, size=60), resample(60)
    first, second = level + 1, level + rng.normal(0, 0.1, size=60)
    found = difference((first, np.ones(60)), (second, np.ones(60)), drawn)
    alone = mean(first, np.ones(60), drawn)
    assert found.value == pytest.approx(1, abs=0.1) and 0 < found.low < found.value < found.high
    assert found.high - found.low < 0.1 * (alone.high - alone.low)


def test_pairs_are_of_prompts_that_both_have():
    drawn = resample(3)
    found = difference((np.array([1.0, 9, 1]), np.array([1.0, 1, 1])), (np.zeros(3), np.array([1.0, 0, 1])), drawn)
    assert found.value == 1 and found.prompts == 2
    none = difference((np.ones(3), np.ones(3)), (np.zeros(3), np.zeros(3)), drawn)
    assert none.value != none.value and none.prompts == 0
