"""Is the full method above its closest rival? ``python -m benchmarks.embedded_rival --record``

The suite's table tells the two apart too little: on its 180 pictures an arm the interval of their difference has zero
in it. This draws the same prompts by these two arms alone, each at its best settings, with four further seeds, 240
pictures each. All of that was fixed before any of it was drawn: the prompts, the seeds, the two figures, the bootstrap
over prompts, and that the table's own pictures don't count here. Nothing is chosen by it.

It takes 50 minutes of two quiet cores; what is finished is not drawn again. Results go to ``outputs/rival``;
``--record`` keeps ``embedded_rival.json`` and writes ``docs/evaluation.md``'s table.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from benchmarks import records, tables
from benchmarks.embedded_evaluation import with_interval
from weaver.apart import cores
from weaver.embedded import CONCEPTS
from weaver.evaluation.arms import FULL, arm_of
from weaver.evaluation.bootstrap import difference, mean, resample
from weaver.evaluation.drawing import STEPS
from weaver.evaluation.prompts import Case
from weaver.evaluation.results import METRICS, Results, by_concepts, plain
from weaver.evaluation.runner import run_cases
from weaver.evaluation.suite import SEEDS, suite
from weaver.progress import Stages

RIVAL = "score-mix"
FURTHER_SEEDS = tuple(range(len(SEEDS), len(SEEDS) + 4))
FIGURES = ("identity", "leakage")
PAGE = tables.DOCS / "evaluation.md"
MARKS = "<!-- rival: written by python -m benchmarks.embedded_rival --record -->", "<!-- rival ends -->"


def further_cases() -> list[Case]:
    """The table's prompts with seeds that it does not have, seed by seed."""
    return [Case(prompt, seed) for seed in FURTHER_SEEDS for prompt in suite()]


def figures(results: Results) -> list[dict]:
    """A row a figure, of all pictures and by the number of concepts: how many animals there are and of how many it is
    true, either arm's mean, and the first's minus the second's with its interval, of which only that of all pictures
    was to be looked at.
    """
    drawn = resample(len(results.prompts))
    counts = sorted({len(case.prompt.concepts) for case in results.cases})
    parts = {"all": lambda case: True} | {str(count): by_concepts(count) for count in counts}
    rows = []
    for metric in (metric for metric in METRICS if metric.name in FIGURES):
        for part, keep in parts.items():
            full, rival = (results.sums(arm, metric, keep) for arm in (FULL, RIVAL))
            found = {FULL: mean(*full, drawn), RIVAL: mean(*rival, drawn), "difference": difference(full, rival, drawn)}
            counted = {"animals": int(full[1].sum()), "of": {FULL: int(full[0].sum()), RIVAL: int(rival[0].sum())}}
            rows.append({"figure": metric.name, "concepts": part} | counted | plain(found))
    return rows


def markdown(record: Mapping) -> str:
    """A record's rows as a table."""
    of = f"{record['prompts']} prompts, {record['pictures']} pictures an arm, 95 % intervals over prompts:"
    labels = {metric.name: metric.label for metric in METRICS}
    arms = [f"({arm_of(name).letter})" for name in (FULL, RIVAL)]
    head = ["", "concepts", *arms, f"{arms[0]} minus {arms[1]}, points"]
    lines = []
    for row in record["rows"]:
        of_arms = [f"{row[arm]['value']:.1%}" for arm in (FULL, RIVAL)]
        more = with_interval(row["difference"], "{:+z.1f}", 100)
        lines.append([labels[row["figure"]], row["concepts"], *of_arms, more])
    return f"{of}\n\n{tables.table(head, lines)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/rival"))
    parser.add_argument("--processes", type=int, default=cores(), help="how many work at once (one a core)")
    parser.add_argument("--record", action="store_true", help="keep the figures, and write the page's table")
    args = parser.parse_args()
    arms = {name: arm_of(name).chosen for name in (FULL, RIVAL)}
    of = further_cases()
    drawn = run_cases(args.out, of, arms, processes=args.processes, stages=Stages())
    results = Results(tuple(of), tuple(drawn), arms, STEPS)
    settings = {name: chosen.as_mapping() for name, chosen in arms.items()}
    told = {
        **records.made_with(CONCEPTS),
        "seeds": list(FURTHER_SEEDS),
        "prompts": len(results.prompts),
        "pictures": len(of),
        "settings": settings,
        "rows": figures(results),
    }
    print(markdown(told))
    for folder in [args.out] + [records.RESULTS] * args.record:
        records.write_record(folder, "embedded_rival", told)
    if args.record:
        tables.into_page(PAGE, MARKS, markdown(told))


if __name__ == "__main__":
    main()
