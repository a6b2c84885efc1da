"""The sheet of a run tells all that it is given, however long."""

from __future__ import annotations

import pytest
from PIL import Image, ImageDraw

from weaver.sheet import Card, contact_sheet

PICTURE = Image.new("RGB", (64, 64), "orange")
LONG = {
    "title": "a cat and a dog and a fox playing with a red ball on a wide meadow, at dawn, mountain background",
    "footnote": "Concept Weaver, seed 1, " + "a long remark, " * 20 + "the end",
    "name": "an animal that has a name of many words",
    "caption": "<a-token> salamander, trained now, in four hundred steps, from a folder of pictures",
}


@pytest.fixture
def written(monkeypatch):
    """Every line that is drawn, with its place and what it takes."""
    lines, draw = [], ImageDraw.ImageDraw.text

    def text(self, place, line, *, font, fill):
        lines.append((line, *place, font.getlength(line), font.size, self.im.size))
        draw(self, place, line, font=font, fill=fill)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return lines


@pytest.mark.parametrize("count", [0, 1, 6])
def test_every_word_is_written_within_the_sheet(written, count):
    cards = [Card(LONG["name"], LONG["caption"], [PICTURE] * number) for number in range(count)]
    panels = [(heading, LONG["caption"], PICTURE) for heading in ("Template", "Masks", "Result")]
    sheet = contact_sheet(cards, panels, title=LONG["title"], footnote=LONG["footnote"])
    words = " ".join(line for line, *_ in written)
    for text, times in ((LONG["title"], 1), (LONG["footnote"], 1), (LONG["name"], count), (LONG["caption"], count + 3)):
        assert words.count(text) == times
    for _, x, y, length, size, room in written:
        assert room == sheet.size and x + length <= room[0] and y + size <= room[1]
    places = [(x, y) for _, x, y, *_ in written]
    assert len(set(places)) == len(places)


def test_a_word_that_is_too_long_for_its_place_is_cut_with_dots(written):
    contact_sheet([], [("Result", "x" * 200, PICTURE)], title="a cat")
    line = next(line for line, *_ in written if line.startswith("xxx"))
    assert line.endswith("x...") and len(line) < 100
