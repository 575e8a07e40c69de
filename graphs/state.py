"""The states a graph carries from call to call: their names, kinds, dtypes and symbolic shapes.

A model declares them, a manifest writes them down and a session keeps them. Standard library only,
so that a manifest is read, and a session run, without PyTorch.

Names follow Optimum and onnxruntime-genai. Letters: B batch, P past tokens, S = P + T.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["key", "value", "conv", "ssm"]
BATCH, SEQUENCE, PAST, TOTAL = "batch", "sequence", "past_sequence", "total_sequence"
# The input by which a call asks for the logits of its last tokens alone, and how many there are.
LOGITS_TO_KEEP, KEPT = "logits_to_keep", "kept_sequence"
Dimension = int | str


@dataclass(frozen=True)
class State:
    """One state tensor: a graph input and the graph output that replaces it.

    Attributes:
        kind: ``key`` and ``value`` grow along ``axis``; ``conv`` and ``ssm`` keep their shape.
        input: graph input name.
        output: graph output name.
        dtype: its name, as numpy and PyTorch have it.
        input_shape: integers and symbolic names.
        output_shape: integers and symbolic names.
        axis: the axis that grows by T each call, or None.
        shared: whether input and output may be one buffer: of fixed capacity along ``axis``, where
            there is one.
    """

    kind: Kind
    input: str
    output: str
    dtype: str
    input_shape: tuple[Dimension, ...]
    output_shape: tuple[Dimension, ...]
    axis: int | None
    shared: bool

    def shape(self, batch: int, past: int) -> tuple[int, ...]:
        """The input's shape for B sequences after P tokens, or with room for P where shared."""
        sizes = {BATCH: batch, PAST: past}
        return tuple(sizes[d] if isinstance(d, str) else d for d in self.input_shape)

    def cast(self, precision: str) -> State:
        """The same state in a graph of this precision; the scan's is float32 at least."""
        half = precision in ("float16", "bfloat16")
        return replace(self, dtype="float32" if half and self.kind == "ssm" else precision)


def key_value_states(layer: int, heads: int, head_size: int) -> tuple[State, ...]:
    """``past_key_values.{layer}.key|value [B, Hkv, P, D]`` -> ``present.{layer}.*``, S for P."""
    kinds: tuple[Kind, ...] = ("key", "value")
    return tuple(
        State(
            kind,
            f"past_key_values.{layer}.{kind}",
            f"present.{layer}.{kind}",
            "float32",
            (BATCH, heads, PAST, head_size),
            (BATCH, heads, TOTAL, head_size),
            axis=2,
            shared=False,
        )
        for kind in kinds
    )


def recurrent_states(layer: int, conv: tuple[int, ...], ssm: tuple[int, ...]) -> tuple[State, ...]:
    """``past_states.{layer}.conv|ssm [B, *conv|ssm]`` -> ``present_states.{layer}.*``, alike."""
    kinds: tuple[tuple[Kind, tuple[int, ...]], ...] = (("conv", conv), ("ssm", ssm))
    return tuple(
        State(
            kind,
            f"past_states.{layer}.{kind}",
            f"present_states.{layer}.{kind}",
            "float32",
            (BATCH, *shape),
            (BATCH, *shape),
            axis=None,
            shared=False,
        )
        for kind, shape in kinds
    )
