"""What an operator calls its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import onnx


def input_names(model: onnx.ModelProto) -> dict[tuple[str, str], Sequence[str]]:
    """Names of the inputs by operator, as the standard or the model's functions have them.

    Those of other domains have no names here.
    """
    own = {(each.domain, each.name): tuple(each.input) for each in model.functions}
    version = max((e.version for e in model.opset_import if e.domain in ("", "ai.onnx")), default=1)
    return {**_standard(version), **own}


@lru_cache
def _standard(version: int) -> dict[tuple[str, str], Sequence[str]]:
    return {
        ("", schema.name): tuple(each.name for each in schema.inputs)
        # In the order of their versions.
        for schema in onnx.defs.get_all_schemas_with_history()
        if schema.domain == "" and schema.since_version <= version
    }
