"""How far a training is: a bar with the loss and the time that is left, or a caller's own function."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

__all__ = ["RunningMean", "reporter"]

_KEPT = 0.98  # of the running mean at each step: it looks back over about fifty


class RunningMean:
    """The mean of a series in which each value counts 0.98 times as much as the one after it."""

    def __init__(self) -> None:
        self._sum = self._weight = 0.0

    def __call__(self, value: float) -> float:
        """The mean with one more value."""
        self._sum = _KEPT * self._sum + value
        self._weight = _KEPT * self._weight + 1
        return self._sum / self._weight


@contextmanager
def reporter(progress: bool | Callable, total: int, label: str) -> Iterator[Callable]:
    """Yields a function to be told how much of `total` is done, and the loss of the step if it was one.

    `progress` is that of `train_concept`: True shows a bar where the output is a terminal. A function is called with
    (done, total), and with the running mean as `loss` where it has a parameter of that name.
    """
    mean = RunningMean()
    if callable(progress):
        told = _takes_loss(progress)

        def tell(done: int, loss: float | None = None) -> None:
            more = {"loss": mean(loss)} if told and loss is not None else {}
            progress(done, total, **more)

        yield tell
        return
    with tqdm(total=total, desc=label, disable=None if progress else True, leave=False) as bar:

        def move(done: int, loss: float | None = None) -> None:
            if loss is not None:
                bar.set_postfix_str(f"loss {mean(loss):.4f}", refresh=False)
            bar.update(done - bar.n)

        yield move


def _takes_loss(function: Callable) -> bool:
    try:
        return "loss" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # of a built-in, which tells nothing of itself
        return False
