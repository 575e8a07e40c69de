"""Layers of one kind, traced once and put in wherever there is one of them.

Tracing is most of an export's time, and the layers of a language model are few kinds of the same
code over other weights. So each layer is a call in the trace of the model; what the calls stand for
is traced for each kind apart, and takes their places in the graph. The time of an export is then
that of its bytes, and not of its layers.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import onnx_ir as ir
import torch
from onnx.defs import OpSchema
from onnx_ir.passes.common import InlinePass
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ingot.export.passes.dimensions import SYMBOL, renamed
from ingot.graphs.layers import ABSENT, Layer, Mixed, Model, Step

# The calls are only in a graph that is being captured.
DOMAIN = "ingot.layers"
_VERSION = 1
# Where ONNX has another name than torch.
_ONNX_TYPES = {torch.float32: "float", torch.float64: "double"}


class _Size(NamedTuple):
    """A size of a traced tensor.

    Attributes:
        example: what it is in the trace.
        varies: whether other calls may have another.
    """

    example: int
    varies: bool


@dataclasses.dataclass
class Kind:
    """Layers that compute the same of their weights.

    Attributes:
        layer: one of them.
        weights: names of its parameters.
        fields: those of ``Step`` that there are. Empty before the first call, as are those below.
        tensors: what the first call was given, each with its sizes and its dtype: ``x``, the fields
            of the step, the states and the weights.
        results: what it gave; the sizes are symbols of the trace.
    """

    layer: Layer
    weights: tuple[str, ...]
    fields: tuple[str, ...] = ()
    tensors: tuple[tuple[tuple[_Size, ...], torch.dtype], ...] = ()
    results: tuple[tuple[torch.Size, torch.dtype], ...] = ()

    @classmethod
    def of(cls, layer: Layer) -> Kind:
        """The one that a layer is of."""
        return cls(layer, tuple(name for name, _ in layer.named_parameters()))

    def __call__(self, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What a layer computes: ``x``, the fields of the step, the states and the weights.

        Returns:
            ``x``, the new states, and the logits of its routers.
        """
        x, *rest = given
        step = Step(**dict(zip(self.fields, rest, strict=False)))
        past = rest[len(self.fields) : len(rest) - len(self.weights)]
        weights = dict(zip(self.weights, rest[len(rest) - len(self.weights) :], strict=True))
        # The layer itself is a call while a model is traced.
        plain = object.__new__(type(self.layer))
        plain.__dict__.update(self.layer.__dict__)
        plain.__dict__.pop("forward", None)
        out: Mixed = torch.func.functional_call(plain, weights, (x, step, tuple(past)))
        return (out.x, *out.present, *out.router_logits)


# Of the model that is being traced, for the operator below, which can be given tensors and numbers.
_kinds: list[Kind] = []


@torch.library.custom_op("ingot::layer", mutates_args=())
def _layer(given: Sequence[torch.Tensor], kind: int) -> list[torch.Tensor]:
    raise NotImplementedError("it is only traced")


@_layer.register_fake
def _(given: Sequence[torch.Tensor], kind: int) -> list[torch.Tensor]:
    this = _kinds[kind]
    if not this.tensors:
        # Run, so that the trace learns which of its sizes have to be equal.
        made = this(*given)
        this.results = tuple((each.shape, each.dtype) for each in made)
        this.tensors = tuple((tuple(map(_size, each.shape)), each.dtype) for each in given)
    return [given[0].new_empty(shape, dtype=dtype) for shape, dtype in this.results]


def _size(size: int | torch.SymInt) -> _Size:
    if isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None:
        return _Size(size.node.hint, True)
    return _Size(int(size), False)


def _translate(given: Any, kind: int) -> Any:
    """Entry of the torch exporter's translation table: a call of the kind's function."""
    from onnxscript.values import Op, Opset

    this = _kinds[kind]
    # Kept out of onnx's registry, where a name means one thing for all of a process's exports.
    schema = OpSchema(
        _name(kind),
        DOMAIN,
        _VERSION,
        inputs=[_parameter(f"in{place}", dtype) for place, (_, dtype) in enumerate(this.tensors)],
        outputs=[_parameter(f"out{place}", dtype) for place, (_, dtype) in enumerate(this.results)],
    )
    return Op(Opset(DOMAIN, _VERSION), schema.name, schema)(*given)


def _parameter(name: str, dtype: torch.dtype) -> OpSchema.FormalParameter:
    return OpSchema.FormalParameter(name, f"tensor({_ONNX_TYPES.get(dtype, str(dtype)[6:])})")


TRANSLATIONS: dict[Any, Callable[..., Any]] = {torch.ops.ingot.layer.default: _translate}


def _name(kind: int) -> str:
    return f"Kind{kind}"


