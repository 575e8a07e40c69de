"""Experts that are given: what makes an eager graph, and a graph on ONNX Runtime, use them.

To force a choice, router logits are moved as little as will do (``replayed``): where a token's own
choice is clearly the wanted one they stay as they are, to the bit; where it is not, the chosen and
the others are moved to either side of their midpoint. A difference of an ulp is not clear: a kernel
that takes its top k from the softmax sees none there. A flip that rounding explains moves a logit
by less than its rounding error, or by the nudge.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import torch
from onnx import helper
from torch.utils._python_dispatch import TorchDispatchMode

import ingot.plugins.experts  # noqa: F401  (registers its operator)
from ingot.plugins.registry import OPERATORS
from ingot.validate.truth.inputs import Inputs
from ingot.validate.truth.recording import ROUTER_LOGITS, Tensors, all_router_logits, main_run

Array = npt.NDArray[Any]
Chosen = npt.NDArray[np.bool_]

DOMAIN = "ingot.validate"
OPERATOR = "Replay"
# How far apart two logits are put, relative to the largest of the token (and at least that):
# enough for any float32 top-k to tell them apart, and for one of the softmax, as in ONNX Runtime's
# MoE, where a small difference of small logits would round away.
NUDGE = 2.0**-20
# The share of that from which on a difference is clear to every such top-k, and nothing is moved:
# below 1, since what was put so far apart is rounded, and 4 units in the last place of a softmax.
CLEAR = 0.5

# The operators that choose, and the place of the router's logits among their arguments.
_ROUTED: dict[Any, int] = {
    torch.ops.ingot.choose_experts.default: 0,
    **{
        operator.overload: place
        for operator in OPERATORS.values()
        for place, tensor in enumerate(operator.inputs)
        if tensor.name == "router_logits"
    },
}


def choices(router_logits: Array, top_k: int) -> Chosen:
    """The experts that logits ``[N, E]`` choose, as a mask; among equals the lower id is chosen."""
    order = np.argsort(-router_logits, axis=-1, kind="stable")[:, :top_k]
    result = np.zeros(router_logits.shape, dtype=np.bool_)
    np.put_along_axis(result, order, True, axis=-1)
    return result


@dataclass(frozen=True)
class Routers:
    """A model's routers, and what they choose.

    Attributes:
        by_layer: how many each layer has.
        top_k: experts that each chooses for a token; 0 where there is none.
    """

    by_layer: tuple[int, ...]
    top_k: int

    def names(self) -> tuple[str, ...]:
        """What the routers are called, in the order they run."""
        return tuple(
            f"layer {layer}" if count == 1 else f"layer {layer}, router {router}"
            for layer, count in enumerate(self.by_layer)
            for router in range(count)
        )

    def chosen(self, truth: Tensors, inputs: Inputs, number: int) -> list[Chosen]:
        """The experts ``[B*T, E]`` to force in one call, router by router; all for padding.

        They are those that the run gives, or else the truth's.

        Args:
            truth: one call of its recording; not looked at where the run gives experts.
            inputs: that it was fed.
            number: of the call in the main run.
        """
        if inputs.forced:
            return list(inputs.forced[number])
        call = main_run(inputs)[number]
        real = (inputs.attention_mask[:, call.columns] != 0).reshape(-1)
        return forced_choices(all_router_logits(truth), real, self.top_k)


def forced_choices(router_logits: Sequence[Array], real: Chosen, top_k: int) -> list[Chosen]:
    """The experts ``[B*T, E]`` that logits choose, router by router; all for padding.

    Args:
        router_logits: ``[n, E]`` of each router, of the real tokens alone.
        real: ``[B*T]``, which are no padding.
        top_k: K.
    """
    result = []
    for logits in router_logits:
        mask = np.ones((len(real), logits.shape[1]), dtype=np.bool_)
        mask[real] = choices(logits, top_k)
        result.append(mask)
    return result


def replayed(router_logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Router logits ``[N, E]``, moved as little as makes ``chosen [N, E]`` the top k."""
    infinity = torch.full_like(router_logits, torch.inf)
    least = torch.where(chosen, router_logits, infinity).amin(-1, keepdim=True)
    most = torch.where(chosen, -infinity, router_logits).amax(-1, keepdim=True)
    middle = (least + most) / 2
    step = (router_logits.abs().amax(-1, keepdim=True) + 1) * NUDGE
    below = middle - step
    moved = torch.where(chosen, router_logits.clamp(min=middle), router_logits.clamp(max=below))
    clear = step * CLEAR
    # Among equals the lower id is chosen, so a tie may be right as it is. It is one of logits that
    # are equal, and nothing else may be near it.
    ids, count = torch.arange(router_logits.shape[-1]), router_logits.shape[-1]
    last = torch.where(chosen & (router_logits == least), ids, -1).amax(-1, keepdim=True)
    first = torch.where(~chosen & (router_logits == most), ids, count).amin(-1, keepdim=True)
    near = (router_logits != least) & ((router_logits - least).abs() < clear)
    tied = (least == most) & (last < first) & ~near.any(-1, keepdim=True)
    right = (least - most >= clear) | tied
    return torch.where(right, router_logits, moved)


