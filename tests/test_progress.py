"""Seconds and bars."""

from __future__ import annotations

from weaver.progress import Stages


def test_stages_are_timed_and_bars_are_drawn_only_when_asked(capfd):
    for bars in (False, True):
        stages = Stages(bars=bars)
        with stages.stage("fusion"), stages.bar("fusion", 2) as move:
            move(1, 2)
            move(2, 2)
        assert stages.seconds["fusion"] > 0
        assert ("fusion" in capfd.readouterr().err) == bars
