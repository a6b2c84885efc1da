"""The command line: `weaver demo`, `weaver run job.yaml`, `weaver masks job.yaml`, `weaver train`,
`weaver estimate job.yaml`, `weaver inspect FILE`, `weaver bank`, `weaver cache`, `weaver evaluate`.

Exit codes: 0 done; 2 something that was given is wrong, told in one line; 1 anything unexpected; 130 interrupted;
143 and 129 ended by the signals TERM and HUP.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from weaver.apart import PIPELINE, expect_calls
from weaver.commands.bank import add_parser as add_bank_parser
from weaver.commands.cache import CHOICES, chosen_cache
from weaver.commands.cache import add_parser as add_cache_parser
from weaver.commands.estimate import add_max_memory, chosen_plan
from weaver.commands.estimate import add_parser as add_estimate_parser
from weaver.commands.evaluate import add_parser as add_evaluate_parser
from weaver.commands.inspect import add_parser as add_inspect_parser
from weaver.commands.masks import add_masks_option, with_masks
from weaver.commands.masks import add_parser as add_masks_parser
from weaver.commands.reading import add_on_unused, tell_versions
from weaver.commands.seeds import add_seed, with_seed
from weaver.commands.train import add_parser as add_train_parser
from weaver.errors import WeaverError
from weaver.progress import Stages
from weaver.version import __version__

if TYPE_CHECKING:
    from weaver.job import Job

__all__ = ["main"]

_EPILOG = (
    "exit codes: 0 done; 2 bad input, told in one line; 1 unexpected error; 129 hung up, 130 interrupted, "
    "143 terminated"
)
_COMMANDS = "demo | run | masks | train | estimate | inspect | bank | cache | evaluate"
_RESUMED = "no results were written; the same command goes on from its trainings' checkpoints, if there are any"
_ENDING_SIGNALS = ("SIGTERM", "SIGHUP")


class _Ended(BaseException):
    """The process was asked to end by a signal."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    for library in ("DIFFUSERS", "TRANSFORMERS"):  # read when it is imported, where it has notices already
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    if args.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    args.stages = Stages()
    try:
        with _ending_by_exception(), _warnings_in_one_line():
            return args.command(args)
    except WeaverError as error:
        return _fail(str(error), 2, args)
    except KeyboardInterrupt:
        return _fail(f"interrupted; {_ended(args)}", 130, args)
    except _Ended as error:
        return _fail(f"terminated; {_ended(args)}", 128 + error.args[0], args)
    except Exception as error:
        hint = "" if args.traceback else " (--traceback shows where)"
        return _fail(f"unexpected {type(error).__name__}: {error}{hint}", 1, args)


def _ended(args: argparse.Namespace) -> str:
    """What there is to be known of a command that was ended before its time."""
    return getattr(args, "ended", "nothing was written")


