"""Whether a Hopper binary reads its matrix operands from shared memory where they are.

A wgmma takes the place of an operand from a pair of uniform registers, whose lower one has an address, cut to 14 or 15
bits. ptxas 12.8, which Triton 3.6 brings, sometimes makes it of a register that no address went into: of one that holds
something else, or of the pointer to the stack. The kernel then reads anywhere, as compute-sanitizer saw on an H200, or
ends in an illegal access, as on an H100. ptxas 12.9 makes the same PTX right. Here it is seen without a GPU, though not
in every case: an address is taken for the right one.
"""

from __future__ import annotations

import re

__all__ = ["lost_descriptors"]

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_PLACE = re.compile(r"\bU?R\d+\b|\[R1(?:\+0x[0-9a-f]+)?\]")  # a register, or where one is spilled to
_WRITTEN = re.compile(rf"(?:!?U?P\w+, )*({_PLACE.pattern})")
_CUT = re.compile(r", 0x(?:3fff|7fff),|, 0x[ef]\s*$")  # by a mask or to so many bits
_CUTS = re.compile(r"U?(?:LOP3|SGXT)\b")
# Whose result is an address where an operand is one.
_COPIES = re.compile(r"R2UR|STL|LDL|IMAD\.(?:MOV|U32|IADD)\b|VIADD|U?(?:MOV|IADD3|LOP3|SEL)\b")


def lost_descriptors(sass: str) -> list[str]:
    """The matrix instructions of a disassembly (`cuobjdump -sass`) whose operand's address comes from nowhere.

    Registers and what is spilled are followed in the order of the text, each loop twice: what it carries counts.
    """
    instructions = [match.groups() for match in map(_LINE.search, sass.splitlines()) if match]
    loops = _loops(instructions)
    addresses: set[str] = set()
    lost: dict[int, str] = {}
    i = 0
    while i < len(instructions):
        _, name, operands = instructions[i]
        if name.startswith("HGMMA") and not (_descriptors(operands) or {""}) <= addresses:
            lost[i] = f"{name} {operands}".strip()
        if written := _WRITTEN.match(operands):
            _follow(name, operands, written[1], addresses)
        i = loops.pop(i, i + 1)
    return [lost[i] for i in sorted(lost)]


def _loops(instructions: list[tuple[str, str, str]]) -> dict[int, int]:
    """Which branches lead back, and where to."""
    places = {int(address, 16): i for i, (address, _, _) in enumerate(instructions)}
    targets = {
        i: places.get(int(found[0], 16), i)
        for i, (_, name, operands) in enumerate(instructions)
        if name.startswith("BRA") and (found := re.search(r"\b0x[0-9a-f]+", operands))
    }
    return {i: target for i, target in targets.items() if target < i}


def _descriptors(operands: str) -> set[str]:
    """The lower uniform registers of the operands in shared memory: of both, or of the second behind a register; none
    where the text is of another form."""
    found = re.search(r"gdesc\[UR(\d+)\]", operands)
    if found is None:
        return set()
    first = int(found[1])
    return {f"UR{first + 2}"} if re.match(r"R\d+, R\d+", operands) else {f"UR{first}", f"UR{first + 2}"}


def _follow(name: str, operands: str, written: str, addresses: set[str]) -> None:
    """Update which places hold an address; of a result of several registers only the first may."""
    cut = _CUTS.match(name) and _CUT.search(operands)
    copied = _COPIES.match(name) and not addresses.isdisjoint(_PLACE.findall(operands)[1:])
    addresses.difference_update(_places(name, written))
    if cut or copied:
        addresses.add(written)


def _places(name: str, written: str) -> list[str]:
    """All that an instruction writes whose first result goes there."""
    if written.startswith("["):
        return [written]
    kind, first = re.match(r"(\D+)(\d+)", written).groups()
    return [f"{kind}{int(first) + i}" for i in range(_width(name))]


def _width(name: str) -> int:
    """How many registers an instruction writes."""
    if product := re.match(r"HGMMA\.64x(\d+)x", name):
        return int(product[1]) // 2
    if ".128" in name or ".M88.4" in name:
        return 4
    return 2 if ".64" in name or ".WIDE" in name or name.startswith("CS2R") else 1
