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
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import NameFixPass, RemoveUnusedNodesPass
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ingot.export.composites import rename_composites, undecomposed
from ingot.export.passes.dimensions import NameDimensions
from ingot.export.passes.functions import AttachFunctionBodies
from ingot.export.passes.graph_pass import Applied, run
from ingot.export.passes.logits_to_keep import KeepLastLogits
from ingot.export.passes.metadata import DropTracerMetadata
from ingot.export.passes.reshapes import SimplifyReshapes, SizesFromTokens
from ingot.export.passes.scales import FoldScales, NoteFactors
from ingot.export.passes.weights import FoldWeightTransposes, WeightsToInitializers
from ingot.export.request import EXTRA_OUTPUTS
from ingot.export.simplify import simplify
from ingot.export.stamp import TRANSLATIONS as CALLS
from ingot.export.stamp import stamp, stamped
from ingot.graphs.layers import Model
from ingot.graphs.state import BATCH, PAST, SEQUENCE, TOTAL, Dimension, State
from ingot.plugins import causal_conv, experts
from ingot.plugins.registry import OPERATORS

OPSET = 23
WEIGHT_PREFIX = "weight."
POSITIONS = "position_ids"
# input_ids, attention_mask and position_ids come before the states.
TOKEN_INPUTS = 3

# FX overload of each custom op -> the function that emits its node; or standard operators, where
# every runtime has them.
TRANSLATIONS: dict[Any, Callable[..., Any]] = {
    **{operator.overload: operator.translate for operator in OPERATORS.values()},
    causal_conv.causal_conv.overload: causal_conv.translate,
    torch.ops.ingot.choose_experts.default: experts.translate_choose_experts,
    **CALLS,
}


@dataclass(frozen=True)
class Captured:
    """A captured graph.

    Attributes:
        model: canonical ONNX with lazy weights.
        main_output: ``logits`` or ``last_hidden_state``.
        states: the states, in the order of the graph's inputs and of its precision.
        passes: what each pass of the capture did to the graph that the tracer made.
        canonical: nodes by op type before a lowering; empty where there was none.
        lowering: what each pass of a lowering did to the canonical graph.
    """

    model: ir.Model
    main_output: str
    states: tuple[State, ...]
    passes: tuple[Applied, ...] = ()
    canonical: dict[str, int] = field(default_factory=dict)
    lowering: tuple[Applied, ...] = ()


