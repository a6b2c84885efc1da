"""`weaver evaluate`: the suite of prompts drawn by every arm, measured, and a report."""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from weaver.errors import WeaverError
from weaver.folder import check_folder

if TYPE_CHECKING:
    from weaver.evaluation.arms import Arm
    from weaver.evaluation.prompts import Case

__all__ = ["add_parser"]

_DESCRIPTION = (
    "Draw the suite's prompts on the embedded model by every arm, measure the pictures, and write results.json, "
    "results.csv and report.html. Interrupted, the same command goes on where it was."
)
_SHOWN = {"identity": "right identity", "leakage": "leakage"}
_RESULTS = ("results.json", "results.csv", "report.html", "sweep.json", "sweep.html")


def add_parser(commands, epilog: str) -> None:
    """Add the command to the subparsers `commands`."""
    parser = commands.add_parser(
        "evaluate",
        help="does it fuse: prompts, arms and measures on the embedded model, and a report",
        description=_DESCRIPTION,
        epilog=epilog,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of results and pictures")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--quick", action="store_true", help="four pictures by each arm in fewer steps: two minutes")
    kind.add_argument(
        "--sweep", action="store_true", help="search each arm's settings on other prompts and seeds: sweep.json"
    )
    parser.add_argument(
        "--arms",
        metavar="NAMES",
        help="some of the arms only (all; of --quick and --sweep those at their best)",
    )
    parser.add_argument("--processes", type=int, metavar="N", help="how many work at once (one a core)")
    parser.add_argument("--traceback", action="store_true", help="show where an unexpected error came from")
    parser.set_defaults(command=_evaluate, offline=False, ended="the same command goes on where it was")


def _evaluate(args: argparse.Namespace) -> int:
    with args.stages.step("starting"):
        from weaver.apart import cores
        from weaver.evaluation.arms import ARMS, PARTS, arm_of

        processes = args.processes
        if processes is not None and processes < 1:
            raise WeaverError(f"--processes: is {processes}, expected 1 or more")
        every = ARMS if args.quick or args.sweep else (*ARMS, *PARTS)
        chosen = every if args.arms is None else [arm_of(name.strip()) for name in args.arms.split(",")]
        check_folder(args.out, map(Path, _RESULTS))
        processes = processes or cores()
    return (_sweep if args.sweep else _table)(args, chosen, processes)


def _table(args: argparse.Namespace, chosen: Sequence[Arm], processes: int) -> int:
    from weaver.apart import PIPELINE, expect_calls
    from weaver.evaluation.arms import FULL
    from weaver.evaluation.suite import QUICK_STEPS, cases, quick_cases

    of = quick_cases() if args.quick else cases()
    arms, processes = {arm.name: arm.chosen for arm in chosen}, min(processes, len(of))
    _keep_larger(args.out, of, arms, QUICK_STEPS if args.quick else None)
    if processes > 1:
        expect_calls("weaver.evaluation.runner", PIPELINE)
    from weaver.evaluation.drawing import STEPS
    from weaver.evaluation.report import write_report
    from weaver.evaluation.results import Results, aims, summarise, write_results
    from weaver.evaluation.runner import expected_minutes, run_cases

    steps = QUICK_STEPS if args.quick else STEPS
    minutes = expected_minutes(len(of), list(arms.values()), processes, steps=steps)
    print(f"{len(of)} cases by {len(arms)} arms: about {_time(minutes)} with {_cores(processes)}", flush=True)
    records = run_cases(args.out, of, arms, processes=processes, steps=steps, stages=args.stages)
    with args.stages.step("writing the report"):
        results = Results(tuple(of), tuple(records), arms, steps)
        told = summarise(results)
        write_results(args.out, results, told, quick=args.quick)
        report = write_report(args.out, results, told, quick=args.quick)
    for arm in chosen:
        found = told["table"][arm.name]
        shares = "   ".join(f"{label} {found[key].value:6.1%}" for key, label in _SHOWN.items())
        print(f"({arm.letter}) {arm.name:16} {shares}")
    if FULL in arms and not args.quick:  # whose few pictures and steps tell nothing of aims
        missed = [aim.what for aim in aims(results, told) if aim.met is False]
        print(f"aims that the full method misses: {'; '.join(missed) or 'none'}")
    print(f"{report} shows it all")
    return 0


def _sweep(args: argparse.Namespace, chosen: Sequence[Arm], processes: int) -> int:
    from weaver.evaluation.arms import default_settings
    from weaver.evaluation.runner import expected_minutes
    from weaver.evaluation.suite import sweep_cases
    from weaver.evaluation.sweep import BUDGET, FINAL_SEEDS, FINALISTS, OBJECTIVE, sweep

    for arm in chosen:
        if not arm.swept:
            raise WeaverError(f"--arms: {arm.name} has the full method's settings: leave it out of a sweep")
    count, full, processes = len(sweep_cases()), default_settings(), min(processes, len(chosen))
    times = BUDGET + FINALISTS * FINAL_SEEDS
    minutes = expected_minutes(count, [arm.settings(full) for arm in chosen], processes, times=times)
    about = f"about {_time(minutes)} with {_cores(processes)}"
    print(f"{len(chosen)} arms by {BUDGET} settings by {count} cases: {about}; largest {OBJECTIVE}", flush=True)
    found = sweep(args.out, arms=chosen, processes=processes, stages=args.stages)
    for arm in chosen:
        best = found["arms"][arm.name]
        values = "  ".join(f"{name} {value:g}" for name, value in best["chosen"].items())
        print(f"({arm.letter}) {arm.name:16} {best['score'][0]:6.3f}   {values}")
    print(f"{args.out / 'sweep.html'} shows the curves, sweep.json has all that was tried")
    return 0


def _keep_larger(folder: Path, of: Sequence[Case], arms: Collection[str], steps: int | None) -> None:
    """Raise a `WeaverError` where a folder has results of more pictures or other arms than it is to get, or has cases
    of other steps than a quick look's."""
    for case in of if steps else ():
        path = folder / "cases" / case.name / "case.json"
        if path.is_file() and (there := _steps_of(path)) != steps:
            told = f"is of {there or 'other'} steps and would be drawn again in {steps}"
            raise WeaverError(f"--out: {path.parent} {told}: name another folder")
    try:
        there = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        others, more = set(there["settings"]) - set(arms), there["pictures"] > len(of)
    except (OSError, ValueError, KeyError, TypeError):  # nothing there that could be lost
        return
    if others or more:
        of = f"{there['pictures']} pictures by {len(there['settings'])} arms"
        raise WeaverError(f"--out: {folder} has results of {of}, which would be written over: name another folder")


def _steps_of(path: Path) -> int | None:
    """The steps that a case's record tells, None where it tells none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _time(minutes: float) -> str:
    return f"{minutes:.0f} minutes" if minutes >= 2 else f"{60 * minutes:.0f} seconds"


def _cores(processes: int) -> str:
    return f"{'one quiet core' if processes == 1 else f'{processes} quiet cores'} of an Intel Xeon 6"
