"""Lines over N as SVG, written out: a plotting library would be one more thing to install."""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape

from benchmarks.providers import PROVIDERS

__all__ = ["lines_svg", "slug"]

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, LEGEND = 300, 220, 50, 44, 36, 170  # of a panel, its margins, and the legend
COLOURS = dict(zip(PROVIDERS, "#d62728 #7f7f7f #1f77b4 #17becf #9467bd #2ca02c #bcbd22".split(), strict=True))


def slug(text: str) -> str:
    """A name as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def lines_svg(title: str, panels: Mapping[str, Mapping[tuple[str, int], float]]) -> str:
    """A panel for each name, side by side: milliseconds by (provider, N), from zero up."""
    top = max((ms for sums in panels.values() for ms in sums.values()), default=1.0) * 1.05
    width = len(panels) * (LEFT + WIDTH) + LEGEND
    height = TOP + HEIGHT + BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text(LEFT, 16, title, 'font-size="13" font-weight="bold"'),
    ]
    for i, (name, sums) in enumerate(panels.items()):
        parts += _panel(LEFT + i * (LEFT + WIDTH), name, sums, top)
    shown = [name for name in PROVIDERS if any(name == provider for sums in panels.values() for provider, _ in sums)]
    for i, name in enumerate(shown):
        x, y = width - LEGEND + 16, TOP + 12 + 18 * i
        parts.append(f'<line x1="{x}" x2="{x + 18}" y1="{y - 4}" y2="{y - 4}" {_stroke(name)}/>')
        parts.append(_text(x + 24, y, name))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(left: float, name: str, sums: Mapping[tuple[str, int], float], top: float) -> list[str]:
    counts = sorted({n for _, n in sums}) or [1]

    def x(n: int) -> float:
        return left + WIDTH * n / (max(counts) + 0.5)

    def y(ms: float) -> float:
        return TOP + HEIGHT * (1 - ms / top)

    parts = [_text(left, TOP - 8, f"{name}: ms a forward over N")]
    for i in range(5):
        level = top * i / 4
        parts.append(f'<line x1="{left}" x2="{left + WIDTH}" y1="{y(level):.1f}" y2="{y(level):.1f}" stroke="#ddd"/>')
        parts.append(_text(left - 6, y(level) + 4, f"{level:.3g}", 'text-anchor="end"'))
    parts += [_text(x(n), TOP + HEIGHT + 16, str(n), 'text-anchor="middle"') for n in counts]
    for provider in PROVIDERS:
        points = [(x(n), y(sums[provider, n])) for n in counts if (provider, n) in sums]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(f'<polyline points="{path}" fill="none" {_stroke(provider)}/>')
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.5" fill="{COLOURS[provider]}"/>' for a, b in points]
    return parts


def _stroke(provider: str) -> str:
    return f'stroke="{COLOURS[provider]}" stroke-width="{2.5 if provider == "ours" else 1.5}"'


def _text(x: float, y: float, text: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{escape(text)}</text>'
