"""Which object is whose: every concept gets one of its own, or it is told what was found."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from weaver.masks.assign import Found, NotFoundError, Wish, _noun, assign
from weaver.masks.compose import MaskError

SIZE = (20, 60)


def found(word, left, score=None, *, top=4, right=None, bottom=14):
    """A rectangle as an object."""
    box = (left, top, left + 8 if right is None else right, bottom)
    mask = torch.zeros(SIZE, dtype=torch.bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return Found(word, mask, box, score)


DOGS = [found("dog", 40, 0.9), found("dog", 2, 0.6), found("dog", 22, 0.7)]


@pytest.mark.parametrize(
    ("wish", "index"),
    [
        (Wish("dog"), 0),
        (Wish("dog", order=1), 1),
        (Wish("dog", order=3), 0),
        (Wish("dog", rank=2), 2),
        (Wish("dog", at=(3.5, 5.0)), 1),
        (Wish("dog", around=(20, 0, 35, 20)), 2),
    ],
    ids=["the surest", "first from the left", "third", "second by score", "at a point", "around a box"],
)
def test_one_of_three(wish, index):
    assert assign(DOGS, [wish]) == [index]


def test_two_of_one_class_stand_from_left_to_right():
    """The two surest, whatever the order in which they were found."""
    for order in itertools.permutations(DOGS):
        chosen = [order[i] for i in assign(order, [Wish("dog"), Wish("dog")])]
        assert [item.box[0] for item in chosen] == [22, 40]


def test_the_largest_are_the_surest_where_nothing_has_a_score():
    cats = [found("cat", 2, right=10), found("cat", 22, right=27), found("cat", 42, right=52)]
    assert assign(cats, [Wish("cat"), Wish("cat")]) == [0, 2]
    with pytest.raises(MaskError, match=r"4 'cat' .*; found 'cat' in box \[42, 4, 52, 14\], 'cat' in box \[2, 4, 10"):
        assign(cats, [Wish("cat")] * 4)


def test_words_of_which_there_are_too_few_are_told_and_no_others():
    """But where several words share too few objects, all of them are."""
    for wishes, lacking in (
        ([Wish("cat"), Wish("dog")], ("cat",)),
        ([Wish("dog"), Wish("cat"), *[Wish("dog")] * 3], ("dog", "cat")),
        ([Wish("dog", order=7), Wish("cat")], ("dog",)),
    ):
        with pytest.raises(NotFoundError) as caught:
            assign(DOGS, wishes)
        assert caught.value.words == lacking
    both = [found("white dog", 2, 0.8), found("black dog", 3, 0.7, right=10)]
    with pytest.raises(NotFoundError, match="1 'white dog' and 1 'black dog' asked for"):
        assign(both, [Wish("white dog"), Wish("black dog")])


def test_a_choice_goes_before_those_without_one():
    assert assign(DOGS, [Wish("dog"), Wish("dog", rank=1)]) == [2, 0]


def test_an_attribute_tells_two_dogs_apart():
    """Each phrase was found on both; the surest for the one is all that there is for the other."""
    both = [found("white dog", 2, 0.80), found("white dog", 40, 0.75), found("black dog", 3, 0.79, right=10)]
    assert assign(both, [Wish("white dog"), Wish("black dog")]) == [1, 2]
    assert assign(both, [Wish("black dog"), Wish("white dog")]) == [2, 1]


def test_a_part_and_its_whole_are_one_object():
    head, whole = found("dog", 4, 0.8, top=4, right=8, bottom=8), found("dog", 2, 0.7)
    with pytest.raises(
        MaskError, match=r"2 'dog' asked for, each an object of its own; found 'dog' 0.80 in box \[4, 4"
    ):
        assign([head, whole], [Wish("dog"), Wish("dog")])
    assert assign([head, whole, found("dog", 30, 0.4)], [Wish("dog")] * 2) == [0, 2]


def test_what_a_thing_wears_is_another_thing():
    man, glasses = found("man", 2, 0.9, right=30, bottom=18), found("glasses", 10, 0.8, right=16, bottom=7)
    assert assign([man, glasses], [Wish("man"), Wish("glasses")]) == [0, 1]
    assert assign([man, glasses], [Wish("glasses", at=(12, 5)), Wish("man", order=1)]) == [1, 0]


def test_a_group_is_no_object_where_its_parts_are_asked_for():
    group = found("dog", 2, 0.95, right=30)
    dogs = [found("dog", 2, 0.7, right=15), found("dog", 16, 0.6, right=30)]
    assert assign([group, *dogs], [Wish("dog"), Wish("dog")]) == [1, 2]
    assert assign([group, *dogs], [Wish("dog")]) == [0]  # nothing tells that it is more than one


def test_a_box_that_agrees_with_nothing_is_told():
    with pytest.raises(MaskError, match="no 'dog' around"):
        assign(DOGS, [Wish("dog", around=(9, 13, 21, 20))])


def test_a_point_means_the_smallest_that_covers_it():
    group = found("dog", 0, 0.9, right=50)
    assert assign([group, *DOGS], [Wish("dog", at=(24, 8))]) == [3]


def test_no_object_is_given_twice_in_random_scenes():
    """Against every way to hand the objects out: as good as the best of them by score, and refused where none is."""
    draw, outcomes = random.Random(0), [0, 0]
    for _ in range(200):
        items = [
            found(word, 10 * place, round(draw.random(), 3))
            for place in range(draw.randint(0, 5))
            for word in draw.sample(["cat", "dog"], draw.randint(0, 2))
        ]
        wishes = [Wish(draw.choice(["cat", "dog"])) for _ in range(draw.randint(1, 4))]
        ways = [
            way
            for way in itertools.permutations(range(len(items)), len(wishes))
            if len({items[i].box for i in way}) == len(way)
            and all(items[i].word == wish.word for i, wish in zip(way, wishes, strict=True))
        ]
        outcomes[bool(ways)] += 1
        if not ways:
            with pytest.raises(MaskError):
                assign(items, wishes)
            continue
        chosen = assign(items, wishes)
        assert tuple(chosen) in ways
        best = max(sum(items[i].score for i in way) for way in ways)
        assert sum(items[i].score for i in chosen) == pytest.approx(best, abs=1e-9)
        for word in ("cat", "dog"):
            lefts = [items[i].box[0] for i, wish in zip(chosen, wishes, strict=True) if wish.word == word]
            assert lefts == sorted(lefts)
    assert min(outcomes) > 20


@pytest.mark.parametrize(
    ("items", "wishes", "message"),
    [
        ([], [Wish("dog")], "1 'dog' asked for, each an object of its own; nothing was found: use another template"),
        (DOGS[:1], [Wish("dog"), Wish("dog")], r"2 'dog' asked .*found 'dog' 0.90 in box \[40, 4, 48, 14\]"),
        (
            DOGS[:1],
            [Wish("cat"), Wish("dog")],
            r"1 'cat' asked for, .*; nothing of that was found, only 'dog' 0.90 in box \[40, 4, 48, 14\]: use another",
        ),
        (
            DOGS,
            [Wish("dog", order=4)],
            r"no 'dog' number 4 from the left; found 'dog' 0.90 .* 'dog' 0.70 .* 'dog' 0.60",
        ),
        (DOGS, [Wish("dog", at=(15.0, 8.0))], r"no 'dog' at \[15, 8\]; found"),
        (DOGS, [Wish("dog", at=(-3.0, 800.0))], r"no 'dog' at \[-3, 800\]; found"),
        (DOGS, [Wish("dog", around=(11, 0, 20, 20))], r"no 'dog' around \[11, 0, 20, 20\]; found"),
        (DOGS, [Wish("dog", order=1), Wish("dog", at=(3, 5))], r"the 'dog' at \[3, 5\] is another concept's already"),
        (DOGS[:1], [Wish("dog", order=1), Wish("dog")], "1 'dog' asked for besides those that were chosen"),
        ([found("dog", 3)], [Wish("dog", rank=1)], "rank: nothing tells how sure a 'dog' is here; use order"),
    ],
    ids=[
        "none",
        "one of two",
        "of one word",
        "too far",
        "nobody there",
        "outside",
        "no box",
        "taken",
        "rest",
        "no score",
    ],
)
def test_what_can_not_be_had_is_told_with_what_was_found(items, wishes, message):
    with pytest.raises(MaskError, match=message) as caught:
        assign(items, wishes)
    assert "\n" not in str(caught.value)


def test_phrases_are_of_one_class_where_their_noun_is_the_same():
    """One dog, found twice, its tail apart: seven tenths of both together, and all of the smaller."""
    for first, second in (("white dog", "dog with a hat"), ("dog on the left", "small dog"), ("dog", "the dog")):
        twice = [found(first, 10, 0.9, right=20), found(second, 10, 0.8, right=17)]
        with pytest.raises(NotFoundError, match="each an object of its own"):
            assign(twice, [Wish(first), Wish(second)])
    pairs = (("the sitting dog", "dog"), ("red sitting dog", "dog wearing a hat"), ("a dog lying on the sofa", "dog"))
    assert all(_noun(first) == _noun(second) == "dog" for first, second in pairs)
    assert _noun("the sitting cat") == "cat" and _noun("white ring") == "ring" and _noun("the") == "the"
    apart = [found("hat", 10, 0.9, right=20), found("dog with a hat", 10, 0.8, right=17)]
    assert assign(apart, [Wish("hat"), Wish("dog with a hat")]) == [0, 1]
