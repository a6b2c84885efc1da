"""`report.html`: tables, intervals and every picture in one file that needs nothing else, the worst cases first."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from functools import lru_cache
from html import escape
from pathlib import Path

from PIL import Image

from weaver.embedded import concept_images, model_hash
from weaver.embedded.catalog import CONCEPTS
from weaver.evaluation.arms import ARMS, FULL, PARTS, Arm, arm_of
from weaver.evaluation.bootstrap import Interval
from weaver.evaluation.charts import dots
from weaver.evaluation.prompts import Case
from weaver.evaluation.results import METRICS, Aim, Metric, Results, aims
from weaver.evaluation.runner import picture_path, template_path
from weaver.evaluation.settings import Settings
from weaver.evaluation.suite import GROUPS
from weaver.folder import whole_file
from weaver.pictures import open_rgb
from weaver.version import __version__

__all__ = ["write_report", "worst_first"]

_QUALITY = 88  # of WebP: a third of PNG's bytes, and nothing to be seen of it
_FORMS = {"share": "{:z.1%}", "dB": "{:z.1f}", "cosine": "{:z.2f}"}
_POINTS = {"share": (100, 1), "dB": (1, 1), "cosine": (1, 2)}  # what a difference is multiplied by, its digits
_STYLE = """
:root { color-scheme: light }
body { margin: 0 auto; padding: 28px 32px 80px; max-width: 1500px; background: #fafaf8; color: #20242a;
  font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif }
