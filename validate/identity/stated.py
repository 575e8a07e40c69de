"""What a checkpoint's JSON says of ids, lengths and labels, without the export's readers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ingot.graphs.checkpoint import Checkpoint
from ingot.plugins.json_fields import safe
from ingot.plugins.json_file import read_object

MOST_POSITIONS = 2**31 - 1
# Kinds of rotary embedding that go as far as a factor says, or as the config does.
STRETCHED = ("linear", "dynamic", "yarn", "llama3")


def stated(checkpoint: Checkpoint) -> dict[str, Any]:
    """The fields of ``ingot.json`` that follow from a line of JSON, as far as it is there.

    A field that a config leaves to its architecture's default is absent here.

    Returns:
        Of ``vocab_size``, ``eos_token_ids``, ``pad_token_id`` and ``context_length``; and
        ``labels``, which a classifier has.
    """
    config = _object(checkpoint.path / "config.json")
    result: dict[str, Any] = {}
    # Another package's layout counts otherwise.
    if "model_type" not in config:
        return result
    result["labels"] = _labels(config)
    if config.get("vocab_size") is not None:
        result["vocab_size"] = config["vocab_size"]
    # A null says nothing, and then the other file counts.
    both = {**_said(config), **_said(_object(checkpoint.path / "generation_config.json"))}
    ends = both.get("eos_token_id")
    if ends is not None:
        result["eos_token_ids"] = list(dict.fromkeys(ends if isinstance(ends, list) else [ends]))
    pad = both.get("pad_token_id")
    if pad is not None:
        # By -1 a model says that nothing pads; then any id serves.
        result["pad_token_id"] = 0 if pad < 0 else pad
    context = _context(config)
    if context is not None:
        result["context_length"] = context
    return result


def _labels(config: dict[str, Any]) -> list[str]:
    """The classes' names by their number; two without a name where nothing is said of them."""
    named = config.get("id2label") or {}
    count = len(named) or config.get("num_labels") or 2
    return [safe(str(named.get(str(number), f"LABEL_{number}"))) for number in range(count)]


def _context(config: dict[str, Any]) -> int | None:
    """How far the positions go; None where that is not simply said."""
    most = config.get("max_position_embeddings")
    if most is None:
        return None
    scaling = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(scaling, dict) or len(scaling.keys() - {"rope_theta"}) == 0:
        return int(most)
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind == "default" and "factor" not in scaling:
        return int(most)
    factor = scaling.get("factor")
    if kind not in STRETCHED or factor is None:
        return None
    original = (
        config.get("original_max_position_embeddings")
        or scaling.get("original_max_position_embeddings")
        or most
    )
    return int(min(max(most, original * factor), MOST_POSITIONS))


def _said(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if value is not None}


def _object(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}
