"""Calls in fresh processes, several at once. Their progress comes back, and none outlives the process that waits."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import wait

__all__ = ["PIPELINE", "call_all", "call_apart", "cores", "end_with_parent", "expect_calls"]

_POLL_SECONDS = 0.2

PIPELINE = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion"
"""For `expect_calls`: what opens the embedded model, which is otherwise imported when it does."""

_expected = False  # whether there is a server that fresh processes come from


def expect_calls(*modules: str) -> None:
    """Import what calls will need once for all of them, in a process beside this one, which goes on at once.

    Processes are then forks of that one, which begin in no time, with what libraries have read of the environment by
    now. Without this, on Windows and macOS, and where no such server can be, each imports for itself. It is for
    commands: a process has one server, which keeps the modules.
    """
    global _expected
    if sys.platform != "linux" or _expected:
        return
    multiprocessing.set_forkserver_preload([*modules])
    with _as_server_needs():
        try:
            forkserver.ensure_running()
        except OSError:  # no socket: the folder of temporary files has too long a name, or none can be made
            return
    _expected = True


def call_apart(function: Callable, arguments: Sequence[tuple], moves: Sequence[Callable], processes: int) -> list:
    """`function(*arguments[i], move)` for every i, up to `processes` at once; what they return, in order.

    Parameters
    ----------
    function, arguments : what pickles, as do the results
    moves : one callback (done, total) a call, called here with what the call over there gives its own `move`

    When a call fails, or this process is interrupted, the others are ended before anything else happens.
    """
    context = multiprocessing.get_context("forkserver" if _expected else "spawn")
    news, others = context.Queue(), set(multiprocessing.active_children())
    with ProcessPoolExecutor(processes, context, _begin, (news, dict(os.environ))) as pool:
        try:
            futures = [pool.submit(_call, function, values, number) for number, values in enumerate(arguments)]
            waiting, told = set(futures), True
            while waiting or told:  # and what the last calls told before they ended
                told = _pass_on(news, moves)
                for future in [future for future in waiting if future.done()]:
                    waiting.remove(future)
                    future.result()  # raises what went wrong there
        except BaseException:
            for worker in set(multiprocessing.active_children()) - others:
                worker.terminate()
            raise
        return [future.result() for future in futures]


def call_all(
    function: Callable, arguments: Sequence[tuple], move: Callable[[int, int], None], total: int, processes: int
) -> list:
    """The same under one bar, and in this process, one after another, where `processes` or the calls are but one.

    Parameters
    ----------
    move : (done, total), called with the sum of what all calls have done
    total : of all calls together; what a call gives its own `move` as a total is not looked at
    """
    done = [0] * len(arguments)

    def mover(number: int) -> Callable[[int, int], None]:
        def moved(count: int, _: int) -> None:
            done[number] = count
            move(sum(done), total)

        return moved

    moves, processes = [mover(number) for number in range(len(arguments))], min(processes, len(arguments))
    if processes > 1:
        return call_apart(function, arguments, moves, processes)
    return [function(*values, moved) for values, moved in zip(arguments, moves, strict=True)]


def cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def end_with_parent() -> None:
    """Let this process end as soon as the one that started it is gone, which may have been killed outright."""
    parent = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: (wait([parent]), os._exit(1)), daemon=True).start()


@contextmanager
def _as_server_needs() -> Iterator[None]:
    """While a server is started: it imports from where this process does, and Ctrl-C is told here alone."""
    paths = {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path), "PYTHONSAFEPATH": "1"}
    before = {name: os.environ.get(name) for name in paths}
    handler = signal.getsignal(signal.SIGINT)  # None is one that could not be put back
    held = handler is not None and threading.current_thread() is threading.main_thread()
    if held:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ |= paths
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        if held:
            signal.signal(signal.SIGINT, handler)


def _pass_on(news, moves: Sequence[Callable]) -> bool:
    """Whether there was something to pass on, waited for a little."""
    try:
        number, done, total = news.get(timeout=_POLL_SECONDS)
    except queue.Empty:
        return False
    moves[number](done, total)
    return True


_news = None  # of a worker: the queue to the process that waits


def _begin(news, environment: dict[str, str]) -> None:
    global _news
    _news = news
    for name in os.environ.keys() - environment.keys():  # since the server began
        del os.environ[name]
    os.environ.update(environment)
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a worker without a traceback; the parent tells


def _call(function: Callable, values: tuple, number: int):
    return function(*values, lambda done, total: _news.put((number, done, total)))
