"""From measured pictures to tables: `results.json`, `results.csv`, and the aims that were set beforehand."""

from __future__ import annotations

import csv
import json
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from weaver.embedded import concept_hashes
from weaver.embedded.catalog import CONCEPTS
from weaver.evaluation.arms import ARMS, FULL
from weaver.evaluation.bootstrap import Interval, difference, mean, resample
from weaver.evaluation.prompts import Case
from weaver.evaluation.runner import made_with
from weaver.evaluation.settings import Settings
from weaver.evaluation.suite import GROUPS
from weaver.folder import whole_file
from weaver.version import __version__

__all__ = ["METRICS", "Aim", "Metric", "Results", "aims", "plain", "summarise", "write_results"]

_RIVALS = ("averaged", "closed-form", "prompt-only", "score-mix")
_SIGNS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


@dataclass(frozen=True)
class Metric:
    """One column of the table.

    Parameters
    ----------
    name : of the metric
    label, what : for readers
    values : what one picture's measures (`weaver.evaluation.measures.Measures`, as a mapping) give it
    unit : "share" of 1, shown in per cent, "dB" or "cosine"
    more : whether more is better
    """

    name: str
    label: str
    what: str
    values: Callable[[Mapping], list[float]]
    unit: str = "share"
    more: bool = True


def _of_concepts(key: str, kind: str = "animal") -> Callable[[Mapping], list[float]]:
    return lambda found: [float(c[key]) for c in found["concepts"] if c["kind"] == kind and c[key] is not None]


def _of_picture(key: str) -> Callable[[Mapping], list[float]]:
    return lambda found: [found[key]] if found[key] is not None else []


METRICS = (
    Metric("identity", "right identity", "animals that stand in their region, nearest to their own drawing of all",
           _of_concepts("right")),
    Metric("leakage", "leakage", "animals whose identity is found where it does not belong", _of_concepts("leaked"),
           more=False),
    Metric("similarity", "similarity", "cosine of an animal's region to its concept's own drawing", _of_concepts("own"),
           unit="cosine"),
    Metric("present", "present", "animals in whose region an animal stands", _of_concepts("present")),
    Metric("ground", "right background", "background concepts that what the animals leave is nearest to",
           _of_concepts("right", "background")),
    Metric("psnr", "background, dB", "PSNR against the template outside of the dilated masks, backgrounds that are "
           "concepts left out", _of_picture("background_psnr"), unit="dB"),
    Metric("edges", "edge IoU", "of the picture's edges and the template's", _of_picture("edge_iou")),
    Metric("masks", "mask IoU", "of what is an animal in the picture and in the template", _of_picture("mask_iou")),
)  # fmt: skip


@dataclass(frozen=True)
class Aim:
    """What was to be reached, and what was.

    Parameters
    ----------
    what : for readers
    value : a share of 1, or dB; NaN where nothing was measured
    sign : how it is to compare with `bound`: ">=", "<=", ">" or "<"
    unit : "share" of 1, or "dB"
    """

    what: str
    value: float
    sign: str
    bound: float
    unit: str = "share"

    @property
    def met(self) -> bool | None:
        """None where nothing was measured."""
        return None if self.value != self.value else _SIGNS[self.sign](self.value, self.bound)


@dataclass(frozen=True, eq=False)
class Results:
    """Everything that a table is made of.

    Parameters
    ----------
    cases, records : as `run_cases` took and gave them
    arms : settings by the arm's name
    steps : of every picture
    """

    cases: tuple[Case, ...]
    records: tuple[Mapping, ...]
    arms: Mapping[str, Settings]
    steps: int

    def sums(self, arm: str, metric: Metric, keep: Callable[[Case], bool] = lambda case: True):
        """(sums, counts), each [P], of a metric by prompt, in the order of `prompts`."""
        names = self.prompts
        sums, counts = np.zeros(len(names)), np.zeros(len(names))
        for case, record in zip(self.cases, self.records, strict=True):
            values = metric.values(record["arms"][arm]) if keep(case) else []
            sums[names.index(case.prompt.name)] += sum(values)
            counts[names.index(case.prompt.name)] += len(values)
        return sums, counts

    @property
    def prompts(self) -> list[str]:
        """The prompts' names, each once."""
        return list(dict.fromkeys(case.prompt.name for case in self.cases))


def by_concepts(count: int) -> Callable[[Case], bool]:
    """The cases with so many animals that are concepts."""
    return lambda case: len(case.prompt.concepts) == count


def by_group(group: str) -> Callable[[Case], bool]:
    """The cases of a group."""
    return lambda case: case.prompt.group == group


