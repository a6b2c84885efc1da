"""Which object is whose: concepts ask for objects of their words, and no object is given to two of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from weaver.errors import told
from weaver.masks.compose import MaskError

__all__ = ["Found", "NotFoundError", "Wish", "assign", "assigned_masks"]

_SAME = 0.8
"""Two masks of one class are of one object where they share this part of the smaller: a head is part of its dog. Of
other classes, this part of both together: glasses are not their man."""
_LEAST_AGREEMENT = 0.1  # of a box that tells which object is meant
_SHOWN = 8  # objects in a message

_LINKS = "above at behind below beside between by from in inside near next of on that to under which who with without"
_LINKS = frozenset(_LINKS.split())
_ARTICLES = frozenset("a an the his her its their".split())
"""What parts a noun from what tells it apart; and, with these, what follows a participle that does so."""

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels


class NotFoundError(MaskError):
    """Fewer objects than were asked for, or none where a wish points at; `words` are those of which there are too few.

    Its message shows what was found.
    """

    def __init__(self, message: str, words: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.words = tuple(dict.fromkeys(words))


@dataclass(frozen=True, eq=False)
class Found:
    """One object that was found in a picture for a word.

    Parameters
    ----------
    word : what was looked for, "dog" or "white dog"
    mask : [height, width] bool, not empty
    box : (left, top, right, bottom) in pixels
    score : how sure the detector is, 0..1; None where it does not tell
    """

    word: str
    mask: torch.Tensor
    box: Box
    score: float | None = None

    @classmethod
    def of_mask(cls, word: str, mask: torch.Tensor) -> Found:
        """An object of which only its mask [height, width] is known."""
        y, x = torch.nonzero(mask, as_tuple=True)
        return cls(word, mask, (int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1))

    def centre(self) -> float:
        """How far to the right it stands: the mean x of its pixels."""
        return torch.nonzero(self.mask)[:, 1].double().mean().item()

    def holds(self, x: float, y: float) -> bool:
        """Whether its mask covers a point, in pixels."""
        height, width = self.mask.shape
        return 0 <= x < width and 0 <= y < height and bool(self.mask[int(y), int(x)])


@dataclass(frozen=True)
class Wish:
    """What one concept asks to be found: an object of a word, chosen in at most one way, or what is at given points.

    Parameters
    ----------
    word : its class word, or a phrase that tells it from others of its class ("white dog"); None with `points`
    order : the k-th object of the word from the left, 1 is the first
    rank : the k-th by score, 1 is the surest
    at : the object that covers this point (x, y), in pixels
    around : the object whose box agrees best with this one (left, top, right, bottom), in pixels
    points : (x, y) of pixels that belong to the object, for a segmenter that takes points
    """

    word: str | None = None
    order: int | None = None
    rank: int | None = None
    at: tuple[float, float] | None = None
    around: Box | None = None
    points: tuple[tuple[float, float], ...] | None = None

    @property
    def chosen(self) -> bool:
        """Whether it says which object of its word is meant."""
        return any(value is not None for value in (self.order, self.rank, self.at, self.around))


def assign(found: Sequence[Found], wishes: Sequence[Wish]) -> list[int]:
    """Give every concept one of the objects that were found.

    Detections of one object count as one, whatever words they were found for; words are of one class where their
    noun is the same ("white dog", "dog with a hat"). Wishes that choose go first, in the order in which they stand. The
    others of a word get its surest objects that are left, from left to right; where objects answer to several words
    ("white dog", "black dog"), those for which the scores add up to most. Of a source without scores the largest are
    the surest.
    Where there are too few, a detection that is no more than several others together is taken for a group of them, and
    left out.

    Parameters
    ----------
    found : in any order; their words are compared with those of the wishes letter by letter
    wishes : one a concept, each with a word

    Returns the index in `found` of every wish's object. Raises `NotFoundError`, which shows what was found, when there
    are fewer objects than wishes, or none where a wish points at, and `MaskError` for a rank where nothing has a score.
    """
    masks = torch.stack([item.mask for item in found]).flatten(1).float() if found else torch.zeros(0, 1)
    same = _same(masks, [item.word for item in found])
    taken: dict[int, int] = {}  # wish -> index in `found`

    def free(index: int) -> bool:
        return not any(same[index, other] for other in taken.values())

    for number, wish in enumerate(wishes):
        if wish.chosen:
            taken[number] = _chosen(found, wish, same, free)
    rest = [number for number in range(len(wishes)) if number not in taken]
    left, wanted = [i for i in range(len(found)) if free(i)], Counter(wishes[number].word for number in rest)
    objects = _objects(found, left, same)
    served = _best(found, objects, wanted)
    if served is None:
        single = [i for i in left if not _is_group(i, left, masks, same)]
        objects = _objects(found, single, same)
        served = _best(found, objects, wanted)
    if served is None:
        lacking = {word: n for word, n in wanted.items() if _best(found, objects, Counter({word: n})) is None}
        raise _too_few(found, lacking or wanted, bool(taken))
    for word, indices in served.items():
        numbers = [number for number in rest if wishes[number].word == word]
        taken |= zip(numbers, sorted(indices, key=lambda i: found[i].centre()), strict=True)
    return [taken[number] for number in range(len(wishes))]


def assigned_masks(found: Sequence[Found], wishes: Sequence[Wish]) -> torch.Tensor:
    """The mask of every wish's object, [N, height, width] bool; arguments and errors are those of `assign`."""
    return torch.stack([found[index].mask for index in assign(found, wishes)])


