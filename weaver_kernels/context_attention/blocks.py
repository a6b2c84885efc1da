"""Lengths as powers of two, which is what a Triton block is: two blocks waste less than one that holds everything.

77 keys are 64 + 16 rather than 128 and D = 40 is 32 + 16 rather than 64: a quarter fewer matrix instructions and a
third fewer registers.
"""

from __future__ import annotations

__all__ = ["key_blocks", "split"]

LEAST = 16  # a matrix instruction takes no less
TEXT = 77  # CLIP's length; prompts in several parts are multiples of it
# Keys that a program holds at once: of wide heads and of float32 more do not fit a block's shared memory (D = 160 and
# 128 keys take 100.25 KiB, sm_86 and sm_120 have 99), and what fits spills by thousands of bytes.
MOST_KEYS, MOST_KEYS_WIDE, WIDE_BYTES = 128, 80, 256


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


def key_blocks(n_keys: int, row_bytes: int) -> tuple[int, int, int]:
    """How many keys of a head of `row_bytes` bytes are taken at a time, and the two blocks that hold them.

    >>> key_blocks(77, 128), key_blocks(231, 128), key_blocks(100, 128), key_blocks(100, 320), key_blocks(200, 128)
    ((77, 64, 16), (77, 64, 16), (100, 128, 0), (64, 64, 0), (64, 64, 0))
    """
    if n_keys <= (MOST_KEYS if row_bytes <= WIDE_BYTES else MOST_KEYS_WIDE):
        return n_keys, *split(n_keys)
    at_a_time = TEXT if n_keys % TEXT == 0 else 64
    return at_a_time, *split(at_a_time)
