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
    """Concept pictures above; template, masks and result side by side below.

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
    top_cards = _MARGIN + 46
    top_panels = top_cards + (card_side + 64 if cards else 0)
    height = top_panels + 30 + max(image.height for image in images) + 26 + (26 if footnote else 0) + _MARGIN
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    _write(draw, (_MARGIN, _MARGIN - 6), title, 26, _INK, width - 2 * _MARGIN)
    for number, card in enumerate(cards):
        left = _MARGIN + number * (card_width + 2 * _GAP)
        colour = _GREY if card.background else concept_colour(number)
        _card(sheet, draw, card, (left, top_cards), card_width, card_side, colour)
    for number, ((heading, caption, _), image) in enumerate(zip(panels, images, strict=True)):
        left = _MARGIN + number * (_PANEL + 2 * _GAP)
        _write(draw, (left, top_panels), heading, 17, _INK, _PANEL)
        sheet.paste(image, (left, top_panels + 26))
        _write(draw, (left, top_panels + 26 + image.height + 6), caption, 13, _PALE, _PANEL)
    if footnote:
        _write(draw, (_MARGIN, height - _MARGIN - 12), footnote, 12, _PALE, width - 2 * _MARGIN)
    return sheet


def enlarge(image: Image.Image, side: int) -> Image.Image:
    """Bring the shorter side up to `side` pixels by Lanczos; larger pictures stay as they are."""
    factor = side / min(image.size)
    if factor <= 1:
        return image
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.LANCZOS)


def _card(sheet, draw, card: Card, corner: tuple[int, int], width: int, side: int, colour) -> None:
    """The first picture large, as many as fit beside it small in columns of two; name and caption above and below."""
    left, top = corner
    draw.rectangle([left, top + 2, left + 12, top + 14], fill=colour)
    _write(draw, (left + 20, top - 2), card.name, 17, _INK, width - 20)
    small = (side - _GAP) // 2
    spots = [(left, top + 24, side)]
    x = left + side + _GAP
    while x + small <= left + width:
        spots += [(x, top + 24, small), (x, top + 24 + side - small, small)]
        x += small + _GAP
    for (x, y, size), picture in zip(spots, card.pictures, strict=False):
        square = min(picture.size)
        box = ((picture.width - square) // 2, (picture.height - square) // 2)
        cut = picture.convert("RGB").crop((*box, box[0] + square, box[1] + square))
        sheet.paste(cut.resize((size, size), Image.Resampling.LANCZOS), (x, y))
    if not card.pictures:
        draw.rectangle([left, top + 24, left + side - 1, top + 23 + side], outline=_PALE)
        _write(draw, (left + 12, top + 20 + side // 2), "no pictures at hand", 13, _PALE, side - 24)
    _write(draw, (left, top + 28 + side), card.caption, 13, _PALE, width)


def _write(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, size: int, colour, width: int) -> None:
    """One line of text; where it is wider than `width` without its last parts, and still then cut with dots."""
    font = ImageFont.load_default(size=size)
    while draw.textlength(text, font=font) > width and ", " in text:
        text = text.rpartition(", ")[0]
    if draw.textlength(text, font=font) > width:
        while text and draw.textlength(f"{text}...", font=font) > width:
            text = text[:-1]
        text = f"{text.rstrip()}..."
    draw.text(place, text, font=font, fill=colour)