def _same(masks: torch.Tensor, words: Sequence[str]) -> torch.Tensor:
    """Which of the masks [K, pixels] are of one object, [K, K] bool."""
    areas, shared = masks.sum(1), masks @ masks.T
    classes = [_noun(word) for word in words]
    alike = torch.tensor([[a == b for b in classes] for a in classes], dtype=torch.bool).view(len(words), len(words))
    smaller, both = torch.minimum(areas[:, None], areas[None]), areas[:, None] + areas[None] - shared
    return shared >= _SAME * torch.where(alike, smaller, both)


def _noun(phrase: str) -> str:
    """What a phrase is of: the last word before what tells it apart, "dog" of "the white dog with a hat"."""
    words = phrase.lower().split()
    while len(words) > 1 and words[0] in _ARTICLES:
        words = words[1:]
    for place, word in enumerate(words[1:], start=1):
        after = words[place + 1 : place + 2]
        if word in _LINKS or (word.endswith("ing") and after and after[0] in _LINKS | _ARTICLES):
            return words[place - 1]  # "dog sitting on a chair", but "red sitting dog"
    return words[-1]


def _is_group(index: int, others: Sequence[int], masks: torch.Tensor, same: torch.Tensor) -> bool:
    """Whether a detection is no more than several objects together, two dogs taken for one."""
    area, parts = masks[index].sum(), []
    inside = [i for i in others if same[i, index] and masks[i].sum() < _SAME * area]
    for i in sorted(inside, key=lambda i: -float(masks[i].sum())):
        if not any(same[i, part] for part in parts):
            parts.append(i)
    return len(parts) > 1 and bool(masks[parts].amax(0).mul(masks[index]).sum() >= _SAME * area)


