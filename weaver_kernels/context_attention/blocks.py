"""Lengths as powers of two, which is what a Triton block is: two blocks waste less than one that holds everything.

77 keys are 64 + 16 rather than 128 and D = 40 is 32 + 16 rather than 64: a quarter fewer matrix instructions and a
third fewer registers.
"""

from __future__ import annotations

__all__ = ["key_blocks", "split"]

LEAST = 16  # a matrix instruction takes no less
TEXT = 77  # CLIP's length; prompts in several parts are multiples of it
IN_REGISTERS = 128  # keys whose scores a program holds at once


def split(n: int) -> tuple[int, int]:
    """Two powers of two, or one and 0, with the least sum that holds n.

    >>> split(77), split(40), split(64), split(100)
    ((64, 16), (32, 16), (64, 0), (128, 0))
    """
    first = LEAST
    while 2 * first <= n:
        first *= 2
    if first >= n:
        return first, 0
    second = LEAST
    while first + second < n:
        second *= 2
    return (first, second) if second < first else (2 * first, 0)


def key_blocks(n_keys: int) -> tuple[int, int, int]:
    """How many keys are taken at a time, and the two blocks that hold them.

    >>> key_blocks(77), key_blocks(231), key_blocks(100), key_blocks(200)
    ((77, 64, 16), (77, 64, 16), (100, 128, 0), (64, 64, 0))
    """
    if n_keys <= IN_REGISTERS:
        return n_keys, *split(n_keys)
    at_a_time = TEXT if n_keys % TEXT == 0 else 64
    return at_a_time, *split(at_a_time)
