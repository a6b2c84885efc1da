"""Many calls under one bar: here or in processes of their own."""

from __future__ import annotations

import pytest

from weaver.apart import call_all


def count_up(start: int, parts: int, move) -> int:
    for part in range(1, parts + 1):
        move(part, 99)  # what it gives as its total is not looked at
    return start + parts


@pytest.mark.parametrize("processes", [1, 2])
def test_the_bar_shows_what_all_calls_have_done(processes):
    seen = []
    found = call_all(count_up, [(10, 2), (20, 3)], lambda *of: seen.append(of), 5, processes)
    assert found == [12, 23] and seen == [(done, 5) for done in range(1, 6)]
