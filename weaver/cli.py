"""The command line: `weaver demo`, `weaver run job.yaml`.

Exit codes: 0 done; 2 something that was given is wrong, told in one line; 1 anything unexpected; 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from weaver.errors import WeaverError
from weaver.progress import Stages
from weaver.version import __version__

__all__ = ["main"]

_EPILOG = """exit codes: 0 done; 2 bad input, told in one line; 1 unexpected error; 130 interrupted"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if args.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    args.stages = Stages()
    try:
        return args.command(args)
    except WeaverError as error:
        return _fail(str(error), 2, args)
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was written", 130, args)
    except Exception as error:
        hint = "" if args.traceback else " (--traceback shows where)"
        return _fail(f"unexpected {type(error).__name__}: {error}{hint}", 1, args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="weaver",
        description="Several personalised concepts in one picture, each in its place.",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"weaver {__version__}")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(title="commands", metavar="demo | run")

    demo = commands.add_parser("demo", help="all five stages on the embedded model; needs no network", epilog=_EPILOG)
    demo.add_argument("--quick", action="store_true", help="take the concept files that ship instead of training them")
    demo.add_argument("--concepts", metavar="N|NAMES", help="how many animals, or which: tuxedo-cat,pug")
    demo.add_argument("--background", metavar="NAME", help="which background concept, or 'none'")
    _common(demo, "outputs/demo")
    demo.set_defaults(command=_demo)

    run = commands.add_parser("run", help="run a job file, or a manifest again", epilog=_EPILOG)
    run.add_argument("job", type=Path, help="job.yaml, or the manifest.json of an earlier run")
    _common(run, None)
    run.set_defaults(command=_run)
    return parser


def _common(parser: argparse.ArgumentParser, out: str | None) -> None:
    where = out or "outputs/ and the job's name, for a manifest its folder's with -again"
    default = Path(out) if out else None
    parser.add_argument("--out", type=Path, default=default, metavar="DIR", help=f"folder of the results ({where})")
    parser.add_argument("--seed", type=_seed, metavar="S", help="another seed than the job's")
    parser.add_argument("--offline", action="store_true", help="take models from the local cache only")
    parser.add_argument("--traceback", action="store_true", help="show where an unexpected error came from")


def _demo(args: argparse.Namespace) -> int:
    from weaver.demo import demo_job, with_shipped_concepts

    job = demo_job(args.concepts, args.background)
    return _execute(with_shipped_concepts(job) if args.quick else job, args.out, "demo", args)


def _run(args: argparse.Namespace) -> int:
    from weaver.jobfile import load_job, read_manifest
    from weaver.manifest import changed_versions

    job, manifest, name = load_job(args.job), read_manifest(args.job), args.job.stem
    if manifest:
        if changed := changed_versions(manifest):
            print(f"weaver: the manifest was made with other versions: {', '.join(changed)}", file=sys.stderr)
        name = f"{args.job.resolve().parent.name}-again"  # beside what it is to be compared with
    return _execute(job, args.out or Path("outputs") / name, str(args.job), args, manifest)


def _execute(job, out: Path, source: str, args: argparse.Namespace, manifest: dict | None = None) -> int:
    if args.seed is not None:
        job = replace(job, seed=args.seed, template=replace(job.template, seed=None))
    with args.stages.step("starting"):
        from weaver.models import quiet_libraries

        quiet_libraries()
        from weaver.run import run_job
    run = run_job(job, out, source=source, offline=args.offline, stages=args.stages, manifest=manifest)
    for name, scores in run.report["concepts"].items():
        if scores["own"] is not None:
            print(f"{name:20} own {scores['own']:6.3f}   base {scores['base']:6.3f}   others {scores['others']:6.3f}")
    print(f"{run.folder}: sheet.png shows it all ({run.report['total_seconds']:.0f} s)")
    return 0


def _seed(text: str) -> int:
    from weaver.fields import LARGEST

    value = int(text)
    if not 0 <= value <= LARGEST:
        raise argparse.ArgumentTypeError(f"must be 0 to {LARGEST}, is {value}")
    return value


def _fail(message: str, code: int, args: argparse.Namespace) -> int:
    if code == 1 and args.traceback:
        traceback.print_exc()
    print(f"weaver: {' '.join(message.split())}", file=sys.stderr)
    return code
