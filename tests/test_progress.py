"""Seconds and bars."""

from __future__ import annotations

import re
import time

import pytest

from weaver.progress import Stages


@pytest.mark.parametrize(("bars", "terminal"), [(False, True), (True, False), (None, False), (None, True)], ids=str)
def test_stages_are_timed_and_bars_are_drawn_on_a_terminal_or_when_asked(capfd, monkeypatch, bars, terminal):
    if bars is None:
        monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    stages = Stages(bars=bars)
    with stages.stage("fusion"), stages.bar("fusion", 2) as move:
        move(1, 2)
        move(2, 2)
    assert stages.seconds["fusion"] > 0
    assert ("fusion" in capfd.readouterr().err) == (terminal if bars is None else bars)


def test_nothing_is_drawn_into_a_pipe(capfd):
    with Stages().step("starting"):
        pass
    assert capfd.readouterr() == ("", "")


def test_a_bar_shows_the_loss_and_the_time_left(capfd):
    with Stages(bars=True).bar("learning", 100, left=True) as move:
        time.sleep(0.15)  # of two steps, of which there are fifty
        move(2, 100, loss=0.25)
    shown = capfd.readouterr().err.split("\r")[-1]
    assert re.search(r"2/100 00:00<00:0[5-9], loss 0\.2500", shown), shown
