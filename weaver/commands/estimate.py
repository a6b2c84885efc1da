"""`weaver estimate job.yaml` and `--max-memory`: what a run takes on the device, and a plan that fits."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from weaver.commands.cache import size
from weaver.sizes import format_bytes

__all__ = ["add_max_memory", "add_parser", "chosen_plan"]


def add_parser(commands, epilog: str) -> None:
    """Add the command to the subparsers `commands`."""
    parser = commands.add_parser(
        "estimate",
        help="what a run will take of the device's memory, stage by stage",
        description="What a run will take of the device's memory, from the configurations of its models alone.",
        epilog=epilog,
    )
    parser.add_argument("job", type=Path, help="job.yaml, or the manifest.json of an earlier run")
    add_max_memory(parser)
    parser.add_argument("--graphs", action="store_true", help="of a run with --graphs")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="another device than the job's; it need not be here")
    parser.add_argument("--json", action="store_true", help="the same as JSON, in bytes")
    parser.add_argument("--offline", action="store_true", help="take configurations from the local cache only")
    parser.add_argument("--traceback", action="store_true", help="show where an unexpected error came from")
    parser.set_defaults(command=_estimate)


def add_max_memory(parser: argparse.ArgumentParser) -> None:
    """Add the option `--max-memory`."""
    parser.add_argument(
        "--max-memory",
        type=size,
        metavar="SIZE",
        help="choose a way to run that takes no more of the device, such as 12GB",
    )


def chosen_plan(limit: int | None, job, *, graphs: bool, offline: bool, source: str):
    """The `MemoryPlan` that `--max-memory` means for a job, told in one line, and whether CUDA graphs fit beside it.

    The plan is None where the option was not given; then graphs are as they were asked for.
    """
    if limit is None:
        return None, graphs
    from weaver.memory.estimate import fit_job

    found = fit_job(job, limit, graphs=graphs, offline=offline, source=source)
    print(f"at most {format_bytes(found.nbytes)} on {found.device}, in {found.worst}: {found.way}")
    return found.plan, bool(found.graphs)


def _estimate(args: argparse.Namespace) -> int:
    with args.stages.step("reading the job"):
        from weaver.job.file import read_job

        job, _ = read_job(args.job)
        from weaver.models import quiet_libraries

        quiet_libraries()
    with args.stages.step("estimating"):
        from weaver.memory.estimate import estimate_job, fit_job
        from weaver.memory.table import table

        options = {"device": args.device, "graphs": args.graphs, "offline": args.offline, "source": str(args.job)}
        if args.max_memory is None:
            estimate = estimate_job(job, **options)
        else:
            estimate = fit_job(job, args.max_memory, **options)
    print(json.dumps(estimate.as_mapping(), indent=2) if args.json else table(estimate))
    return 0
