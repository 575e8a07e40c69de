"""What a kernel file declares: the forms to compile ahead of time.

A *form* is a Triton function with its compile-time constants fixed; each becomes one cubin for
each compute capability. Which forms one call launches, and on what grid, is decided in one place
only, the C++ host layer (``plugins/csrc``). Tests run that host layer as it is, with the CUDA
driver replaced by one that hands each launch to Triton's interpreter
(``plugins/kernels/interpret.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Ampere, Ada, Hopper, Blackwell.
COMPUTE_CAPABILITIES = (80, 86, 89, 90, 100, 120)

# What the tuning candidates are compiled for: they were chosen for Hopper.
TUNED = (90,)


def runs_on(compiled: int, device: int) -> bool:
    """Whether a kernel compiled for one compute capability runs on a device of another.

    Below 9.0 it does within one major version, from its own minor version on (CUDA's binary
    compatibility). From 9.0 on Triton compiles for architecture-specific targets, such as sm_90a
    and sm_120a, which fit one capability and no other. ``plugins/csrc/forms.h`` has the same rule.
    """
    if compiled >= 90:
        return compiled == device
    return compiled // 10 == device // 10 and compiled <= device


# Names of the element types in form names; the C++ side is `ingot::dtype_name`.
DTYPES = ("fp32", "fp16", "bf16")


@dataclass(frozen=True)
class Form:
    """One compiled form of a kernel.

    Attributes:
        name: its symbol, unique in the library, such as ``moe_gate_up_bf16_m64``.
        function: the ``@triton.jit`` function.
        signature: run-time arguments in order, name -> Triton type (``*bf16``, ``i32``, ``fp32``).
            Pointers are always multiples of 16 bytes.
        constants: compile-time arguments by name.
        multiples_of_16: names of ``i32`` arguments the host passes only multiples of 16 in.
        num_warps: warps of a block.
        num_stages: depth of the software pipeline.
        hot: whether its time matters; a hot form must not spill registers in its loop.
        capabilities: those it is compiled for.
        candidate: of a form that is not shipped but compared with the shipped ones, what it is a
            part of; the forms of one candidate are of use together only.
    """

    name: str
    function: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    multiples_of_16: frozenset[str] = frozenset()
    num_warps: int = 4
    num_stages: int = 2
    hot: bool = True
    capabilities: tuple[int, ...] = COMPUTE_CAPABILITIES
    candidate: str = ""