class _Traced(nn.Module):
    """The model as a function of its weights, with outputs by their documented names."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        # Kept out of the module tree: its parameters must stay arguments of the call.
        object.__setattr__(self, "_model", model)

    def forward(
        self,
        weights: dict[str, torch.Tensor],
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: tuple[torch.Tensor, ...],
    ) -> dict[str, torch.Tensor]:
        model: Model = self.__dict__["_model"]
        arguments = (input_ids, attention_mask, position_ids, past)
        out = torch.func.functional_call(model, weights, arguments)
        return {
            model.main_output: out.main,
            **{state.output: each for state, each in zip(model.states, out.present, strict=True)},
            **{
                f"{name}.{index}": tensor
                for name in EXTRA_OUTPUTS
                for index, tensor in enumerate(getattr(out, name))
            },
        }


def capture(
    model: Model,
    read_block: Callable[[str, int], torch.Tensor],
    *,
    precision: torch.dtype = torch.float32,
    extra_outputs: tuple[str, ...] = (),
    exact_matrices: bool = False,
) -> Captured:
    """Trace a graph into canonical ONNX with dynamic batch, sequence and past.

    Args:
        model: an eager graph on the meta device, its parameters of the dtypes to store.
        read_block: parameter name and block -> that block (one expert of a stack ``[E, ...]``, or
            with block 0 a whole parameter); called only when weights are written.
        precision: of the activations, and of the states that follow it.
        extra_outputs: ``router_logits``, ``hidden_states`` or both, as far as the architecture has
            them; each one's i-th tensor becomes ``{name}.{i}``. The values have these names in
            every graph, so that a validation can find them.
        exact_matrices: leave constant factors on the signal path where they would change a matrix
            of the checkpoint.
    """
    states = tuple(state.cast(str(precision).removeprefix("torch.")) for state in model.states)
    main_output = model.main_output
    weights = {name: (tuple(p.shape), p.dtype) for name, p in model.named_parameters()}
    inputs = _inputs(states)
    with stamped(model) as kinds:
        exported = _trace(_Traced(model), weights, inputs, states)
        with _quiet():
            result = _to_model(exported)
            stamp(result, kinds, _to_model)
    outputs = list(exported.call_spec.out_spec.context)
    _name_interface(result, [*(WEIGHT_PREFIX + name for name in weights), *inputs], outputs)
    _keep_outputs(result, {main_output, *(state.output for state in states)}, extra_outputs)
    NoteFactors()(result)
    simplify(result)
    passes = [
        WeightsToInitializers(WEIGHT_PREFIX, read_block),
        FoldWeightTransposes(),
        FoldScales(matrices=not exact_matrices),
        NameDimensions(inputs),
        SimplifyReshapes(),
        SizesFromTokens(("input_ids", "attention_mask")),
        *([KeepLastLogits(model.head_table)] if model.head_table else []),
        RemoveUnusedNodesPass(),
        AttachFunctionBodies(),
        DropTracerMetadata(),
        NameFixPass(),
    ]
    applied = run(result, passes)
    result.graph.name = type(model).__name__
    result.producer_name = "ingot"
    return Captured(result, main_output, states, applied)


def _inputs(states: tuple[State, ...]) -> dict[str, tuple[Dimension, ...]]:
    """Every input but the weights, in order, with its symbolic shape.

    The mask covers the past as well where a cache holds it; a state of fixed size holds no
    positions that could be masked, and neither does a graph without state.
    """
    cached = any(PAST in state.input_shape for state in states)
    return {
        "input_ids": (BATCH, SEQUENCE),
        "attention_mask": (BATCH, TOTAL if cached else SEQUENCE),
        POSITIONS: (BATCH, SEQUENCE),
        **{state.input: state.input_shape for state in states},
    }


def _trace(
    traced: nn.Module,
    parameters: dict[str, tuple[tuple[int, ...], torch.dtype]],
    inputs: dict[str, tuple[Dimension, ...]],
    states: tuple[State, ...],
) -> torch.export.ExportedProgram:
    # Sizes that differ from each other and from 0 and 1, which the tracer would specialise.
    sizes = {BATCH: 2, SEQUENCE: 3, PAST: 5, TOTAL: 8}
    with FakeTensorMode():
        weights = {
            name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in parameters.items()
        }
        tokens = [
            torch.ones([sizes[str(d)] for d in shape], dtype=torch.int64)
            for shape in list(inputs.values())[:TOKEN_INPUTS]
        ]
        past = tuple(
            torch.zeros(state.shape(sizes[BATCH], sizes[PAST]), dtype=getattr(torch, state.dtype))
            for state in states
        )
    dynamic = [
        {axis: torch.export.Dim.AUTO for axis, d in enumerate(shape) if isinstance(d, str)}
        for shape in inputs.values()
    ]
    return torch.export.export(
        traced,
        (weights, *tokens, past),
        dynamic_shapes=(
            dict.fromkeys(weights),
            *dynamic[:TOKEN_INPUTS],
            tuple(dynamic[TOKEN_INPUTS:]),
        ),
        strict=False,
    )


def _to_model(program: torch.export.ExportedProgram) -> ir.Model:
    result: ir.Model = to_onnx(program).model
    return result


def to_onnx(program: torch.export.ExportedProgram) -> torch.onnx.ONNXProgram:
    """A program's ONNX; it is decomposed, which traces it again, only where it must be.

    Args:
        program: whose composite operators are renamed in place.

    Raises:
        torch.onnx.OnnxExporterError: it has an operator that is not translated, even decomposed.
    """
    if rename_composites(program):
        with contextlib.suppress(torch.onnx.OnnxExporterError), undecomposed(program):
            return _translate(program)
    return _translate(program)


def _translate(program: torch.export.ExportedProgram) -> torch.onnx.ONNXProgram:
    made = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=OPSET,
        custom_translation_table=TRANSLATIONS,
        optimize=False,
        verbose=False,
    )
    assert made is not None
    return made


def _name_interface(model: ir.Model, inputs: list[str], outputs: list[str]) -> None:
    """Give inputs and outputs their documented names; weights get a prefix until they move.

    A token input that nothing reads, such as the positions of a model without any, goes.
    """
    for value, name in zip(list(model.graph.inputs), inputs, strict=True):
        value.name = name
        if name == POSITIONS and not value.uses():
            model.graph.inputs.remove(value)
    # One value may be two outputs (a hidden state that is the last); each output gets its own.
    seen: set[int] = set()
    for index, value in enumerate(model.graph.outputs):
        if id(value) in seen:
            copy = ir.node("Identity", [value])
            copy.outputs[0].type, copy.outputs[0].shape = value.type, value.shape
            model.graph.append(copy)
            model.graph.outputs[index] = copy.outputs[0]
        seen.add(id(value))
    for value, name in zip(model.graph.outputs, outputs, strict=True):
        value.name = name


def _keep_outputs(model: ir.Model, always: set[str], extra_outputs: tuple[str, ...]) -> None:
    """Drop the outputs that nobody asked for; their values keep the names."""
    for value in list(model.graph.outputs):
        name = value.name or ""
        if name not in always and name.partition(".")[0] not in extra_outputs:
            model.graph.outputs.remove(value)


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
