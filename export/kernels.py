"""Whose kernels an ort ingot runs on, where that is left to what is fastest."""

from __future__ import annotations

from ingot.export.ingot_schema import INGOT, ORT
from ingot.export.request import AUTO
from ingot.plugins.cpu.operators import INSTALLED

# By ``--weights`` the kernels that decode the most tokens a second, the fastest first, as
# ``benchmarks/peers.py`` measured them (docs/performance.md). It is looked up and never measured,
# so that equal inputs give equal bytes.
FASTEST = {
    None: (INGOT, ORT),
    "checkpoint": (INGOT, ORT),
    "fp32": (INGOT, ORT),
    "bf16": (INGOT, ORT),
    "fp16": (ORT,),
    "int8": (INGOT, ORT),
    "int4": (INGOT, ORT),
}


def chosen(kernels: str | None, target: str, weights: str | None) -> str:
    """Of ``export.request.KERNELS`` the one that is meant.

    Args:
        kernels: what was asked for; None for what other programs open too.
        target: of the export.
        weights: of ``export.request.WEIGHTS``; None where nothing was asked for.
    """
    if kernels != AUTO or target != "ort":
        return kernels or ORT
    has = {ORT, INGOT} if INSTALLED.is_file() else {ORT}
    return next(each for each in FASTEST[weights] if each in has)
