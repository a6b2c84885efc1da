"""What the README of `weaver_kernels` shows is so."""

from __future__ import annotations

import re
from pathlib import Path

import torch

import weaver_kernels
from weaver_kernels.context_attention.lists import live_order, tile_list

ROOT = Path(__file__).parents[2]
README = (ROOT / "weaver_kernels" / "README.md").read_text(encoding="utf-8")


def test_the_example_runs():
    names: dict = {}
    exec(compile(re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1), "README.md", "exec"), names)
    assert names["out"].shape == names["q"].shape


def test_the_picture_is_what_the_plan_makes():
    rows = re.findall(r"^  ([abc]) ([abc]) ([abc]) ([abc])  ", README, re.MULTILINE)
    labels = [letter for row in rows for letter in row]
    alive = torch.tensor([[[letter == name for letter in labels] for name in "abc"] + [[True] * 16]])
    order = live_order(alive)
    found = tile_list(alive, order, 4)[0]
    drawn = re.findall(r"tile (\d) +([abcz ]+)$", README, re.MULTILINE)
    assert [int(tile) for tile, _ in drawn] == [0, 1, 2, 3]
    for tile, names in drawn:
        made = {"abcz"[s] for s in found[int(tile), 1 : 1 + 2 * found[int(tile), 0] : 2].tolist()}
        assert made == set(names.split())
    assert order[0, :8].tolist() == [int(n) for n in re.findall(r"\d+", README.split("───►")[1].split("...")[0])][:8]


def test_operations_and_commands_are_there():
    for name in re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE):
        assert name in weaver_kernels.__all__
    makefile = (ROOT / "Makefile").read_text()
    for name in re.findall(r"`make ([\w-]+)", README):
        assert re.search(rf"^{name}:", makefile, re.MULTILINE), name
