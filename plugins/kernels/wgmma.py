"""What ptxas before 13.3 may get wrong on Hopper, looked for in what it made.

A warpgroup product (HGMMA) runs on while the instructions behind it are executed, and reads its
left operand from registers where Triton keeps it there. ptxas may give such a register another
value before the product has read it, which CUDA 13.3 mended: a wrong number now and then, without a
message. So no kernel is shipped in which that can be.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

# The first version without the fault.
FIXED = (13, 3)

_LINE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", re.MULTILINE)
_INSTRUCTION = re.compile(r"(?:@!?U?P\w+\s+)?(\S+)\s*(.*)")
_REGISTER = re.compile(r"R(\d+)\b")

# Registers of the left operand of one product, whatever its types.
_OF_OPERAND = 4
# Instructions whose first operand is a register that they read.
_NO_RESULT = (
    *("ST", "RED", "LDGSTS", "BAR", "BRA", "BRX", "JMP", "CALL", "RET", "EXIT", "WARPGROUP"),
    *("MEMBAR", "FENCE", "R2UR", "SYNCS", "UTMA", "CCTL"),
)
_JUMPS = ("BRA", "BRX", "JMP", "CALL", "RET")
_TWO = ("DADD", "DMUL", "DFMA")


def concerned(capability: int, ptxas: str) -> bool:
    """Whether a kernel of this ptxas for this compute capability has to be looked at."""
    return capability == 90 and tuple(map(int, ptxas.split(".")[:2])) < FIXED


def hazards(sass: str) -> list[str]:
    """Instructions that may spoil a product which still runs, one sentence each.

    A jump while a product runs counts as well: what follows it is not the next line.

    Args:
        sass: of one kernel, as ``cuobjdump -sass`` prints it.
    """
    running: dict[int, str] = {}
    found = []
    for operation, operands in _instructions(sass):
        if operation.startswith("WARPGROUP.DEPBAR"):
            running.clear()
        elif operation.startswith("HGMMA"):
            left = _REGISTER.match(operands.split(",")[1].strip())
            if left:
                begin = int(left[1])
                running.update(dict.fromkeys(range(begin, begin + _OF_OPERAND), operands))
        elif running and operation.startswith(_JUMPS):
            found.append(f"{operation} {operands} while HGMMA {next(iter(running.values()))} runs")
        else:
            spoiled = [r for r in _written(operation, operands) if r in running]
            if spoiled:
                found.append(
                    f"{operation} {operands} writes R{spoiled[0]}, which HGMMA "
                    f"{running[spoiled[0]]} may still read"
                )
    return found


def _instructions(sass: str) -> Iterator[tuple[str, str]]:
    for line in _LINE.findall(sass):
        match = _INSTRUCTION.match(line.strip())
        if match:
            yield match[1], match[2]


def _written(operation: str, operands: str) -> range:
    """The registers that an instruction writes."""
    first = _REGISTER.match(operands)
    if first is None or operation.startswith(_NO_RESULT):
        return range(0)
    begin = int(first[1])
    matrices = re.search(r"\.([24])$", operation) if operation.startswith("LDSM") else None
    if ".128" in operation:
        return range(begin, begin + 4)
    if matrices:
        return range(begin, begin + int(matrices[1]))
    wide = ".64" in operation or ".WIDE" in operation or operation.startswith(_TWO)
    return range(begin, begin + (2 if wide else 1))
