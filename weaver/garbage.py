"""Python's garbage collection, where it would come at a bad time."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["left_alone"]


@contextmanager
def left_alone() -> Iterator[None]:
    """Within the block what only garbage collection frees stays: memory that is counted there does not hang on when
    that comes.

    What is garbage before stays where it is, too, and nothing of it dies meanwhile. To collect it first would take half
    a second in a process that has these libraries loaded.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