@contextmanager
def stamped(model: Model) -> Iterator[list[Kind]]:
    """While it lasts, layers of ``model`` that are not the only ones of their kind are calls.

    Yields:
        The kinds, for ``stamp``; empty where there are no two of any.
    """
    layers = [layer for layer, _ in model.decoder.by_layer()]
    kinds: list[Kind] = []
    numbers = []
    for layer in layers:
        own = Kind.of(layer)
        number = next((i for i, kind in enumerate(kinds) if _alike(kind, own)), len(kinds))
        if number == len(kinds):
            kinds.append(own)
        numbers.append(number)
    once = [number for number in range(len(kinds)) if numbers.count(number) == 1]
    called = [pair for pair in zip(layers, numbers, strict=True) if pair[1] not in once]
    assert not _kinds
    try:
        _kinds.extend(kinds)
        for layer, number in called:
            # In its place, so that parameters keep their names and the model its code.
            layer.forward = partial(_call, layer, number)  # type: ignore[method-assign]
        yield kinds if called else []
    finally:
        _kinds.clear()
        for layer, _ in called:
            del layer.forward


def _call(
    layer: Layer, number: int, x: torch.Tensor, step: Step, past: tuple[torch.Tensor, ...]
) -> Mixed:
    """``Layer.forward`` as one operator."""
    kind = _kinds[number]
    there = {name: each for name, each in step._asdict().items() if each is not ABSENT}
    kind.fields = tuple(there)
    # In a trace, they are the tensors that stand for the weights there.
    given = [x, *there.values(), *past, *dict(layer.named_parameters()).values()]
    x, *rest = torch.ops.ingot.layer(given, number)
    # A call that stands alone is given no caches, and makes them all the same.
    states = len(layer.states(0))
    return Mixed(x, tuple(rest[:states]), tuple(rest[states:]))


def stamp(
    model: ir.Model,
    kinds: list[Kind],
    translate: Callable[[torch.export.ExportedProgram], ir.Model],
) -> None:
    """Put the layers in the places of their calls.

    Args:
        model: what was translated of a model that was traced as ``stamped`` has it; changed.
        kinds: of ``stamped``.
        translate: what the tracer makes, to ONNX.
    """
    for number, kind in enumerate(kinds):
        name = _name(number)
        calls = [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, name)]
        if not calls:
            continue
        traced = translate(_trace(kind))
        _rename(traced.graph, calls[0])
        function = _function(traced, name)
        model.functions.update({**traced.functions, function.identifier(): function})
    InlinePass(lambda function: function.domain == DOMAIN)(model)
    model.opset_imports.pop(DOMAIN, None)


class _Layer(nn.Module):
    """A kind as the tracer takes it; its layer is in no module tree, for weights are arguments."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self._kind = kind

    def forward(self, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return self._kind(*given)


def _trace(kind: Kind) -> torch.export.ExportedProgram:
    with FakeTensorMode():
        given = tuple(
            torch.empty([size.example for size in sizes], dtype=dtype)
            for sizes, dtype in kind.tensors
        )
    dynamic = tuple(
        {axis: torch.export.Dim.AUTO for axis, size in enumerate(sizes) if size.varies} or None
        for sizes, _ in kind.tensors
    )
    return torch.export.export(_Layer(kind), (given,), dynamic_shapes=(dynamic,), strict=False)


def _rename(graph: ir.Graph, call: ir.Node) -> None:
    """Give sizes in ``graph`` the names that they have where it is called."""
    names: dict[str, str] = {}
    for mine, outer in zip(graph.inputs, call.inputs, strict=True):
        assert outer is not None and mine.shape is not None and outer.shape is not None
        for found, wanted in zip(mine.shape, outer.shape, strict=True):
            if isinstance(found, ir.SymbolicDim) and re.fullmatch(SYMBOL, str(found.value)):
                names[str(found.value)] = str(getattr(wanted, "value", wanted))
    for node in graph:
        for value in node.outputs:
            if value.shape is not None:
                value.shape = renamed(value.shape, names)


def _function(traced: ir.Model, name: str) -> ir.Function:
    """What was traced, as a function that a node calls."""
    graph = traced.graph
    for value in list(graph.initializers.values()):
        constant = ir.node("Constant", [], {"value": value.const_value})
        constant.outputs[0].shape, constant.outputs[0].type = value.shape, value.type
        graph.insert_before(graph[0], constant)
        value.replace_all_uses_with(constant.outputs[0])
        del graph.initializers[value.name or ""]
    return ir.Function(DOMAIN, name, graph=graph, attributes=[])


def _alike(one: Any, other: Any) -> bool:
    """Whether two layers, or parts of them, compute the same of their parameters.

    What is not known to be equal is not: a layer is then traced for itself.
    """
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, nn.Parameter):
        return (one.shape, one.dtype) == (other.shape, other.dtype)
    if isinstance(one, nn.Module):
        return _alike(vars(one), vars(other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(_alike(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, partial):
        return _alike((one.func, one.args, one.keywords), (other.func, other.args, other.keywords))
    if dataclasses.is_dataclass(one):
        return all(
            _alike(getattr(one, each.name), getattr(other, each.name))
            for each in dataclasses.fields(one)
        )
    if isinstance(one, (bool, int, float, str, bytes, torch.dtype, type(None))):
        return bool(one == other)
    return isinstance(one, set) and bool(one == other)
