"""`--seed S`: another seed than the job's."""

from __future__ import annotations

import argparse
from dataclasses import replace

__all__ = ["add_seed", "with_seed"]


def add_seed(parser: argparse.ArgumentParser) -> None:
    """Add the option `--seed`."""
    parser.add_argument("--seed", type=_seed, metavar="S", help="another seed than the job's")


def with_seed(job, seed: int | None):
    """The job with the seed of `--seed`, its template's too, if that was given."""
    return job if seed is None else replace(job, seed=seed, template=replace(job.template, seed=None))


def _seed(text: str) -> int:
    from weaver.job.fields import LARGEST

    if not text.isdecimal() or int(text) > LARGEST:
        raise argparse.ArgumentTypeError(f"must be a whole number, 0 to {LARGEST}, is {text!r}")
    return int(text)