class Replay(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context in which the eager graphs use the experts that were given to ``choose``."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._chosen: Iterator[Chosen] | None = None

    def choose(self, chosen: Sequence[Chosen] | None) -> None:
        """Set the next call's experts: a mask ``[N, E]`` for each router in the order they run.

        None leaves the choice to the graph.
        """
        self._chosen = None if chosen is None else iter(chosen)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function in _ROUTED and self._chosen is not None:
            place = _ROUTED[function]
            mask = torch.from_numpy(next(self._chosen))
            args = (*args[:place], replayed(args[place], mask), *args[place + 1 :])
        return function(*args, **(kwargs or {}))


def replay_function() -> onnx.FunctionProto:
    """``replayed`` in standard ONNX operators, as a function of a model."""
    return onnx.parser.parse_function(
        f"""
        <opset_import: ["" : 23], domain: "{DOMAIN}">
        {OPERATOR} (router_logits, chosen) => (moved_logits)
        {{
            infinity = Constant <value_float: float = inf> ()
            minus_infinity = Neg (infinity)
            last = Constant <value_ints: ints = [-1]> ()
            half = Constant <value_float: float = 0.5> ()
            nudge = Constant <value_float: float = {NUDGE!r}> ()
            of_chosen = Where (chosen, router_logits, infinity)
            of_others = Where (chosen, minus_infinity, router_logits)
            least = ReduceMin (of_chosen, last)
            most = ReduceMax (of_others, last)
            both = Add (least, most)
            middle = Mul (both, half)
            sizes = Abs (router_logits)
            size = ReduceMax (sizes, last)
            unit = Constant <value_float: float = 1.0> ()
            size_up = Add (size, unit)
            step = Mul (size_up, nudge)
            below = Sub (middle, step)
            share = Constant <value_float: float = {CLEAR!r}> ()
            clear = Mul (step, share)
            raised = Max (router_logits, middle)
            lowered = Min (router_logits, below)
            moved = Where (chosen, raised, lowered)
            zero = Constant <value_int: int = 0> ()
            one = Constant <value_int: int = 1> ()
            minus_one = Neg (one)
            experts = Shape <start: int = 1> (router_logits)
            count = Squeeze (experts)
            ids = Range (zero, count, one)
            others = Not (chosen)
            is_least = Equal (router_logits, least)
            is_most = Equal (router_logits, most)
            chosen_least = And (chosen, is_least)
            other_most = And (others, is_most)
            ids_least = Where (chosen_least, ids, minus_one)
            ids_most = Where (other_most, ids, count)
            last_least = ReduceMax (ids_least, last)
            first_most = ReduceMin (ids_most, last)
            gap = Sub (least, most)
            apart = GreaterOrEqual (gap, clear)
            equal = Equal (least, most)
            in_order = Less (last_least, first_most)
            from_least = Sub (router_logits, least)
            distance = Abs (from_least)
            close = Less (distance, clear)
            another = Not (is_least)
            near = And (close, another)
            near_int = Cast <to = 7> (near)
            any_near = ReduceMax (near_int, last)
            alone = Less (any_near, one)
            tie_in_order = And (equal, in_order)
            right_tie = And (tie_in_order, alone)
            right = Or (apart, right_tie)
            moved_logits = Where (right, router_logits, moved)
        }}
        """
    )


def forced_input(router: str) -> str:
    """The name of the graph input with a router's experts, by that of its logits."""
    return router.replace(ROUTER_LOGITS, "forced_experts.")


def insert_replays(model: onnx.ModelProto, routers: Sequence[str]) -> None:
    """Put a ``Replay`` between each router's logits and what chooses by them.

    A GatherElements only reads the logits of experts that a TopK chose (JetMoE's attention); as in
    the eager graph under ``Replay``, they are the router's own.
    """
    if not routers:
        return
    moved = {name: f"{name}.replayed" for name in routers}
    nodes = []
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if node.op_type != "GatherElements":
                node.input[place] = moved.get(name, name)
        nodes.append(node)
        for name in node.output:
            if name in moved:
                inputs = [name, forced_input(name)]
                nodes.append(helper.make_node(OPERATOR, inputs, [moved[name]], domain=DOMAIN))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    for name in routers:
        model.graph.input.append(
            helper.make_tensor_value_info(
                forced_input(name), onnx.TensorProto.BOOL, ["tokens_or_one", "experts_or_one"]
            )
        )
    model.functions.append(replay_function())
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
