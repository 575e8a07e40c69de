"""What reads off a graph which experts a token was given: by what the kernels did.

A router's logits do not tell it. One kernel takes its top k from the softmax, where logits that are
an ulp apart are equal, another rounds them first, and equals go to the lower or to the higher id.
So beside each node that chooses by router logits stands a *probe*: the same operator with the same
attributes and the same logits, over tiny experts of which each answers every token with a one at
its own place. Its output ``[N, E]`` is the weight that each expert was given. Where a graph chooses
by explicit ids, such as those of a ``TopK``, the ids that the experts' products take are read
themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from ingot.plugins.cpu.operators import DOMAIN as PANELS
from ingot.plugins.operator import DOMAIN
from ingot.plugins.registry import OPERATORS
from ingot.validate.truth.probes_panels import PanelExperts, ones, synthetic_experts
from ingot.validate.truth.probes_quantised import (
    MICROSOFT,
    PREFIX,
    Format,
    QuantisedExperts,
    is_quantised,
)
from ingot.validate.truth.recording import Array

# What the inputs of ONNX Runtime's MoE are in the names of ``ingot::MoeDispatch``. With one row of
# gate and one of up it is all the same how they are interleaved.
MOE_INPUTS = ("x", "router_logits", "gate_up", "", "down")
# What lies between a router's logits and what chooses by them has none of these.
PRODUCTS = frozenset({"MatMul", "Gemm", "Einsum", "Conv", "Attention"})

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Reader:
    """Where the choice of one router can be read.

    Attributes:
        output: of the graph: the experts' weights ``[N, E]`` float32, with columns of zeros behind
            where whole blocks are filled, or their ids ``[N, K]``.
        ids: whether it is the latter.
        reverse: whether the kernel counts the experts from the last one.
    """

    output: str
    ids: bool = False
    reverse: bool = False

    def chosen(self, array: Array, experts: int) -> Mask:
        """The experts of each token as a mask ``[N, E]``.

        An expert whose weight rounds to zero counts as not chosen.
        """
        if self.ids:
            mask = np.zeros((len(array), experts), dtype=np.bool_)
            np.put_along_axis(mask, np.clip(array, 0, experts - 1), True, axis=-1)
        else:
            # A kernel that takes whole blocks only gives some columns more.
            mask = array[:, :experts] != 0
        return mask[:, ::-1] if self.reverse else mask


@dataclass(frozen=True)
class Probes:
    """How the choices of a graph's routers are read.

    Attributes:
        readers: by the name of a router's logits; several nodes may choose by the same.
        unread: by name, why a router's choice cannot be read, without a full stop.
    """

    readers: Mapping[str, tuple[Reader, ...]]
    unread: Mapping[str, str]

    @property
    def outputs(self) -> list[str]:
        """What has to be fetched in a run, each once."""
        found = (reader.output for readers in self.readers.values() for reader in readers)
        return list(dict.fromkeys(found))

    def chosen(self, router: str, arrays: Mapping[str, Array]) -> Mask | None:
        """The experts ``[N, E]`` that the tokens were given by a router; None if it is not read.

        Args:
            router: the name of its logits.
            arrays: the logits and ``outputs`` after a run, by name.
        """
        experts = arrays[router].shape[-1]
        masks = [r.chosen(arrays[r.output], experts) for r in self.readers.get(router, ())]
        # An expert that only some of the nodes take is one too many, and is seen as that.
        return np.logical_or.reduce(masks) if masks else None


def insert_probes(model: onnx.ModelProto, routers: Sequence[str]) -> Probes:
    """Put a probe beside each node that chooses by router logits, in place.

    Args:
        model: ``Probes.outputs`` are outputs of it afterwards.
        routers: the names of the router logits ``[N, E]``.
    """
    graph, synthetic = _Routes(model, routers), _Synthetic(model)
    readers: dict[str, list[Reader]] = {name: [] for name in routers}
    unread: dict[str, str] = {}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        nodes.append(node)
        place = _place_of_logits(node)
        route = None if place is None else graph.router_of(node.input[place])
        if place is None or route is None:
            continue
        experts = graph.experts_of(node)
        if experts is None or route.order is None:
            what = "is not known here" if experts is None else "has its experts in another order"
            unread[route.router] = f"{node.op_type}, which chooses by its logits, {what}"
            continue
        output = f"{PREFIX}.{route.router}.{len(readers[route.router])}"
        nodes += synthetic.probe(node, node.input[place], experts, output)
        readers[route.router].append(Reader(output, reverse=route.order < 0))
    for router, ids in graph.ids():
        readers[router].append(Reader(ids, ids=True))
    for router in routers:
        if not readers[router]:
            unread.setdefault(router, "no node that chooses by its logits was found")
    probes = Probes({n: tuple(r) for n, r in readers.items() if n not in unread}, unread)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    had = {value.name for value in model.graph.output}
    model.graph.output.extend(
        onnx.ValueInfoProto(name=name)
        for name in (*probes.outputs, *synthetic.kept)
        if name not in had
    )
    return probes


def _inputs_of(node: onnx.NodeProto) -> tuple[str, ...]:
    """What the inputs of an operator of ours are called, in panels or not; empty for another."""
    operator = OPERATORS.get(node.op_type) if node.domain in (DOMAIN, PANELS) else None
    return () if operator is None else tuple(each.name for each in operator.inputs)


def _gated_inputs(node: onnx.NodeProto) -> tuple[str, ...]:
    """The same of a node of routed gated MLPs, for which there are synthetic experts."""
    if (node.domain, node.op_type) == (MICROSOFT, "MoE"):
        return MOE_INPUTS
    names = _inputs_of(node)
    return names if set(names) == set(MOE_INPUTS) - {""} else ()


def _place_of_logits(node: onnx.NodeProto) -> int | None:
    """Where among its inputs a node that chooses has the router's logits; None of another."""
    if node.domain == MICROSOFT and node.op_type in ("MoE", "QMoE"):
        return 1
    names = _inputs_of(node)
    return names.index("router_logits") if "router_logits" in names else None