def summarise(results: Results) -> dict:
    """Every arm's metrics with intervals, beside the full method in pairs, by number of concepts and by group."""
    drawn = resample(len(results.prompts))

    def of(arm: str, keep=lambda case: True) -> dict[str, Interval]:
        return {metric.name: mean(*results.sums(arm, metric, keep), drawn) for metric in METRICS}

    counts = sorted({len(case.prompt.concepts) for case in results.cases})
    groups = [group for group in GROUPS if any(case.prompt.group == group for case in results.cases)]
    told = {
        "table": {arm: of(arm) for arm in results.arms},
        "by_concepts": {str(n): {arm: of(arm, by_concepts(n)) for arm in results.arms} for n in counts},
        "by_group": {group: {arm: of(arm, by_group(group)) for arm in results.arms} for group in groups},
    }
    if FULL in results.arms:
        told["full_minus"] = {
            arm: {m.name: difference(results.sums(FULL, m), results.sums(arm, m), drawn) for m in METRICS}
            for arm in results.arms
            if arm != FULL
        }
    return told


def aims(results: Results, told: Mapping) -> list[Aim]:
    """What the full method was to reach on this suite; set before anything was measured."""
    if FULL not in results.arms:
        return []
    nothing = Interval(float("nan"), float("nan"), float("nan"), 0)

    def of(count: int) -> float:
        return told["by_concepts"].get(str(count), {}).get(FULL, {}).get("identity", nothing).value

    found = [
        Aim(f"right identity, {word} concepts", of(n), ">=", bound)
        for n, word, bound in ((2, "two", 0.9), (3, "three", 0.85), (4, "four", 0.85))
    ]
    found.append(Aim("leakage", told["table"][FULL]["leakage"].value, "<=", 0.03))
    found.append(Aim("background PSNR", told["table"][FULL]["psnr"].value, ">=", 20.0, "dB"))
    for arm in (arm for arm in ARMS if arm.name in _RIVALS and arm.name in results.arms):
        gain, leak = (told["full_minus"][arm.name][name] for name in ("identity", "leakage"))
        found.append(Aim(f"right identity above ({arm.letter}), lower end of the interval", gain.low, ">", 0.0))
        found.append(Aim(f"leakage below ({arm.letter}), upper end of the interval", leak.high, "<", 0.0))
    return found


def write_results(folder: Path, results: Results, told: Mapping, *, quick: bool = False) -> None:
    """Write `results.json`, all that the report shows, and `results.csv`, a row for each concept of each picture."""
    names = sorted({n for c in results.cases for n in (*c.prompt.concepts, c.prompt.background) if n})
    record = {
        "version": __version__,
        **made_with(),
        "concepts": concept_hashes(names),
        "quick": quick,
        "steps": results.steps,
        "settings": {arm: settings.as_mapping() for arm, settings in results.arms.items()},
        "prompts": len(results.prompts),
        "pictures": len(results.cases),
        "templates_drawn": sum(record["template"] == "drawn" for record in results.records),
        **{key: plain(value) for key, value in told.items()},
        "aims": [{"what": a.what, "value": _number(a.value), "aim": f"{a.sign} {a.bound:g}", "met": a.met}
                 for a in aims(results, told)],
    }  # fmt: skip
    with whole_file(folder / "results.json") as partial:
        partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    with whole_file(folder / "results.csv") as partial, partial.open("w", newline="", encoding="utf-8") as file:
        rows = list(_rows(results))
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def _rows(results: Results) -> Sequence[dict]:
    for case, record in zip(results.cases, results.records, strict=True):
        for arm, found in record["arms"].items():
            for place, concept in enumerate(found["concepts"]):
                word = CONCEPTS[concept["name"]].word
                yield {
                    "prompt": case.prompt.name,
                    "group": case.prompt.group,
                    "seed": case.seed,
                    "concepts": len(case.prompt.concepts),
                    "template": record["template"],
                    "arm": arm,
                    "place": place,
                    "concept": concept["name"],
                    "word": word,
                    **{key: _cell(concept[key]) for key in ("present", "right", "leaked", "own", "base", "others")},
                    **{key: _cell(found[key]) for key in ("background_psnr", "edge_iou", "mask_iou")},
                }


def _cell(value) -> str:
    if value is None:
        return ""
    return str(int(value)) if isinstance(value, bool) else f"{value:.4f}"


def plain(value):
    """Intervals, in mappings or alone, as JSON has them: rounded to four digits, None for NaN."""
    if isinstance(value, Interval):
        return {name: _number(x) for name, x in value.as_mapping().items()}
    return {key: plain(x) for key, x in value.items()}


def _number(value):
    return round(value, 4) if isinstance(value, float) and np.isfinite(value) else value if value == value else None
