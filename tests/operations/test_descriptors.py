"""A binary that takes a matrix operand's address from nowhere is told from one that takes it from an address."""

from __future__ import annotations

import pytest

from weaver_kernels.compiling import Compiled, failures
from weaver_kernels.compiling_attention import Case
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


# The same of a kernel that spills: the address goes through registers of a thread, over R1, the pointer to the stack.
BEHIND = "HGMMA.64x32x16.F32 R120, R88, gdesc[UR16].tnspB, R120"
STACK = ("IADD3 R11, P0, R1, 0x2, RZ", "IADD3.X R13, R1, -0x7fffffe0, RZ, P0, !PT", "IADD3 R69, P0, R11, 0x3e, RZ")
SHARED = ("SHF.R.U32.HI R9, RZ, 0x4, R9", "SGXT.U32 R200, R9, 0xe", "IADD3 R69, P0, R200, 0x40, RZ")
MOVED = ("R2UR UR5, R69", "UMOV UR24, UR5", "IMAD.U32 R194, RZ, RZ, UR24", "R2UR UR18, R194")


def test_an_address_is_followed_through_the_registers_of_a_thread():
    assert lost_descriptors(listing(*SHARED, *STACK, *MOVED, BEHIND)) == [BEHIND]
    assert not lost_descriptors(listing(*STACK, *SHARED, *MOVED, BEHIND))


@pytest.mark.parametrize("between", ["LDG.E.128 R68, desc[UR60][R2.64]", "IMAD.WIDE.U32 R68, R12, 0x2, R20", PRODUCT])
def test_a_result_of_several_registers_is_written_over_all(between):
    found = lost_descriptors(listing(*ADDRESS, *RIGHT, *SHARED, between.replace("R80,", "R64,"), *MOVED, BEHIND))
    assert found == [BEHIND]


def test_an_address_may_be_spilled():
    kept = ("STL [R1+0x4c], R69", "MOV R69, R1", "LDL R69, [R1+0x4c]")
    assert not lost_descriptors(listing(*SHARED, *kept, *MOVED, BEHIND))
    assert lost_descriptors(listing(*SHARED, *kept, "LDL R69, [R1+0x50]", *MOVED, BEHIND)) == [BEHIND]
    assert lost_descriptors(listing(*SHARED, kept[0], "STL [R1+0x4c], R1", kept[2], *MOVED, BEHIND)) == [BEHIND]


@pytest.mark.parametrize(
    "between",
    ["UMOV UR18, URZ", "UIMAD UR18, UR42, UR7, URZ", "UIMAD.WIDE.U32 UR17, UR22, UR15, URZ", "S2UR UR18, SR_CgaCtaId"],
)
def test_what_is_written_over_is_no_address_any_more(between):
    assert lost_descriptors(listing(*ADDRESS, *RIGHT, between, PRODUCT)) == [PRODUCT]


def test_every_turn_of_a_loop_counts():
    """Also the first, before an address is made, and the second, when it is written over."""
    assert not lost_descriptors(listing(*ADDRESS, *RIGHT, PRODUCT, "@P4 BRA 0x40"))
    assert lost_descriptors(listing(PRODUCT, *ADDRESS, *RIGHT, "@P4 BRA 0x0")) == [PRODUCT]
    assert lost_descriptors(listing(*ADDRESS, *RIGHT, PRODUCT, "UMOV UR18, URZ", "@P4 BRA 0x40")) == [PRODUCT]
    assert lost_descriptors(listing(*WRONG, PRODUCT, *ADDRESS, "UMOV UR6, UR42", "@P4 BRA 0x0")) == [PRODUCT]


def test_a_product_of_another_form_is_not_taken_for_right():
    assert lost_descriptors(listing("HGMMA.64x8x16.F32 R24, R4, R8, R24")) == ["HGMMA.64x8x16.F32 R24, R4, R8, R24"]


def test_such_a_binary_must_not_be_shipped():
    case = Case(40, 90, 16)
    assert not failures(Compiled(case, 141, 0, 16384, "wgmma"))
    assert "reads anywhere in 3 matrix" in failures(Compiled(case, 141, 0, 16384, "wgmma", lost=3))[0]
