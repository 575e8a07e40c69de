"""Every planted fault, by what it is an instance of."""

from __future__ import annotations

from proof.faults import (
    constants,
    contract,
    exports,
    hybrids,
    kernels,
    last_logits,
    own_kernels,
    panels,
    rounding,
    sessions,
    shapes,
    structure,
    weights,
    whole_numbers,
)

FAULTS = [
    *shapes.FAULTS,
    *constants.FAULTS,
    *structure.FAULTS,
    *weights.FAULTS,
    *whole_numbers.FAULTS,
    *panels.FAULTS,
    *own_kernels.FAULTS,
    *rounding.FAULTS,
    *contract.FAULTS,
    *sessions.FAULTS,
    *kernels.FAULTS,
    *last_logits.FAULTS,
    *exports.FAULTS,
    *hybrids.FAULTS,
]
