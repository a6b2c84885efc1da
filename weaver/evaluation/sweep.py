"""Which lambda, omega, windows, dilation and eta are best for each arm? By a search of one budget, on other prompts.

The objective was written down before this sweep: over all concepts of the sweep's pictures

    J = share with the right identity - share of animals that leak - max(0, 20 dB - background PSNR) / 20 dB + mask IoU

where background concepts count as animals do, and the last two parts are left out of arms without a template. (Mask
IoU, of the animals in picture and template, came in after two sweeps that did not have it: what they chose made animals
grow over their outlines, which none of the other parts sees.) Of settings with an equal J the one with the larger mean
margin (own similarity minus the next of base and others) is taken, and of those the one that was tried first, `ORIGIN`.

Every arm may try the same number of settings. Its search goes along one setting at a time, from `ORIGIN`: first over
all values of `GRID`, then between those beside the best, in turn, until the budget is spent. An arm with fewer settings
looks at each more closely. One concept of a search's pictures is a thirtieth of J, so that the best of many settings is
best by chance too: the first `FINALISTS` of an arm are drawn twice more, with other seeds, and the best by all of
these pictures together is chosen.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from html import escape
from pathlib import Path

import numpy as np

from weaver.apart import call_all
from weaver.embedded import concept_hashes
from weaver.evaluation.arms import ARMS, Arm, arm_of, default_settings
from weaver.evaluation.charts import curves
from weaver.evaluation.drawing import STEPS
from weaver.evaluation.prompts import Case
from weaver.evaluation.runner import alone, drawer_for, identity, made_with, measured, one_thread
from weaver.evaluation.suite import sweep_cases
from weaver.folder import whole_file
from weaver.progress import Stages
from weaver.version import __version__

__all__ = [
    "BUDGET",
    "FINALISTS",
    "FINAL_SEEDS",
    "GRID",
    "OBJECTIVE",
    "ORIGIN",
    "Tried",
    "finals",
    "objective",
    "page_of",
    "panels_of",
    "search",
    "sweep",
]

BUDGET, FINALISTS = 20, 4
FINAL_SEEDS = 2
"""How many more seeds the pictures of the finals have."""
OBJECTIVE = "right - leaked - max(0, 20 dB - background PSNR) / 20 dB + mask IoU; then the margin"
GRID: dict[str, tuple] = {
    "suppression": (0.0, 0.2, 0.8),
    "guidance": (1.5, 2.0, 3.0, 6.0),
    "resnet_window": (0.0, 0.5, 1.0),
    "attention_window": (0.3, 0.5, 1.0),
    "dilation": (0, 1, 2, 3),
    "eta": (0.0, 0.5),
}
ORIGIN = {
    "suppression": 0.0,
    "guidance": 3.0,
    "resnet_window": 0.5,
    "attention_window": 0.5,
    "dilation": 1,
    "eta": 0.5,
}
"""Where every search sets out: the defaults before the first sweep. What a sweep chooses does not move it."""
_LEAST_PSNR = 20.0
_NAMES = {"suppression": "lambda", "guidance": "omega", "resnet_window": "ResNet window"}
_NAMES |= {"attention_window": "attention window"}
Score = tuple[float, float]


@dataclass(frozen=True)
class Tried:
    """One setting that a search looked at.

    Parameters
    ----------
    values : of what was swept
    along : the setting that was varied; None for the start
    score : (J, mean margin)
    """

    values: Mapping[str, float]
    along: str | None
    score: Score


def objective(found: Sequence[Mapping]) -> Score:
    """(J, mean margin) of pictures by their measures, as the module's description has it."""
    concepts = [c for pictured in found for c in pictured["concepts"]]
    margins = [c["own"] - max(c["base"], c["others"]) for c in concepts if c["own"] is not None]
    psnrs = [pictured["background_psnr"] for pictured in found if pictured["background_psnr"] is not None]
    lacking = max(0.0, _LEAST_PSNR - float(np.mean(psnrs))) / _LEAST_PSNR if psnrs else 0.0
    outlines = [pictured["mask_iou"] for pictured in found if pictured["mask_iou"] is not None]
    right = float(np.mean([c["right"] for c in concepts]))
    leaked = float(np.mean([c["leaked"] for c in concepts if c["leaked"] is not None]))
    total = right - leaked - lacking + float(np.mean(outlines or [0.0]))
    return round(total, 6), round(float(np.mean(margins or [-2.0])), 6)