@dataclass(frozen=True)
class _Route:
    """From which router a value comes.

    Attributes:
        router: the name of its logits.
        order: 1 where the value has its experts in the router's order, -1 where in reverse; None
            where it is neither, or not known.
    """

    router: str
    order: int | None


class _Routes:
    """Finds in a graph what chooses by which router's logits.

    Args:
        model: which is only read.
        routers: the names of its router logits.
    """

    def __init__(self, model: onnx.ModelProto, routers: Sequence[str]) -> None:
        self._nodes = list(model.graph.node)
        self._routers = frozenset(routers)
        self._producer = {name: node for node in self._nodes for name in node.output}
        self._constants = {each.name: each for each in model.graph.initializer}

    def router_of(self, value: str) -> _Route | None:
        """The router whose logits a value was made of, without a product between."""
        waiting: list[tuple[str, int | None]] = [(value, 1)]
        seen = {value}
        while waiting:
            name, order = waiting.pop(0)
            if name in self._routers:
                return _Route(name, order)
            node = self._producer.get(name)
            if node is None or node.op_type in PRODUCTS or node.domain in (MICROSOFT, PANELS):
                continue
            if node.op_type == "Slice":
                order = None if order is None or not self._reverses(node) else -order
            elif node.op_type in ("Gather", "Concat"):
                order = None
            for each in node.input:
                if each and each not in seen:
                    seen.add(each)
                    waiting.append((each, order))
        return None

    def _reverses(self, node: onnx.NodeProto) -> bool:
        """Whether a Slice puts the last axis of ``[N, E]`` in reverse order, and does no more."""
        given = [self._constants.get(name) for name in node.input[1:]]
        found = [each for each in given if each is not None and not each.data_location]
        if len(node.input) != 5 or len(found) != 4:
            return False
        start, end, axis, step = (numpy_helper.to_array(each).tolist() for each in found)
        return start == [-1] and end[0] < -(2**31) and axis in ([1], [-1]) and step == [-1]

    def experts_of(self, node: onnx.NodeProto) -> int | None:
        """E of a node for which there are synthetic experts; None of another."""
        if is_quantised(node):
            stack = self._constant(node.input[2]) if Format.of(node) is not None else None
        else:
            parts = _gated_inputs(node)
            stack = self._constant(node.input[parts.index("down")]) if parts else None
        return None if stack is None or len(stack.dims) != 3 else stack.dims[0]

    def _constant(self, name: str) -> onnx.TensorProto | None:
        """The initializer that a value is, or is a cast of."""
        maker = self._producer.get(name)
        while maker is not None and maker.op_type == "Cast" and not maker.domain:
            name = maker.input[0]
            maker = self._producer.get(name)
        return self._constants.get(name)

    def ids(self) -> Iterator[tuple[str, str]]:
        """Routers, each with a value that has the ids of the chosen experts, ``[N, K]``.

        It is what the experts' products take; where these are not known, what a TopK gave.
        """
        taken: dict[str, list[str]] = {}
        used: dict[str, list[str]] = {}
        for node in self._nodes:
            if node.op_type == "TopK" and (route := self.router_of(node.input[0])):
                taken.setdefault(route.router, []).append(node.output[1])
            for value in self._id_inputs(node):
                if (route := self.router_of(value)) is not None:
                    used.setdefault(route.router, []).append(value)
        for router, values in {**taken, **used}.items():
            for value in dict.fromkeys(values):
                yield router, value

    def _id_inputs(self, node: onnx.NodeProto) -> list[str]:
        """The inputs of a node that are expert ids."""
        names = _inputs_of(node)
        if "expert_ids" in names:
            return [node.input[names.index("expert_ids")]]
        # Where rows are sorted by expert it is ``NonZero(Equal(all ids, expert_ids))``.
        compared = self._producer.get(node.input[0]) if node.op_type == "NonZero" else None
        if compared is None or compared.op_type != "Equal":
            return []
        return [name for name in compared.input if name not in self._constants]