@contextmanager
def _ending_by_exception() -> Iterator[None]:
    """Let the signals that end a process raise `_Ended`, so that a run cleans up as after Ctrl-C; the next one ends it.

    A signal that is ignored stays so, and only the main thread can do this.
    """

    def end(number, frame):
        signal.signal(number, signal.SIG_DFL)
        raise _Ended(number)

    numbers = [getattr(signal, name) for name in _ENDING_SIGNALS if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    numbers = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """This package's own warnings are told as its errors are; those of libraries as ever."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def tell(message, category, *rest, **options):
            if category.__module__.startswith("weaver."):
                print(f"weaver: {message}", file=sys.stderr)
            else:
                show(message, category, *rest, **options)

        warnings.showwarning = tell
        yield


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="weaver",
        description="Several personalised concepts in one picture, each in its place.",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"weaver {__version__}")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(title="commands", metavar=_COMMANDS)

    demo = commands.add_parser("demo", help="all five stages on the embedded model; needs no network", epilog=_EPILOG)
    demo.add_argument("--quick", action="store_true", help="take the concept files that ship instead of training them")
    demo.add_argument("--concepts", metavar="N|NAMES", help="how many animals, or which: tuxedo-cat,pug")
    demo.add_argument("--background", metavar="NAME", help="which background concept, or 'none'")
    _common(demo, "outputs/demo", cache="features")
    demo.set_defaults(command=_demo, on_unused="warn", ended=_RESUMED)

    run = commands.add_parser("run", help="run a job file, or a manifest again", epilog=_EPILOG)
    run.add_argument("job", type=Path, help="job.yaml, or the manifest.json of an earlier run")
    add_masks_option(run)
    add_on_unused(run)
    _common(run, None, cache="latents")
    run.set_defaults(command=_run, ended=_RESUMED)
    add_masks_parser(commands, _EPILOG)
    add_estimate_parser(commands, _EPILOG)
    add_train_parser(commands, _EPILOG)
    add_inspect_parser(commands, _EPILOG)
    add_bank_parser(commands, _EPILOG)
    add_cache_parser(commands, _EPILOG)
    add_evaluate_parser(commands, _EPILOG)
    return parser


class _Parser(argparse.ArgumentParser):
    """Tells what is wrong in one line; its subcommands' parsers are of the same class."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"weaver: {message}; `{self.prog} --help` shows what there is\n")


def _common(parser: argparse.ArgumentParser, out: str | None, *, cache: str) -> None:
    where = out or "outputs/ and the job's name, for a manifest its folder's with -again"
    default = Path(out) if out else None
    parser.add_argument("--out", type=Path, default=default, metavar="DIR", help=f"folder of the results ({where})")
    add_seed(parser)
    parser.add_argument("--offline", action="store_true", help="take models from the local cache only")
    parser.add_argument(
        "--cache", choices=CHOICES, default=cache, help=f"what to keep of a template for later runs ({cache})"
    )
    add_max_memory(parser)
    parser.add_argument("--graphs", action="store_true", help="on a GPU: replay steps from CUDA graphs")
    parser.add_argument("--traceback", action="store_true", help="show where an unexpected error came from")


def _demo(args: argparse.Namespace) -> int:
    def job():
        from weaver.demo import demo_job, with_shipped_concepts

        job = demo_job(args.concepts, args.background)
        return (with_shipped_concepts(job) if args.quick else job), None

    return _execute(job, "demo", args)


def _run(args: argparse.Namespace) -> int:
    def job():
        from weaver.job.file import read_job

        return with_masks(*read_job(args.job), args.masks)

    return _execute(job, str(args.job), args)


def _execute(read: Callable, source: str, args: argparse.Namespace) -> int:
    """Run the job that `read` gives, with the manifest it comes from or None."""
    with args.stages.step("starting"):
        job, manifest = read()
        if _trains_apart(job):
            expect_calls("weaver.concepts.bank", PIPELINE)
        from weaver.models import quiet_libraries

        quiet_libraries()
        from weaver.run import run_job
    tell_versions(manifest)
    out = args.out
    if manifest:  # beside what it is to be compared with
        out = out or Path("outputs") / f"{args.job.resolve().parent.name}-again"
    job = with_seed(job, args.seed)
    memory, graphs = chosen_plan(args.max_memory, job, graphs=args.graphs, offline=args.offline, source=source)
    run = run_job(
        job,
        out or Path("outputs") / args.job.stem,
        source=source,
        offline=args.offline,
        processes=None,
        cache=chosen_cache(args.cache),
        memory=memory,
        graphs=graphs,
        on_unused=args.on_unused,
        stages=args.stages,
        manifest=manifest,
    )
    for name, scores in run.report["concepts"].items():
        if scores["own"] is not None:
            told = "   ".join(f"{key} {scores[key]:6.3f}" for key in ("own", "base", "others"))
            print(f"{name:20} {told}" + "   does not show" * (scores["own"] <= max(scores["base"], scores["others"])))
    if cached := run.report.get("cached"):
        print(f"{' and '.join(cached)} of the template taken from the cache (--cache off computes them)")
    print(f"{run.folder}: sheet.png shows it all ({run.report['total_seconds']:.0f} s)")
    return 0


def _trains_apart(job: Job) -> bool:
    """Whether a job's concepts will be trained at once, in processes of their own: what `worker_count` will say of its
    model, before that is loaded."""
    if job.model != "embedded" or sum(spec.train is not None for spec in job.everyone) < 2:
        return False
    if job.device == "auto":
        import torch

        return not torch.cuda.is_available()
    return job.device == "cpu"


def _fail(message: str, code: int, args: argparse.Namespace) -> int:
    if code == 1 and args.traceback:
        traceback.print_exc()
    print(f"weaver: {' '.join(message.split())}", file=sys.stderr)
    return code
