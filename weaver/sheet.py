"""The sheet that shows a whole run at a glance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from weaver.masks.overlay import concept_colour

__all__ = ["Card", "contact_sheet"]

_GREY = (120, 124, 130)
_INK, _PALE, _PAPER = (32, 36, 42), (104, 110, 118), (250, 250, 248)
_PANEL, _CARD, _GAP, _MARGIN = 384, 256, 8, 24
_TITLE, _HEADING, _CAPTION, _NOTE = 26, 17, 13, 12  # of letters, in pixels


@dataclass(frozen=True)
class Card:
    """One concept on the sheet: its name, what is written under it, and its own pictures (may be none)."""

    name: str
    caption: str
    pictures: Sequence[Image.Image]
    background: bool = False


def contact_sheet(
    cards: Sequence[Card],
    panels: Sequence[tuple[str, str, Image.Image]],
    *,
    title: str,
    footnote: str = "",
) -> Image.Image:
    """Concept pictures above; template, masks and result side by side below. Text that is long takes several lines.

    Parameters
    ----------
    cards : one a concept, in the order of the masks.
    panels : (heading, caption, picture), from left to right.
    title : written large at the top, usually the prompt.
    footnote : written small at the bottom.
    """
    width = 2 * _MARGIN + len(panels) * _PANEL + (len(panels) - 1) * 2 * _GAP
    images = [enlarge(picture, _PANEL) for _, _, picture in panels]
    images = [image.resize((_PANEL, round(_PANEL * image.height / image.width)), Image.Resampling.LANCZOS)
              for image in images]  # fmt: skip
    card_width = (width - 2 * _MARGIN - 2 * _GAP * (max(len(cards), len(panels)) - 1)) // max(len(cards), len(panels))
    # A column of two small pictures beside the large one where the card is wide enough for it.
    card_side = min(_CARD, (2 * card_width - _GAP) // 3 if card_width > _CARD else card_width)
    titles = _lines(title, _TITLE, width - 2 * _MARGIN)
    notes = _lines(footnote, _NOTE, width - 2 * _MARGIN)
    names = [_lines(card.name, _HEADING, card_width - 20) for card in cards]
    captions = [_lines(card.caption, _CAPTION, card_width) for card in cards]
    told = [_lines(caption, _CAPTION, _PANEL) for _, caption, _ in panels]
    top_cards = _MARGIN + _tall(titles, _TITLE) + 12
    top_pictures = top_cards + _most(names, _HEADING) + 4
    top_panels = top_pictures + card_side + 6 + _most(captions, _CAPTION) + 18 if cards else top_cards
    top_told = top_panels + 26 + max(image.height for image in images) + 6
    top_notes = top_told + _most(told, _CAPTION) + 8
    sheet = Image.new("RGB", (width, top_notes + _tall(notes, _NOTE) + _MARGIN - 8), _PAPER)
    draw = ImageDraw.Draw(sheet)
    _write(draw, (_MARGIN, _MARGIN - 6), titles, _TITLE, _INK)
    for number, card in enumerate(cards):
        left = _MARGIN + number * (card_width + 2 * _GAP)
        colour = _GREY if card.background else concept_colour(number)
        draw.rectangle([left, top_cards + 2, left + 12, top_cards + 14], fill=colour)
        _write(draw, (left + 20, top_cards - 2), names[number], _HEADING, _INK)
        _pictures(sheet, draw, card, (left, top_pictures), card_width, card_side)
        _write(draw, (left, top_pictures + card_side + 4), captions[number], _CAPTION, _PALE)
    for number, ((heading, _, _), image) in enumerate(zip(panels, images, strict=True)):
        left = _MARGIN + number * (_PANEL + 2 * _GAP)
        _write(draw, (left, top_panels), _lines(heading, _HEADING, _PANEL), _HEADING, _INK)
        sheet.paste(image, (left, top_panels + 26))
        _write(draw, (left, top_told), told[number], _CAPTION, _PALE)
    _write(draw, (_MARGIN, top_notes), notes, _NOTE, _PALE)
    return sheet


def enlarge(image: Image.Image, side: int) -> Image.Image:
    """Bring the shorter side up to `side` pixels by Lanczos; larger pictures stay as they are."""
    factor = side / min(image.size)
    if factor <= 1:
        return image
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.LANCZOS)


def _pictures(sheet, draw, card: Card, corner: tuple[int, int], width: int, side: int) -> None:
    """The first picture large, as many as fit beside it small in columns of two."""
    left, top = corner
    small = (side - _GAP) // 2
    spots = [(left, top, side)]
    x = left + side + _GAP
    while x + small <= left + width:
        spots += [(x, top, small), (x, top + side - small, small)]
        x += small + _GAP
    for (x, y, size), picture in zip(spots, card.pictures, strict=False):
        square = min(picture.size)
        box = ((picture.width - square) // 2, (picture.height - square) // 2)
        cut = picture.convert("RGB").crop((*box, box[0] + square, box[1] + square))
        sheet.paste(cut.resize((size, size), Image.Resampling.LANCZOS), (x, y))
    if not card.pictures:
        draw.rectangle([left, top, left + side - 1, top - 1 + side], outline=_PALE)
        lines = _lines("no pictures at hand", _CAPTION, side - 24)
        _write(draw, (left + 12, top - 4 + side // 2), lines, _CAPTION, _PALE)


def _lines(text: str, size: int, width: int) -> list[str]:
    """A text in lines of at most `width` pixels, parted at spaces; a word that is wider alone is cut with dots."""
    font, lines = ImageFont.load_default(size=size), []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        if font.getlength(word) > width:
            while word and font.getlength(f"{word}...") > width:
                word = word[:-1]
            word += "..."
        lines.append(word)
    return lines


def _tall(lines: Sequence[str], size: int) -> int:
    """The pixels that lines of text take from top to bottom."""
    return len(lines) * _line(size)


def _most(texts: Sequence[Sequence[str]], size: int) -> int:
    """The pixels of the tallest of several texts."""
    return max((_tall(lines, size) for lines in texts), default=0)


def _line(size: int) -> int:
    """From one line of text to the next, in pixels."""
    return round(1.3 * size)


def _write(draw: ImageDraw.ImageDraw, place: tuple[int, int], lines: Sequence[str], size: int, colour) -> None:
    font = ImageFont.load_default(size=size)
    for number, line in enumerate(lines):
        draw.text((place[0], place[1] + number * _line(size)), line, font=font, fill=colour)
