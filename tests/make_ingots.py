"""``python tests/make_ingots.py FOLDER``: the seeded tiny ingots that the C++ tests open.

In one process, since most of an export of this size is the start of PyTorch.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import toy_hybrid
from kinds import KINDS

from ingot.export.build import build
from ingot.export.progress import Stages
from ingot.export.request import ExportRequest

# By folder name: family, target and what else is asked for.
INGOTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{
        f"{family}-{target}": (family, target, {})
        for family in (*KINDS, "toy_hybrid")
        for target in ("onnx", "ort")
    },
    # On Ingot's own kernels, once with scales of whole numbers.
    **{
        f"{family}-own": (
            family,
            "ort",
            {"kernels": "ingot", "weights": "int4" if family == "granite" else "checkpoint"},
        )
        for family in KINDS
    },
    "jetmoe-classify": ("jetmoe", "ort", {"task": "classify"}),
    "olmoe-features": ("olmoe", "ort", {"task": "features"}),
}


def main(folder: Path) -> None:
    with toy_hybrid.registered():
        for name, (family, target, more) in INGOTS.items():
            request = ExportRequest(
                family, target, folder / name, preset="tiny", overwrite=True, **more
            )
            build(request, Stages(), None)
            print(folder / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
