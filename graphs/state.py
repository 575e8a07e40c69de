"""The states a graph carries from call to call: their names, kinds and symbolic shapes.

Names follow Optimum and onnxruntime-genai. Letters: B batch, P past tokens, S = P + T.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Kind = Literal["key", "value", "conv", "ssm"]
BATCH, SEQUENCE, PAST, TOTAL = "batch", "sequence", "past_sequence", "total_sequence"
Dimension = int | str


@dataclass(frozen=True)
class StateSpec:
    """One state tensor: a graph input and the graph output that replaces it.

    Attributes:
        kind: ``key`` and ``value`` grow along ``axis``; ``conv`` and ``ssm`` keep their shape.
        input: graph input name.
        output: graph output name.
        input_shape: integers and symbolic names.
        output_shape: likewise.
        axis: the axis that grows by T each call, or None.
    """

    kind: Kind
    input: str
    output: str
    input_shape: tuple[Dimension, ...]
    output_shape: tuple[Dimension, ...]
    axis: int | None

    def dtype(self, precision: torch.dtype) -> torch.dtype:
        """Of the tensor, in a graph of this precision; the scan's state is float32 at least."""
        if self.kind == "ssm":
            return torch.promote_types(precision, torch.float32)
        return precision


def key_value_states(layers: int, heads: int, head_size: int) -> tuple[StateSpec, ...]:
    """``past_key_values.{i}.key|value [B, Hkv, P, D]`` -> ``present.{i}.*``, S for P."""
    kinds: tuple[Kind, ...] = ("key", "value")
    return tuple(
        StateSpec(
            kind,
            f"past_key_values.{layer}.{kind}",
            f"present.{layer}.{kind}",
            (BATCH, heads, PAST, head_size),
            (BATCH, heads, TOTAL, head_size),
            2,
        )
        for layer in range(layers)
        for kind in kinds
    )


def recurrent_states(
    layers: int, conv: tuple[int, ...], ssm: tuple[int, ...]
) -> tuple[StateSpec, ...]:
    """``past_states.{i}.conv [B, *conv]`` and ``.ssm [B, *ssm]`` -> ``present_states.{i}.*``."""
    kinds: tuple[tuple[Kind, tuple[int, ...]], ...] = (("conv", conv), ("ssm", ssm))
    return tuple(
        StateSpec(
            kind,
            f"past_states.{layer}.{kind}",
            f"present_states.{layer}.{kind}",
            (BATCH, *shape),
            (BATCH, *shape),
            None,
        )
        for layer in range(layers)
        for kind, shape in kinds
    )
