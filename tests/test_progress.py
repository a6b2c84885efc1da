"""Bars, and lines where there is no terminal."""

from __future__ import annotations

import pytest

from weaver import progress
from weaver.progress import Stages


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets: `clock[0]`, in seconds."""
    seconds = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: seconds[0])
    return seconds


def test_without_a_terminal_what_takes_long_tells_once_a_minute_how_far_it_is(clock, capsys):
    with Stages().bar("drawing", 100, left=True) as move:
        for done, at in ((1, 10), (5, 59), (10, 61), (12, 90), (20, 150), (50, 299), (100, 400)):
            clock[0] = at
            move(done, 100, loss=0.25 if done == 20 else None)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "drawing: 10 of 100 in 1 min, 9 left",
        "drawing: 20 of 100 in 2 min, 10 left, loss 0.2500",
        "drawing: 50 of 100 in 5 min, 5 left",
    ]


@pytest.mark.parametrize(("bars", "left"), [(False, True), (None, False)])
def test_a_library_and_short_stages_say_nothing(clock, capsys, bars, left):
    with Stages(bars=bars).bar("drawing", 100, left=left) as move:
        clock[0] = 100
        move(10, 100)
    assert capsys.readouterr() == ("", "")


def test_bars_show_the_time_left(capsys):
    with Stages(bars=True).bar("drawing", 4, left=True) as move:
        move(4, 4, loss=0.5)
    told = capsys.readouterr().err
    assert "4/4" in told and "loss 0.5000" in told and "<00:00" in told
