"""``python tests/make_ingots.py FOLDER``: the seeded tiny ingots that the C++ tests open.

In one process, since most of an export of this size is the start of PyTorch.
"""

from __future__ import annotations

import sys
from pathlib import Path

import toy_hybrid

from ingot.export.build import build
from ingot.export.progress import Stages
from ingot.export.request import ExportRequest
from ingot.graphs.names import FAMILIES

# By folder name: family, target and task.
INGOTS = {
    **{
        f"{family}-{target}": (family, target, "generate")
        for family in (*FAMILIES, "toy_hybrid")
        for target in ("onnx", "ort")
    },
    "jetmoe-classify": ("jetmoe", "ort", "classify"),
    "olmoe-features": ("olmoe", "ort", "features"),
}


def main(folder: Path) -> None:
    with toy_hybrid.registered():
        for name, (family, target, task) in INGOTS.items():
            request = ExportRequest(
                family, target, folder / name, task=task, preset="tiny", overwrite=True
            )
            build(request, Stages(), None)
            print(folder / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
