"""Module -> canonical ONNX; the only caller of the torch exporter.

The graph is traced with fake weights that enter as inputs, so capture costs no memory and no
exporter pass can read, fold or copy a weight. They become initializers afterwards, each a lazy
tensor that reads the checkpoint only when it is written.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import NameFixPass, RemoveUnusedNodesPass
from onnxscript import optimizer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from export.passes.dimensions import NameDimensions
from export.passes.functions import AttachFunctionBodies
from export.passes.metadata import DropTracerMetadata
from export.passes.reshapes import SimplifyReshapes, SizesFromTokens
from export.passes.scales import FoldScales
from export.passes.weights import FoldWeightTransposes, WeightsToInitializers
from graphs.state import BATCH, PAST, SEQUENCE, TOTAL, StateSpec
from plugins import moe_dispatch

OPSET = 23
WEIGHT_PREFIX = "weight."

# FX overload of each custom op -> the function that emits its node.
TRANSLATIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.ingot.moe_dispatch.default: moe_dispatch.translate,
}


@dataclass(frozen=True)
class Captured:
    """A captured graph.

    Attributes:
        model: canonical ONNX with lazy weights.
        main_output: ``logits`` or ``last_hidden_state``.
        states: the states, in the order of the graph's inputs.
    """

    model: ir.Model
    main_output: str
    states: tuple[StateSpec, ...]


class _Traced(nn.Module):
    """The model as a function of its weights, with outputs flattened into a tuple."""

    def __init__(self, model: nn.Module, extra_outputs: tuple[str, ...]) -> None:
        super().__init__()
        # Kept out of the module tree: its parameters must stay arguments of the call.
        object.__setattr__(self, "_model", model)
        self.extra_outputs = extra_outputs

    def forward(
        self,
        weights: dict[str, torch.Tensor],
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: tuple[torch.Tensor, ...],
    ) -> tuple[torch.Tensor, ...]:
        arguments = (input_ids, attention_mask, position_ids, past)
        out = torch.func.functional_call(self.__dict__["_model"], weights, arguments)
        extra = [tensor for name in self.extra_outputs for tensor in getattr(out, name)]
        return (out.main, *out.present, *extra)


def capture(
    model: nn.Module,
    read_block: Callable[[str, int], torch.Tensor],
    *,
    extra_outputs: tuple[str, ...] = (),
) -> Captured:
    """Trace a graph into canonical ONNX with dynamic batch, sequence and past.

    Args:
        model: an eager graph on the meta device.
        read_block: parameter name and block -> that block (one expert of a stack ``[E, ...]``, or
            with block 0 a whole parameter); called only when weights are written.
        extra_outputs: ``router_logits``, ``hidden_states`` or both, as far as the architecture has
            them; each layer's tensor becomes ``{name}.{i}``.
    """
    states: tuple[StateSpec, ...] = getattr(model, "states")
    main_output: str = getattr(model, "main_output")
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    exported = _trace(_Traced(model, extra_outputs), shapes, states)
    with _quiet():
        program = torch.onnx.export(
            exported,
            dynamo=True,
            opset_version=OPSET,
            custom_translation_table=TRANSLATIONS,
            optimize=False,
            verbose=False,
        )
    assert program is not None
    result = program.model
    _name_interface(result, list(shapes), states, main_output, _extra_names(model, extra_outputs))
    inputs = {
        "input_ids": (BATCH, SEQUENCE),
        "attention_mask": (BATCH, TOTAL),
        "position_ids": (BATCH, SEQUENCE),
        **{state.input: state.input_shape for state in states},
    }
    optimizer.optimize(result, onnx_shape_inference=False)
    passes = ir.passes.Sequential(
        WeightsToInitializers(WEIGHT_PREFIX, read_block),
        FoldWeightTransposes(),
        FoldScales(),
        NameDimensions(inputs),
        SimplifyReshapes(),
        SizesFromTokens(("input_ids", "attention_mask")),
        RemoveUnusedNodesPass(),
        AttachFunctionBodies(),
        DropTracerMetadata(),
        NameFixPass(),
    )
    passes(result)
    result.graph.name = type(model).__name__
    result.producer_name = "ingot"
    return Captured(result, main_output, states)


def _trace(
    traced: nn.Module, shapes: dict[str, tuple[int, ...]], states: tuple[StateSpec, ...]
) -> torch.export.ExportedProgram:
    # Sizes that differ from each other and from 0 and 1, which the tracer would specialise.
    sizes = {BATCH: 2, SEQUENCE: 3, PAST: 5, TOTAL: 8}
    with FakeTensorMode():
        weights = {name: torch.empty(shape) for name, shape in shapes.items()}
        input_ids = torch.zeros(sizes[BATCH], sizes[SEQUENCE], dtype=torch.int64)
        attention_mask = torch.ones(sizes[BATCH], sizes[TOTAL], dtype=torch.int64)
        past = tuple(
            torch.zeros([sizes[d] if isinstance(d, str) else d for d in state.input_shape])
            for state in states
        )
    auto = torch.export.Dim.AUTO
    dynamic_shapes = (
        dict.fromkeys(weights),
        {0: auto, 1: auto},
        {0: auto, 1: auto},
        {0: auto, 1: auto},
        tuple(
            {axis: auto for axis, d in enumerate(state.input_shape) if isinstance(d, str)}
            for state in states
        ),
    )
    arguments = (weights, input_ids, attention_mask, torch.zeros_like(input_ids), past)
    return torch.export.export(traced, arguments, dynamic_shapes=dynamic_shapes, strict=False)


def _extra_names(model: nn.Module, extra_outputs: tuple[str, ...]) -> list[str]:
    layers: int = getattr(model, "config").num_hidden_layers
    counts = {"router_logits": layers, "hidden_states": layers + 1}
    return [f"{name}.{index}" for name in extra_outputs for index in range(counts[name])]


def _name_interface(
    model: ir.Model,
    weights: list[str],
    states: tuple[StateSpec, ...],
    main_output: str,
    extra: list[str],
) -> None:
    """Give inputs and outputs their documented names; weights get a prefix until they move."""
    names = [WEIGHT_PREFIX + name for name in weights]
    names += ["input_ids", "attention_mask", "position_ids", *(state.input for state in states)]
    for value, name in zip(model.graph.inputs, names, strict=True):
        value.name = name
    names = [main_output, *(state.output for state in states), *extra]
    # One value may be two outputs (a hidden state that is the last); each output gets its own.
    seen: set[int] = set()
    for index, value in enumerate(model.graph.outputs):
        if id(value) in seen:
            copy = ir.node("Identity", [value])
            copy.outputs[0].type, copy.outputs[0].shape = value.type, value.shape
            model.graph.append(copy)
            model.graph.outputs[index] = copy.outputs[0]
        seen.add(id(value))
    for value, name in zip(model.graph.outputs, names, strict=True):
        value.name = name


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's chatter about packages nobody asked for."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