h1 { font-size: 28px; margin: 0 } h2 { font-size: 20px; margin: 44px 0 8px } p { max-width: 78em }
small, .pale { color: #5a626a } .scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: 14px } th { text-align: left; font-weight: 600; vertical-align: bottom }
td, th { padding: 4px 14px 4px 0; border-bottom: 1px solid #e0e3dd; white-space: nowrap }
td.what { white-space: normal; min-width: 15em } td small { display: block; font-size: 11.5px; line-height: 1.2 }
tr.full td { background: #fbeee9; font-weight: 600 } .yes { color: #2c7a3f } .no { color: #b3402a }
.unseen { text-decoration: line-through }
.chart svg { width: 100%; max-width: 1080px; height: auto }
.cards, .case div.pictures { display: flex; flex-wrap: wrap; gap: 10px }
figure { margin: 0; font-size: 12px; line-height: 1.3; width: 112px }
figure img { width: 112px; height: 112px; display: block; border-radius: 3px; margin-bottom: 4px }
figure.full img { outline: 3px solid #b3402a }
.case { border-top: 1px solid #e0e3dd; padding: 12px 0; content-visibility: auto; contain-intrinsic-size: auto 190px }
.case h3 { font-size: 15px; margin: 0 0 6px; font-weight: 600 } .filter label { margin-right: 14px }
"""
_SCRIPT = """
const boxes = [...document.querySelectorAll('.filter input')];
const show = () => {
  const groups = new Set(boxes.filter(b => b.checked && b.name === 'group').map(b => b.value));
  const failed = document.getElementById('failed').checked;
  let shown = 0;
  for (const c of document.querySelectorAll('.case')) {
    c.hidden = !groups.has(c.dataset.group) || (failed && c.dataset.failed === '0');
    shown += !c.hidden;
  }
  document.getElementById('shown').textContent = shown;
};
boxes.forEach(b => b.addEventListener('change', show));
show();
"""


def write_report(folder: Path, results: Results, told: Mapping, *, quick: bool = False) -> Path:
    """Write `report.html` into the folder that the pictures are in; returns its path.

    `told` is what `summarise` makes of the results.
    """
    arms, changed = ([arm for arm in of if arm.name in results.arms] for of in (ARMS, PARTS))
    drawn = sum(record["template"] == "drawn" for record in results.records)
    kind = "quick look, a few prompts" if quick else "whole suite"
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        '<meta name=viewport content="width=device-width"><title>Concept Weaver: evaluation</title>',
        f"<style>{_STYLE}</style><h1>Does it fuse, and what does each part give?</h1>",
        f"<p>Concept Weaver {__version__}, {kind}: {len(results.prompts)} prompts, {len(results.cases)} pictures an "
        f"arm of {results.steps} steps, on the embedded model {model_hash()[:12]}. In {drawn} of them the world drew "
        "the template, in the others the model. Intervals are of 95 %, by the bootstrap over prompts. "
        "<small>All of it is made by <code>weaver evaluate</code>.</small></p>",
        "<h2>Arms</h2>",
        _table(arms, told["table"], results.arms),
        _definitions(),
        _chart(arms, told["table"]),
        _paired(arms, told, "The full method minus each arm"),
        _parts(changed, told, results.arms),
        "" if quick else _aims(aims(results, told)),
        _split("By number of concepts", arms, told["by_concepts"]),
        _split("By group", arms, told["by_group"]),
        f"<p><small>{'; '.join(f'<b>{group}</b>: {GROUPS[group]}' for group in told['by_group'])}.</small></p>",
        _concepts(results),
        _pictures(folder, results, [*arms, *changed]),
        f"<script>{_SCRIPT}</script></html>",
    ]
    path = folder / "report.html"
    with whole_file(path) as partial:
        partial.write_text("\n".join(parts), encoding="utf-8")
    return path


def worst_first(results: Results, arm: str) -> list[tuple[float, Case, Mapping]]:
    """Every case with how far it fails in an arm: 1 for each wrong identity and each leak, then by the least margin."""
    found = []
    for case, record in zip(results.cases, results.records, strict=True):
        concepts = record["arms"][arm]["concepts"]
        margins = [c["own"] - max(c["base"], c["others"]) for c in concepts if c["own"] is not None]
        faults = sum((not c["right"]) + bool(c["leaked"]) for c in concepts)
        found.append((faults, -min(margins, default=-2.0), case, record))
    found.sort(key=lambda entry: (-entry[0], -entry[1], entry[2].name))
    return [(faults, case, record) for faults, _, case, record in found]


def _figure(found: Interval, metric: Metric) -> str:
    if found.value != found.value:
        return "<td>–"
    value, low, high = (_FORMS[metric.unit].format(x) for x in (found.value, found.low, found.high))
    return f"<td>{value}<small class=pale>{low} to {high}</small>"


def _row(arm: Arm, cells: str) -> str:
    full = " class=full" if arm.name == FULL else ""
    return f"<tr{full}><td>({arm.letter}) {arm.name}{cells}"


def _table(arms: Sequence[Arm], of: Mapping, settings: Mapping[str, Settings]) -> str:
    head = "".join(f"<th>{metric.label}" for metric in METRICS)
    rows = []
    for arm in arms:
        cells = "".join(_figure(of[arm.name][m.name], m) for m in METRICS)
        what = f"<td class=what>{escape(arm.what)}<small class=pale>{settings[arm.name].swept_values}</small>"
        rows.append(_row(arm, cells + what))
    return f"<div class=scroll><table><tr><th>arm{head}<th>what it is{''.join(rows)}</table></div>"


def _definitions() -> str:
    lines = "; ".join(f"<b>{metric.label}</b>: {escape(metric.what)}" for metric in METRICS)
    return (
        f"<p><small>{lines}. Identity is told by the classifier of the embedded world, of all drawings of all animals; "
        "with a template in the template's masks, without one wherever the segmenter finds an animal, and then any of "
        "them counts that shows the concept. Under each arm: the settings that the sweep chose for it.</small></p>"
    )


def _chart(arms: Sequence[Arm], of: Mapping) -> str:
    names = {arm.name: f"({arm.letter}) {arm.name}" for arm in arms}
    panels = [
        (metric.label, [of[name][metric.name] for name in names])
        for metric in METRICS
        if metric.name in ("identity", "leakage", "edges")
    ]
    return f"<div class=chart>{dots(list(names.values()), panels, marked=names.get(FULL, ''))}</div>"


def _parts(changed: Sequence[Arm], told: Mapping, settings: Mapping[str, Settings]) -> str:
    if not changed:
        return ""
    return (
        "<h2>One part of the full method changed, all else as it is</h2>"
        f"{_table(changed, told['table'], settings)}{_paired(changed, told, 'The full method minus each of these')}"
    )


def _paired(arms: Sequence[Arm], told: Mapping, title: str) -> str:
    if "full_minus" not in told:
        return ""
    others = [arm for arm in arms if arm.name != FULL]
    head = "".join(f"<th>{metric.label}" for metric in METRICS)
    rows = []
    for arm in others:
        cells = "".join(_gain(told["full_minus"][arm.name][m.name], m) for m in METRICS)
        rows.append(_row(arm, cells))
    return (
        f"<h2>{title}</h2><p><small>On the same prompts and seeds, in points of per cent, dB, or "
        "of a cosine. Green: better beyond the interval; red: worse.</small></p>"
        f"<div class=scroll><table><tr><th>arm{head}{''.join(rows)}</table></div>"
    )


def _gain(found: Interval, metric: Metric) -> str:
    if found.value != found.value:
        return "<td>–"
    scale, digits = _POINTS[metric.unit]
    value, low, high = (scale * x for x in (found.value, found.low, found.high))
    better = low > 0 if metric.more else high < 0
    worse = high < 0 if metric.more else low > 0
    mark = " class=yes" if better else " class=no" if worse else ""
    return f"<td{mark}>{value:+z.{digits}f}<small class=pale>{low:+z.{digits}f} to {high:+z.{digits}f}</small>"


def _aims(found: Sequence[Aim]) -> str:
    if not found:
        return ""
    verdict = {True: "<td class=yes>reached", False: "<td class=no>missed", None: "<td class=pale>not measured"}
    rows = "".join(
        f"<tr><td>{escape(a.what)}<td>{escape(a.sign)} {_aimed(a, a.bound)}"
        f"<td>{'–' if a.met is None else _aimed(a, a.value)}"
        f"{verdict[a.met]}"
        for a in found
    )
    return f"<h2>Aims, set beforehand</h2><table><tr><th>what<th>aim<th>full method<th>{rows}</table>"


def _aimed(aim: Aim, value: float) -> str:
    return _FORMS[aim.unit].format(value) + (" dB" if aim.unit == "dB" else "")


def _split(title: str, arms: Sequence[Arm], columns: Mapping[str, Mapping]) -> str:
    metrics = [metric for metric in METRICS if metric.name in ("identity", "leakage")]
    found = []
    for metric in metrics:
        head = "".join(f"<th>{escape(name)}" for name in columns)
        rows = [
            _row(arm, "".join(_figure(of[arm.name][metric.name], metric) for of in columns.values())) for arm in arms
        ]
        table = f"<table><tr><th>arm{head}{''.join(rows)}</table>"
        found.append(f"<h3>{metric.label}</h3><div class=scroll>{table}</div>")
    return f"<h2>{title}</h2>{''.join(found)}"


def _concepts(results: Results) -> str:
    names = dict.fromkeys(n for case in results.cases for n in (*case.prompt.concepts, case.prompt.background) if n)
    figures = [
        f"<figure>{_image(open_rgb(concept_images(name) / '0.png'), CONCEPTS[name].token)}"
        f"<b>{name}</b><br>a {CONCEPTS[name].word}</figure>"
        for name in names
    ]
    return f"<h2>The concepts</h2><div class=cards>{''.join(figures)}</div>"


def _pictures(folder: Path, results: Results, arms: Sequence[Arm]) -> str:
    first = FULL if FULL in results.arms else arms[-1].name
    groups = dict.fromkeys(case.prompt.group for case in results.cases)
    boxes = "".join(f'<label><input type=checkbox name=group value="{g}" checked> {g}</label>' for g in groups)
    cases = "".join(_case(folder, faults, case, record, arms) for faults, case, record in worst_first(results, first))
    return (
        f"<h2>Pictures, the worst of ({_letter(first)}) first</h2><p class=filter>{boxes}"
        "<label><input type=checkbox id=failed name=failed> only where it fails</label> "
        f"<small><span id=shown>{len(results.cases)}</span> of {len(results.cases)} shown. Under a picture: "
        "<span class=yes>right</span> and <span class=no>wrong</span> identity of each concept, "
        '<span class="no unseen">struck out</span> where no animal is seen in its region; ! it leaks.</small></p>'
        f"{cases}"
    )


def _letter(name: str) -> str:
    return arm_of(name).letter


def _case(folder: Path, faults: int, case: Case, record: Mapping, arms: Sequence[Arm]) -> str:
    template = _image(open_rgb(template_path(folder, case.name)), "template")
    figures = [f"<figure>{template}template, {record['template']}</figure>"]
    for arm in arms:
        image = _image(open_rgb(picture_path(folder, case.name, arm.name)), arm.name)
        full = " class=full" if arm.name == FULL else ""
        marks = " ".join(_mark(concept) for concept in record["arms"][arm.name]["concepts"])
        figures.append(f"<figure{full}>{image}({arm.letter}) {arm.name}<br>{marks}</figure>")
    text = escape(case.prompt.text_with_tokens)
    return (
        f'<div class=case data-group="{case.prompt.group}" data-failed={faults}><h3>{text} '
        f"<small class=pale>{case.name}</small></h3><div class=pictures>{''.join(figures)}</div></div>"
    )


def _mark(concept: Mapping) -> str:
    kind, word = ("yes", "right identity") if concept["right"] else ("no", "wrong identity")
    if not concept["present"]:
        kind, word = "no unseen", "no animal is seen there"
    leak = "!" if concept["leaked"] else ""
    title = f"{concept['name']}: {word}{', leaks' if leak else ''}"
    return f'<span class={kind} title="{escape(title)}">{CONCEPTS[concept["name"]].word}{leak}</span>'


def _image(image: Image.Image, text: str) -> str:
    return f'<img alt="{escape(text)}" src="data:image/webp;base64,{_encoded(image.tobytes(), image.size)}">'


@lru_cache(maxsize=4096)
def _encoded(pixels: bytes, size: tuple[int, int]) -> str:
    file = io.BytesIO()
    Image.frombytes("RGB", size, pixels).save(file, "WEBP", quality=_QUALITY, method=4)
    return base64.b64encode(file.getvalue()).decode()
