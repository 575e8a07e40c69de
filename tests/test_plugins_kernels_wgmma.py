"""Finding registers that are written while a warpgroup product may still read them."""

from __future__ import annotations

import pytest

from ingot.plugins.kernels.wgmma import concerned, hazards

PRODUCT = "HGMMA.64x32x16.F32.BF16 R40, R56, gdesc[UR8].tnspB, R40"


def sass(*instructions: str) -> str:
    """As cuobjdump prints them."""
    return "\n".join(
        f"        /*{16 * at:04x}*/                   {each} ;       /* 0x0000003c3800720c */"
        for at, each in enumerate(instructions)
    )


@pytest.mark.parametrize(
    "spoiling",
    [
        "MOV R56, R2",
        "@P0 FADD R59, R2, R3",
        "LDS.128 R54, [R9]",
        "IMAD.WIDE R58, R2, 0x4, R4",
        "DADD R58, R2, R4",
        "LDSM.16.M88.4 R53, [R9]",
    ],
)
def test_finds_a_write_before_the_wait(spoiling: str) -> None:
    found = hazards(sass("WARPGROUP.ARRIVE", PRODUCT, spoiling, "WARPGROUP.DEPBAR.LE gsb0, 0x0"))
    assert len(found) == 1 and "which HGMMA R40, R56" in found[0]


@pytest.mark.parametrize(
    "harmless",
    [
        ("MOV R60, R56",),
        ("MOV R55, R56",),
        ("LDS.64 R54, [R56]",),
        ("STS.128 [R56], R4",),
        ("@!P1 STG.E [R56.64], R57",),
        ("WARPGROUP.DEPBAR.LE gsb0, 0x0", "MOV R56, R2"),
        ("WARPGROUP.DEPBAR.LE gsb0, 0x0", "BRA 0x100"),
    ],
)
def test_passes_what_spoils_nothing(harmless: tuple[str, ...]) -> None:
    assert hazards(sass(PRODUCT, *harmless)) == []


def test_finds_a_jump_while_a_product_runs() -> None:
    assert hazards(sass(PRODUCT, "@P0 BRA 0x0100"))[0].startswith("BRA 0x0100 while HGMMA")


def test_an_operand_in_shared_memory_cannot_be_spoiled() -> None:
    shared = "HGMMA.64x32x16.F32.BF16 R40, gdesc[UR8], R40"
    assert hazards(sass(shared, "MOV R56, R2", "BRA 0x0100")) == []


@pytest.mark.parametrize(
    ("capability", "ptxas", "expected"),
    [(90, "12.9.86", True), (90, "13.2.1", True), (90, "13.3.0", False), (80, "12.9.86", False)],
)
def test_concerns_hopper_and_what_is_older_than_the_mending(
    capability: int, ptxas: str, expected: bool
) -> None:
    assert concerned(capability, ptxas) is expected
