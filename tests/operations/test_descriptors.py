"""A binary that takes a matrix operand's address from nowhere is told from one that takes it from an address."""

from __future__ import annotations

import pytest

from weaver_kernels.compiling import Case, Compiled, failures
from weaver_kernels.descriptors import lost_descriptors


def listing(*instructions: str) -> str:
    """As `cuobjdump -sass` writes it, with the lines of encoding between."""
    lines = []
    for i, instruction in enumerate(instructions):
        lines += [f"        /*{16 * i:04x}*/                   {instruction} ;      /* 0x000000042a0a7290 */"]
        lines += ["                                                          /* 0x000fe2000ff1e03f */"]
    return "\n".join(lines)


ADDRESS = ("USHF.R.U32.HI UR42, URZ, 0x4, UR54", "USGXT.U32 UR42, UR42, 0xe")
FIRST = ("UMOV UR10, UR42", "UMOV UR11, 0xc0000010")
PRODUCT = "HGMMA.64x16x16.F32 R80, R28, gdesc[UR16].tnspB, R80, gsb0"
# What ptxas 12.8 and 12.9 made of one PTX.
WRONG = ("UIADD3 UR18, UP0, UR6, 0x20, URZ", "UIADD3.X UR19, UR6, -0x3ffffff0, URZ, UP0, !UPT")
RIGHT = ("UIADD3 UR18, UP0, UR42, 0x20, URZ", "UIADD3.X UR19, UR14, -0x3ffffff0, URZ, UP0, !UPT")


def test_both_binaries_of_one_program():
    assert lost_descriptors(listing(*ADDRESS, *FIRST, *WRONG, PRODUCT)) == [PRODUCT]
    assert not lost_descriptors(listing(*ADDRESS, *FIRST, *RIGHT, PRODUCT))


def test_an_operand_in_registers_has_no_address_and_two_in_memory_have_two():
    both = "HGMMA.64x64x16.F32 R24, gdesc[UR16], RZ, !UPT"
    assert lost_descriptors(listing(*ADDRESS, *RIGHT, both)) == [both]
    assert not lost_descriptors(listing(*ADDRESS, *RIGHT, "UIADD3.64 UR16, UR42, 0x2, URZ", both))


@pytest.mark.parametrize(
    "between",
    ["UMOV UR18, URZ", "UIMAD UR18, UR42, UR7, URZ", "UIMAD.WIDE.U32 UR17, UR22, UR15, URZ", "S2UR UR18, SR_CgaCtaId"],
)
def test_what_is_written_over_is_no_address_any_more(between):
    assert lost_descriptors(listing(*ADDRESS, *RIGHT, between, PRODUCT)) == [PRODUCT]


def test_what_a_loop_carries_counts():
    """The address is made behind the product that reads it in the next turn."""
    assert not lost_descriptors(listing(PRODUCT, *ADDRESS, *RIGHT, "@P4 BRA 0x0"))


def test_a_product_of_another_form_is_not_taken_for_right():
    assert lost_descriptors(listing("HGMMA.64x8x16.F32 R24, R4, R8, R24")) == ["HGMMA.64x8x16.F32 R24, R4, R8, R24"]


def test_such_a_binary_must_not_be_shipped():
    case = Case(40, 90, 16)
    assert not failures(Compiled(case, 141, 0, 16384, "wgmma"))
    assert "reads anywhere in 3 matrix" in failures(Compiled(case, 141, 0, 16384, "wgmma", lost=3))[0]