class _Synthetic:
    """The experts of probes, shared by all that have as many.

    Args:
        model: to which they are added.

    Attributes:
        kept: values that have to be outputs of the graph, so that no kernel writes over them.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self._initializers = model.graph.initializer
        self._inputs: dict[int, dict[str, str]] = {}
        self._quantised = QuantisedExperts(model)
        self._panels = PanelExperts(model)
        self.kept: list[str] = []

    def probe(
        self, node: onnx.NodeProto, logits: str, experts: int, output: str
    ) -> list[onnx.NodeProto]:
        """The nodes of a probe, to be put behind the node that chooses.

        Args:
            node: the one that chooses.
            logits: that it is given.
            experts: E.
            output: the name of what the probe gives, ``[N, E]`` float32 or wider.
        """
        if is_quantised(node):
            return self._quantised.probe(node, logits, experts, output, self.kept)
        if node.domain == PANELS:
            return self._panels.probe(node, logits, experts, output, self.kept)
        nodes = [] if experts in self._inputs else self._add(logits, experts)
        inputs = {**self._inputs[experts], "router_logits": logits, "": ""}
        names = [inputs[part] for part in _gated_inputs(node)]
        made = helper.make_node(node.op_type, names, [output], domain=node.domain)
        made.attribute.extend(node.attribute)
        return [*nodes, made]

    def _add(self, logits: str, experts: int) -> list[onnx.NodeProto]:
        """Experts of inner size 1, and their input, a one for each token and expert."""
        prefix = f"{PREFIX}.{experts}"
        names = {part: f"{prefix}.{part}" for part in ("x", "gate_up", "down")}
        for part, array in zip(("gate_up", "down"), synthetic_experts(experts), strict=True):
            self._initializers.append(numpy_helper.from_array(array, names[part]))
        self._inputs[experts] = names
        self.kept.append(names["x"])
        return ones(logits, prefix, names["x"])
