"""One validation in a process of its own, with fewer instructions or processors.

The request is JSON on standard input, the fields of ``validate.spread.Task`` and

    out: the file to write ``[[stage, name, kind, error, floor], ...]`` into
    processors: how many processors this process may use; null for all
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def main(request: dict[str, Any]) -> None:
    """Validate as the request says, and write the figures."""
    count = request["processors"]
    if count is not None and hasattr(os, "sched_setaffinity"):
        # Before any library asks how many there are.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])
    from ingot.export.ingot import Manifest
    from ingot.graphs.merge import open_checkpoint
    from ingot.plugins.whole import write_whole
    from ingot.validate.report.texts import plain
    from ingot.validate.run import validate_ingot
    from ingot.validate.spread import figures
    from ingot.validate.truth.against import OtherReference
    from ingot.validate.truth.inputs import Plan
    from ingot.validate.truth.reference import Reference

    ingot, adapter = Path(request["ingot"]), request["adapter"]
    manifest = Manifest.read(ingot)
    checkpoint = open_checkpoint(
        Path(request["checkpoint"]), None if adapter is None else Path(adapter)
    )
    reference = Reference.of_ingot(ingot, manifest, checkpoint)
    if request["against"] is not None:
        reference = OtherReference(reference, Path(request["against"]), "the other ingot")
    plan = Plan(**request["plan"])
    report = validate_ingot(
        ingot, reference, plan=plan, seed=request["seed"], verify=False, costs=False
    )
    rows = [[*key, *values] for key, values in figures(report).items()]
    write_whole(Path(request["out"]), json.dumps(plain(rows)))


if __name__ == "__main__":
    main(json.load(sys.stdin))
