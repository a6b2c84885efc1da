"""Measuring in a process of its own: an error of the device leaves nothing there that could measure the rest."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from weaver_kernels.tuning import KernelConfig

__all__ = ["Measure", "MeasuringChild", "Running"]

Running = Callable[[KernelConfig], AbstractContextManager]  # entered while a configuration runs
Measure = Callable[[Sequence[KernelConfig], Running], Mapping[KernelConfig, float]]


class MeasuringChild:
    """A process that measures for this one, within the `with` block; another takes its place after an error.

    tell : takes a line about each configuration that made one
    """

    def __init__(self, tell: Callable[[str], None]):
        self._tell = tell
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None

    def __enter__(self) -> MeasuringChild:
        return self

    def __exit__(self, *error) -> None:
        self._end()

    def measure(self, measure: Measure, configs: Sequence[KernelConfig]) -> Mapping[KernelConfig, float]:
        """What `measure`, which must be one that can be pickled, says of configurations.

        One that raises, or ends the process, is told and left out; all others are measured again in a new process.
        """
        left = list(configs)
        while left:
            said = self._attempt(measure, left)
            if "times" in said:
                return said["times"]
            if said.get("running") is None:
                raise RuntimeError(f"no configuration was running: {said['failed']}")
            self._tell(f"  {tuple(said['running'])} {said['failed']}; without it again")
            left.remove(said["running"])
        return {}

    def _attempt(self, measure: Measure, configs: Sequence[KernelConfig]) -> dict:
        """The last of each kind of what the child said: what was `running`, how it `failed`, the `times`."""
        if self._process is None:
            self._begin()
        self._pipe.send((measure, configs))
        said: dict = {}
        with suppress(EOFError):  # it ended
            while not said.keys() & {"times", "failed"}:
                said.update([self._pipe.recv()])
        if "times" not in said:
            status = self._end()
            said.setdefault("failed", f"ended its process with status {status}")
        return said

    def _begin(self) -> None:
        fresh = multiprocessing.get_context("spawn")  # a fork could not use a GPU that its parent has
        self._pipe, other = fresh.Pipe()
        self._process = fresh.Process(target=_measure_what_comes, args=(other,), daemon=True)
        self._process.start()
        other.close()  # the child's is the last one: when it ends, so do its messages

    def _end(self) -> int | None:
        """Have the child end, where there is one; its exit status."""
        if self._process is None:
            return None
        self._pipe.close()
        self._process.join()
        status, self._process = self._process.exitcode, None
        return status


def _measure_what_comes(pipe: Connection) -> None:
    @contextmanager
    def running(config: KernelConfig) -> Iterator[None]:
        pipe.send(("running", config))
        yield
        pipe.send(("running", None))

    with suppress(EOFError):  # there is no more
        while True:
            measure, configs = pipe.recv()
            try:
                pipe.send(("times", measure(configs, running)))
            except Exception as failure:  # of whatever kind: this process ends
                pipe.send(("failed", f"{type(failure).__name__}: {failure}".splitlines()[0]))
                return
