"""Whether a Hopper binary reads its matrix operands from shared memory where they are.

A wgmma takes the place of an operand from a pair of uniform registers, whose lower one has an address, cut to 14 or 15
bits. ptxas 12.8, which Triton 3.6 brings, sometimes makes it of a register that no address went into: the kernel then
reads anywhere, as compute-sanitizer saw on an H200. ptxas 12.9 makes the same PTX right. Here it is seen without a GPU,
though not in every case: what comes from a thread's register is taken for an address.
"""

from __future__ import annotations

import re

__all__ = ["lost_descriptors"]

_LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_UNIFORM = re.compile(r"UR(\d+|Z)\b")
_COPIES = ("UMOV", "UIADD3", "ULOP3", "USEL")  # whose result is an address where an operand is one


def lost_descriptors(sass: str) -> list[str]:
    """The matrix instructions of a disassembly (`cuobjdump -sass`) whose operand's address comes from nowhere.

    Registers are followed in the order of the text, twice, so that what a loop carries counts.
    """
    instructions = [match.groups() for match in map(_LINE.search, sass.splitlines()) if match]
    addresses: set[int] = set()
    for _ in range(2):
        lost = []
        for name, operands in instructions:
            if name.startswith("HGMMA"):
                if not (registers := _registers(operands)) or not registers <= addresses:
                    lost.append(f"{name} {operands}".strip())
            elif written := re.match(r"(?:U?P\w+, )*UR(\d+)", operands):
                _follow(name, operands, int(written[1]), addresses)
    return lost


def _registers(operands: str) -> set[int]:
    """The lower uniform registers of the operands in shared memory: of both, or of the second behind a register; none
    where the text is of another form."""
    found = re.search(r"gdesc\[UR(\d+)\]", operands)
    if found is None:
        return set()
    first = int(found[1])
    return {first + 2} if re.match(r"R\d+, R\d+", operands) else {first, first + 2}


def _follow(name: str, operands: str, written: int, addresses: set[int]) -> None:
    """Update which registers hold an address; what comes from a thread's register is taken for one."""
    read = {int(number) for number in _UNIFORM.findall(operands)[1:] if number != "Z"}
    masked = name.startswith("ULOP3") and any(f", {mask}," in operands for mask in ("0x3fff", "0x7fff"))
    cut = masked or name.startswith(("USGXT", "R2UR"))
    copied = name.startswith(_COPIES) and bool(read & addresses)
    if ".64" in name or ".WIDE" in name:
        addresses.discard(written + 1)
    if cut or copied:
        addresses.add(written)
    else:
        addresses.discard(written)