def search(
    start: Mapping[str, float], grid: Mapping[str, Sequence[float]], budget: int, look: Callable[[dict], Score]
) -> list[Tried]:
    """Look at up to `budget` settings along one of them at a time; the first is `start`.

    Parameters
    ----------
    start : a value for each setting of `grid`
    grid : for each setting the values of the first round; those of whole numbers stay whole
    look : gives the score of a setting, larger is better

    Returns what was looked at, in order; each once. It is over early where nothing is left between two values.
    """
    tried = [Tried(dict(start), None, look(dict(start)))]
    best, known = tried[0], {_key(start)}
    axes = {name: sorted({*grid[name], start[name]}) for name in grid}
    first = news = True
    while news:
        news = False
        for name in grid:
            axes[name] = axes[name] if first else _refined(axes[name], best.values[name])
            for values in [{**best.values, name: value} for value in axes[name]]:
                if _key(values) in known:
                    continue
                if len(tried) == budget:
                    return tried
                known.add(_key(values))
                tried.append(Tried(values, name, look(values)))
                news = True
            best = max(tried, key=lambda one: one.score)  # the first of equal ones
        first = False
    return tried


def finals(tried: Sequence[Tried], look: Callable[[dict], Score], count: int = FINALISTS) -> list[Tried]:
    """The best `count` of what was looked at, in the order of that, with the scores that `look` gives them now."""
    last = sorted(sorted(tried, key=lambda one: one.score, reverse=True)[:count], key=tried.index)
    return [replace(one, score=look(dict(one.values))) for one in last]


def sweep(
    folder: Path,
    *,
    budget: int = BUDGET,
    arms: Sequence[Arm] = ARMS,
    cases: Sequence[Case] | None = None,
    processes: int = 1,
    steps: int = STEPS,
    stages: Stages | None = None,
) -> dict:
    """Search every arm's settings; write what was tried and chosen, `sweep.json`, and its curves, `sweep.html`.

    Parameters
    ----------
    folder : keeps what was measured, too: interrupted, the same call goes on where it was
    budget : how many settings an arm may try
    cases : of the search; those of the finals are these and the same with the next `FINAL_SEEDS` seeds
    processes : how many arms are searched at once, each on one core

    Returns what was written.
    """
    stages, cases = stages or Stages(bars=False), list(sweep_cases() if cases is None else cases)
    jobs = [(folder / "tried" / f"{arm.name}.json", arm, cases, budget, steps) for arm in arms]
    total = (budget + min(budget, FINALISTS)) * len(arms)
    with alone(folder), stages.bar("sweeping", total, left=True) as move:
        found = call_all(_search_arm, jobs, move, total, processes)
    names = sorted({n for c in cases for n in (*c.prompt.concepts, c.prompt.background) if n})
    record = {"version": __version__, **made_with(), "concepts": concept_hashes(names)}
    record |= {"objective": OBJECTIVE, "budget": budget, "steps": steps, "cases": [c.name for c in cases]}
    record["prompts"] = [case.prompt.text_with_tokens for case in cases]
    record["finals"] = [case.name for case in _further(cases)]
    record["arms"] = {arm.name: _told(*of) for arm, of in zip(arms, found, strict=True)}
    with whole_file(folder / "sweep.json") as unfinished:
        unfinished.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    with whole_file(folder / "sweep.html") as unfinished:
        unfinished.write_text(page_of(record), encoding="utf-8")
    return record