def _chosen(found: Sequence[Found], wish: Wish, same: torch.Tensor, free) -> int:
    """The object that a wish chooses, by the first way that it has."""
    own = [i for i, item in enumerate(found) if item.word == wish.word]
    if wish.at is not None:
        what, candidates = f"at {_numbers(wish.at)}", [i for i in own if found[i].holds(*wish.at)]
        candidates.sort(key=lambda i: int(found[i].mask.sum()))  # of a dog and a group of dogs, the dog
    elif wish.around is not None:
        what = f"around {_numbers(wish.around)}"
        agreement = {i: _agreement(found[i].box, wish.around) for i in own}
        best = max(own, key=agreement.__getitem__, default=None)
        candidates = [best] if best is not None and agreement[best] >= _LEAST_AGREEMENT else []
    else:
        objects = [next(iter(thing.values())) for thing in _objects(found, own, same)]
        if wish.order is not None:
            what, k = f"number {wish.order} from the left", wish.order
            objects.sort(key=lambda i: found[i].centre())
        else:
            what, k = f"number {wish.rank} by confidence", wish.rank
            if any(found[i].score is None for i in objects):
                raise MaskError(f"rank: nothing tells how sure a {wish.word!r} is here; use order, at or around")
        candidates = objects[k - 1 : k]
    if not candidates:
        raise NotFoundError(f"no {wish.word!r} {what}; {_shown(found, {wish.word})}", [wish.word])
    if not any(map(free, candidates)):
        message = f"the {wish.word!r} {what} is another concept's already; {_shown(found, {wish.word})}"
        raise NotFoundError(message, [wish.word])
    return next(filter(free, candidates))


def _objects(found: Sequence[Found], indices: Sequence[int], same: torch.Tensor) -> list[dict[str, int]]:
    """Detections put together where they are of one object, the surest first: its best detection by word."""
    objects: list[tuple[int, dict[str, int]]] = []
    for i in sorted(indices, key=lambda i: -_score(found[i])):
        alike = next((words for first, words in objects if same[i, first]), None)
        if alike is None:
            objects.append((i, {found[i].word: i}))
        else:
            alike.setdefault(found[i].word, i)
    return [words for _, words in objects]


def _best(
    found: Sequence[Found], objects: Sequence[dict[str, int]], wanted: Counter[str]
) -> dict[str, list[int]] | None:
    """Objects for all that is `wanted` of every word, whose scores add up to most; None where there are too few.

    One object after another is left out or given to one of its words; of all ways to have given the same number to
    every word only the best is kept.
    """
    words = list(wanted)
    ways: dict[tuple[int, ...], tuple[float, tuple]] = {(0,) * len(words): (0.0, ())}
    for thing in objects:
        for given, (total, chosen) in list(ways.items()):
            for place, word in enumerate(words):
                if word not in thing or given[place] == wanted[word]:
                    continue
                more = (*given[:place], given[place] + 1, *given[place + 1 :])
                score = total + _score(found[thing[word]])
                if more not in ways or score > ways[more][0]:
                    ways[more] = score, (*chosen, (word, thing[word]))
    best = ways.get(tuple(wanted[word] for word in words))
    return None if best is None else {word: [i for name, i in best[1] if name == word] for word in words}


def _score(item: Found) -> float:
    """How sure an object is; of a source that does not tell, the part of the picture that it covers."""
    return item.mask.double().mean().item() if item.score is None else item.score


def _agreement(a: Box, b: Box) -> float:
    """Intersection over union of two boxes."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def _too_few(found: Sequence[Found], lacking: Mapping[str, int], some_taken: bool) -> NotFoundError:
    asked = " and ".join(f"{count} {word!r}" for word, count in lacking.items())
    left = " besides those that were chosen" if some_taken else ""
    message = (
        f"{asked} asked for{left}, each an object of its own; {_shown(found, set(lacking))}: use another template, "
        "give these concepts a box or a mask file, or lower masks.text.box_threshold where the source is text"
    )
    return NotFoundError(message, list(lacking))


def _shown(found: Sequence[Found], words: set[str]) -> str:
    """What was found for some words, the surest first; where that is nothing, what was found for the others."""
    own = [item for item in found if item.word in words]
    items = sorted(own or found, key=lambda item: -_score(item))
    if not items:
        return "nothing was found"
    texts = [
        f"{item.word!r}" + ("" if item.score is None else f" {item.score:.2f}") + f" in box {_numbers(item.box)}"
        for item in items[:_SHOWN]
    ]
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return f"{'found' if own else 'nothing of that was found, only'} {', '.join(texts)}{more}"


def _numbers(values: Sequence[float]) -> str:
    return told([round(value) for value in values])
