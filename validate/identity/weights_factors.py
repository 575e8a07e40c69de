"""Constant factors that a graph may have in its weights rather than on its signal path.

Where the papers have them, by the fields of ``config.json``: after the embedding, after the output
projections of attention and MLP, and after the head. A graph that does not multiply there must have
the factor in the weight before that place.

Source: Granite team 2024, "Granite 3.0 Language Models", section 3, for the fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ingot.validate.identity.weights_graph import LOOKUPS, Graph
from ingot.validate.identity.weights_names import HEAD, bare, is_embedding

EMBEDDING, RESIDUAL, LOGITS = "embedding_multiplier", "residual_multiplier", "logits_scaling"
# What the output projections of attention, MLP and Mamba2 mixer are called.
PROJECTIONS = ("o_proj", "down_proj", "out_proj")
# The norm before the head.
NORMS = ("norm.weight", "norm_f.weight")


def factors(graph: Graph, config: Mapping[str, Any]) -> dict[str, tuple[np.float32, ...]]:
    """What each weight is multiplied by, one factor after the other, each product rounded.

    Args:
        graph: that holds the weights.
        config: ``config.json``, parsed.
    """
    found: dict[str, list[np.float32]] = {}

    def fold(name: str, factor: float) -> None:
        if name in graph.weights:
            found.setdefault(name, []).append(np.float32(factor))

    embedding, residual, logits = (_number(config, name) for name in (EMBEDDING, RESIDUAL, LOGITS))
    tables = [name for name in graph.weights if is_embedding(name)]
    # A table that is read for more than its rows is the head's as well.
    shared = [name for name in tables if any(_heads(graph, name))]
    norms = [name for name in graph.weights if bare(name) in NORMS]
    for table in tables:
        lookups = [use.node for use in graph.readers(table) if use.node.op_type in LOOKUPS]
        if embedding != 1.0 and not any(graph.multiplied(node.output[0]) for node in lookups):
            fold(table, embedding)
            # The head must not see it.
            for norm in norms if table in shared else ():
                fold(norm, 1.0 / embedding)
    if residual != 1.0:
        for name in graph.weights:
            owner, _, leaf = name.rpartition(".")
            if owner.rpartition(".")[2] not in PROJECTIONS or leaf != "weight":
                continue
            if not any(graph.multiplied(use.node.output[0]) for use in graph.readers(name)):
                fold(name, residual)
                fold(f"{owner}.bias", residual)
    if logits != 1.0:
        # The head's own weight takes it, and before a shared table the norm.
        own = [name for name in graph.weights if bare(name) == HEAD]
        for name, takes in [*((name, [name]) for name in own), *((t, norms) for t in shared)]:
            if not any(graph.multiplied(output) for output in _heads(graph, name)):
                for each in takes:
                    fold(each, 1.0 / logits)
    return {name: tuple(each) for name, each in found.items()}


def _number(config: Mapping[str, Any], name: str) -> float:
    """A factor as PyTorch takes it: rounded to float32."""
    value = config.get(name)
    return 1.0 if value is None else float(np.float32(value))


def _heads(graph: Graph, name: str) -> list[str]:
    """What products of a table or a head compute."""
    found = []
    for use in graph.readers(name):
        node = use.node
        if node.op_type == "Transpose":
            found += [each.node.output[0] for each in graph.readers(node.output[0])]
        elif node.op_type not in LOOKUPS:
            found.append(node.output[0])
    return found
