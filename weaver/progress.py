"""Stages with their seconds, and bars on a terminal; elsewhere, as in a log, a line a minute of what takes long."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

__all__ = ["Stages"]

_WIDTH = 34


class Stages:
    """Times each stage of a run and shows how far it is.

    Parameters
    ----------
    bars : whether to draw bars on the standard error; None draws them on a terminal only, and elsewhere says once a
        minute how far a bar that tells the time left is.

    `seconds` holds the time of every stage; `elapsed()` counts from when this was made.
    """

    def __init__(self, bars: bool | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._started = time.perf_counter()
        self._bars = sys.stderr.isatty() if bars is None else bars
        self._lines = bars is None and not self._bars

    def elapsed(self) -> float:
        """Seconds since this was made."""
        return time.perf_counter() - self._started

    @contextmanager
    def step(self, label: str) -> Iterator[None]:
        """A bar for one thing that can't tell how far it is."""
        with self.bar(label, 1) as move:
            yield
            move(1, 1)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage; a stage entered twice adds up."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    @contextmanager
    def bar(self, label: str, total: int | None = None, *, left: bool = False) -> Iterator[Callable]:
        """A bar named `label`; yields the callback (done, total, loss=None) that moves it, and shows a loss.

        With `left` it shows the time that is left, too.
        """
        bar = tqdm(total=total, **self._style(label, left))
        say = _Minutes(label) if left and self._lines else None

        def move(done: int, whole: int, loss: float | None = None) -> None:
            bar.total = whole
            if loss is not None:
                bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            bar.update(done - bar.n)
            if say:
                say(done, whole, loss)
            if done >= whole:
                bar.close()  # its clock stops, though others go on

        try:
            yield move
        finally:
            bar.close()

    @contextmanager
    def pipeline_bar(self, pipe, label: str) -> Iterator[None]:
        """Let a diffusers pipeline show its own bar in this style, and put its settings back afterwards."""
        before = dict(getattr(pipe, "_progress_bar_config", {}))
        pipe.set_progress_bar_config(**self._style(label))
        try:
            yield
        finally:
            pipe.set_progress_bar_config(**before)

    def _style(self, label: str, left: bool = False) -> dict:
        return {
            "desc": f"{label:<{_WIDTH}}",
            "disable": not self._bars,
            "file": sys.stderr,
            "bar_format": "{desc} {bar:24} {n_fmt:>4}/{total_fmt} {elapsed}" + "<{remaining}" * left + "{postfix}",
        }


class _Minutes:
    """Says on the standard error how far something is, once a minute."""

    def __init__(self, label: str) -> None:
        self._label, self._told = label, 0
        self._started = time.monotonic()

    def __call__(self, done: int, whole: int, loss: float | None) -> None:
        passed = (time.monotonic() - self._started) / 60
        if int(passed) == self._told or not 0 < done < whole:
            return
        self._told = int(passed)
        lost = "" if loss is None else f", loss {loss:.4f}"
        left = passed * (whole - done) / done
        print(
            f"{self._label}: {done} of {whole} in {passed:.0f} min, {left:.0f} left{lost}", file=sys.stderr, flush=True
        )
