"""Where the kernels are as ONNX Runtime's operators, and what they are called in a graph.

Standard library only.
"""

from __future__ import annotations

from pathlib import Path

from ingot.plugins.errors import IngotError

# Of the operators that read weights in panels.
DOMAIN = "ingot.cpu"
VERSION = 1
# Those that are no operators of ``plugins`` in panels.
LINEAR, LINEARS, MLP, EMBEDDING = "Linear", "Linears", "Mlp", "Embedding"
# What has no weights.
ATTENTION, MIXER = "Attention", "Mamba2Mixer"
LIBRARY = "libingot_ort.so"
INSTALLED = Path(__file__).resolve().parents[1] / "lib" / LIBRARY


class OperatorsError(IngotError):
    """A library of operators that is not there, or not the one that is needed."""


def installed() -> Path:
    """The library that belongs to this installation.

    Raises:
        OperatorsError: it was not built.
    """
    if not INSTALLED.is_file():
        raise OperatorsError(
            f"{INSTALLED} is missing, which has Ingot's own kernels; build it with `make cpu`, or "
            "give --kernels ort."
        )
    return INSTALLED
