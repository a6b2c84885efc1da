"""Measuring in a process of its own: an error of the device leaves nothing there that could measure the rest."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from multiprocessing.connection import Connection

from weaver_kernels.tuning import KernelConfig

__all__ = ["Measure", "Running", "measure_in_child"]

Running = Callable[[KernelConfig], AbstractContextManager]  # entered while a configuration runs
Measure = Callable[[Sequence[KernelConfig], Running], Mapping[KernelConfig, float]]


def measure_in_child(
    measure: Measure, configs: Sequence[KernelConfig], tell: Callable[[str], None]
) -> Mapping[KernelConfig, float]:
    """What `measure`, which must be one that can be pickled, says of configurations in a process of its own.

    A configuration that raises, or ends the process, is told and left out; all others are measured again in a new one.
    """
    left = list(configs)
    while left:
        said = _attempt(measure, left)
        if "times" in said:
            return said["times"]
        if said.get("running") is None:
            raise RuntimeError(f"no configuration was running: {said['failed']}")
        tell(f"  {tuple(said['running'])} {said['failed']}; without it again")
        left.remove(said["running"])
    return {}


def _attempt(measure: Measure, configs: Sequence[KernelConfig]) -> dict:
    """The last of each kind of what a child said: what was `running`, how it `failed`, the `times`."""
    fresh = multiprocessing.get_context("spawn")  # a fork could not use a GPU that its parent has
    receiver, sender = fresh.Pipe(duplex=False)
    child = fresh.Process(target=_child, args=(measure, configs, sender), daemon=True)
    child.start()
    sender.close()  # the child's is the last one: when it ends, so do its messages
    said: dict = {}
    with receiver, suppress(EOFError):
        while True:
            said.update([receiver.recv()])
    child.join()
    return {"failed": f"ended its process with status {child.exitcode}", **said}


def _child(measure: Measure, configs: Sequence[KernelConfig], sender: Connection) -> None:
    @contextmanager
    def running(config: KernelConfig) -> Iterator[None]:
        sender.send(("running", config))
        yield
        sender.send(("running", None))

    try:
        sender.send(("times", measure(configs, running)))
    except Exception as failure:  # of whatever kind: this process ends
        sender.send(("failed", f"{type(failure).__name__}: {failure}".splitlines()[0]))