def page_of(record: Mapping) -> str:
    """A page with the curves of every arm, from what `sweep` returns: along each setting, the others at their best."""
    style = "margin: 28px 32px; background: #fafaf8; color: #20242a; font: 15px/1.5 system-ui, sans-serif"
    parts = [
        f'<!doctype html><html lang=en><meta charset=utf-8><title>Concept Weaver: sweep</title><body style="{style}">',
        f"<h1>What was swept</h1><p>{len(record['cases'])} pictures a setting, {record['budget']} settings an arm, on "
        f"prompts and seeds that the table does not have. Objective: {escape(record['objective'])}. In colour: what "
        "was chosen. Points of one curve were looked at while the other settings were the best so far.</p>",
    ]
    for name, found in record["arms"].items():
        parts.append(f"<h2>({arm_of(name).letter}) {name}: {found['score'][0]:.3f}</h2>{curves(panels_of(found))}")
    return "".join([*parts, "</body></html>"])


def panels_of(found: Mapping) -> list[tuple[str, tuple, float]]:
    """What `weaver.evaluation.charts.curves` takes, from one arm of a `sweep.json`.

    A curve has what was looked at along its setting, and the best so far that this set out from. Settings are named as
    the paper names them.
    """
    tried, before = found["tried"], 1
    points = {name: {value: tried[0]["score"][0]} for name, value in tried[0]["values"].items()}
    for along, looked in itertools.groupby(tried[1:], key=lambda one: one["along"]):
        best = max(tried[:before], key=lambda one: tuple(one["score"]))
        these = [best, *looked]
        before += len(these) - 1
        points[along] |= {one["values"][along]: one["score"][0] for one in these}
    return [(_NAMES.get(name, name), tuple(points[name].items()), value) for name, value in found["chosen"].items()]


def _search_arm(file: Path, arm: Arm, cases: Sequence[Case], budget: int, steps: int, move) -> tuple[list, list]:
    """One arm's search and finals; templates are made once, and what each picture measures is kept in `file`.

    Equal settings are equal pictures: what another arm's file beside it has is not drawn again.
    """
    with one_thread():
        begun, drawers = arm.settings(default_settings()), [drawer_for(case, steps=steps) for case in cases]
        kept, looked = _kept(file), 0

        def look(values: dict) -> Score:
            nonlocal looked
            settings = replace(begun, **values)
            wanted = {identity(drawer.case, {"": settings}, steps): drawer for drawer in drawers}
            if not wanted.keys() <= kept.keys():
                kept.update((key, of) for beside in file.parent.glob("*.json") for key, of in _kept(beside).items())
            missing = [key for key in wanted if key not in kept]
            for key in missing:
                kept[key] = asdict(measured(wanted[key], settings, wanted[key].draw(settings)))
            if missing:
                with whole_file(file) as unfinished:
                    unfinished.write_text(json.dumps(kept) + "\n", encoding="utf-8")
            looked += 1
            move(looked, budget)
            return objective([kept[key] for key in wanted])

        start = {name: ORIGIN[name] for name in arm.swept}
        tried = search(start, {name: GRID[name] for name in start}, budget, look)
        drawers += [drawer_for(case, steps=steps) for case in _further(cases)]
        return tried, finals(tried, look)


def _further(cases: Sequence[Case]) -> list[Case]:
    """What the finals draw besides: the same prompts with other seeds."""
    return [replace(case, seed=case.seed + more) for more in range(1, 1 + FINAL_SEEDS) for case in cases]


def _kept(file: Path) -> dict[str, dict]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _told(tried: Sequence[Tried], last: Sequence[Tried]) -> dict:
    best = max(last, key=lambda one: one.score)  # the first of equal ones
    entries = [{"values": dict(t.values), "along": t.along, "score": list(t.score)} for t in tried]
    others = [{"values": dict(t.values), "score": list(t.score)} for t in last]
    return {"chosen": dict(best.values), "score": list(best.score), "tried": entries, "finals": others}


def _refined(values: Sequence[float], best: float) -> list[float]:
    """The values, and between the best and each of those beside it the middle; whole numbers stay as they are."""
    at = values.index(best)
    if all(isinstance(value, int) for value in values):
        return list(values)
    beside = [i for i in (at - 1, at) if 0 <= i < len(values) - 1]
    return sorted({*values, *((values[i] + values[i + 1]) / 2 for i in beside)})


def _key(values: Mapping[str, float]) -> tuple:
    return tuple(sorted(values.items()))
