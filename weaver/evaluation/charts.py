"""Drawings of figures as SVG: with their intervals, arm under arm; and of a sweep, setting by setting."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from weaver.evaluation.bootstrap import Interval

__all__ = ["curves", "dots"]

_LABEL, _PANEL, _ROW, _GAP, _HEAD = 190, 250, 24, 34, 40
_APART = 24  # between labels
_INK, _PALE, _LINE, _FULL = "#20242a", "#687078", "#d9dcd6", "#b3402a"


def dots(names: Sequence[str], panels: Sequence[tuple[str, Sequence[Interval]]], *, marked: str) -> str:
    """A panel a metric from 0 to 100 %, a dot an arm with the line of its interval.

    Parameters
    ----------
    names : of the arms, from top to bottom
    panels : (title, one interval an arm), shares of 1
    marked : the name that is drawn in colour
    """
    width = _LABEL + len(panels) * (_PANEL + _GAP)
    height = _HEAD + len(names) * _ROW + 26
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" font-family="inherit" font-size="13">']
    for row, name in enumerate(names):
        colour, weight = (_FULL, "bold") if name == marked else (_INK, "normal")
        y = _HEAD + row * _ROW + 16
        parts.append(f'<text x="0" y="{y}" fill="{colour}" font-weight="{weight}">{escape(name)}</text>')
    for number, (title, intervals) in enumerate(panels):
        left = _LABEL + number * (_PANEL + _GAP)
        parts.append(f'<text x="{left}" y="18" fill="{_INK}" font-weight="bold">{escape(title)}</text>')
        for percent in (0, 25, 50, 75, 100):
            x = left + _PANEL * percent / 100
            bottom = _HEAD + len(names) * _ROW
            parts.append(f'<line x1="{x}" x2="{x}" y1="{_HEAD - 8}" y2="{bottom}" stroke="{_LINE}"/>')
            parts.append(
                f'<text x="{x}" y="{bottom + 18}" fill="{_PALE}" font-size="11" text-anchor="middle">{percent} %</text>'
            )
        for row, (name, found) in enumerate(zip(names, intervals, strict=True)):
            if found.value != found.value:
                continue
            y, colour = _HEAD + row * _ROW + 12, _FULL if name == marked else _INK
            low, high, x = (left + _PANEL * share for share in (found.low, found.high, found.value))
            title = f"{found.value:.1%} ({found.low:.1%} to {found.high:.1%})"
            parts.append(
                f'<g><title>{title}</title><line x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}" '
                f'stroke="{colour}" stroke-width="2"/><circle cx="{x:.1f}" cy="{y}" r="4.5" fill="{colour}"/></g>'
            )
    return "".join([*parts, "</svg>"])


def curves(panels: Sequence[tuple[str, Sequence[tuple[float, float]], float]]) -> str:
    """A panel a setting: the objective over its values, the others as they were when it was looked at.

    Parameters
    ----------
    panels : (setting, its (value, objective), the value that was chosen); the objectives share one axis, J
    """
    size, gap, foot = 150, 46, 34
    scores = [score for _, points, _ in panels for _, score in points]
    low, high = min(scores), max(scores)
    span = (high - low) or 1.0
    width = len(panels) * (size + gap) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {size + _HEAD + foot}" width="{width}" '
        'role="img" font-size="12" font-family="sans-serif" style="background: #fafaf8">'
    ]
    for number, (name, points, chosen) in enumerate(panels):
        left, points = 40 + number * (size + gap), sorted(points)
        first, last = points[0][0], points[-1][0]
        place = {
            value: (left + size * (value - first) / ((last - first) or 1), _HEAD + size * (high - score) / span)
            for value, score in points
        }
        parts.append(f'<text x="{left}" y="18" fill="{_INK}" font-weight="bold">{escape(name)}</text>')
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in place.values())
        parts.append(f'<polyline points="{line}" fill="none" stroke="{_PALE}" stroke-width="1.5"/>')
        marks = [*((value, spot) for value, spot in place.items() if value != chosen), (chosen, place[chosen])]
        labelled = [place[chosen][0]]
        for value, (x, y) in marks:  # the chosen one on top of those beside it
            colour, told = _FULL if value == chosen else _INK, f"{escape(name)} {value:g}: {dict(points)[value]:.3f}"
            parts.append(f'<g><title>{told}</title><circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/></g>')
            if value == chosen or all(abs(x - other) >= _APART for other in labelled):
                labelled.append(x)
                parts.append(
                    f'<text x="{x:.1f}" y="{size + _HEAD + 20}" fill="{colour}" font-size="10" text-anchor="middle">'
                    f"{value:.3g}</text>"
                )
    middle = _HEAD + size // 2
    parts.append(f'<text x="8" y="{middle}" fill="{_PALE}" font-size="11" font-style="italic">J</text>')
    for score, y in ((high, _HEAD + 4), (low, _HEAD + size + 4)):
        parts.append(f'<text x="0" y="{y}" fill="{_PALE}" font-size="10">{score:.2f}</text>')
    return "".join([*parts, "</svg>"])
