"""The eager graph over many calls at once, one layer after the other, in the memory of one layer.

Every token of a validation is known beforehand, so all calls of all runs go through the first
layer, then all through the next. A layer's weights are read once and dropped behind it. What stays
from layer to layer is the hidden state of each call; a layer's own states go from call to call
while it runs. Of the embedding only the rows that are fed are read, and the head is taken in blocks
of the vocabulary. The numbers are those of ``validate.truth.eager.EagerSession``, to the bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ingot.export.progress import Advance
from ingot.graphs.checkpoint import (
    Checkpoint,
    Part,
    WeightMap,
    assemble,
    set_parameter,
    stack_height,
)
from ingot.graphs.family import family_of
from ingot.graphs.layers import Layer, Model, Step
from ingot.graphs.state import State
from ingot.runtime.session import Ids
from ingot.validate.truth.cache import Recording
from ingot.validate.truth.eager import as_array, dtype_name, fed_by_definition
from ingot.validate.truth.recording import HIDDEN_STATES, ROUTER_LOGITS
from ingot.validate.truth.replay import Chosen, Replay
from ingot.validate.truth.stacks import Stacks

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]

# Bytes of the head's rows that are taken at once, in the precision of the run.
HEAD_BLOCK = 2**26
# Bytes of what all layers of a call are given, such as its mask, that are kept; more is made anew.
KEPT_STEP = 2**20


@dataclass(frozen=True)
class Fed:
    """One call of a run.

    Attributes:
        input_ids: ``[B, T]``.
        attention_mask: ``[B, T]``, 1 for tokens and 0 for padding.
        chosen: experts to force, a mask ``[B*T, E]`` for each router in the order they run; None
            leaves the choice to the graph.
        wanted: ``[B, T]``, the tokens whose main output is wanted; None for all. That of others is
            not computed, and 0.
    """

    input_ids: Ids
    attention_mask: Ids
    chosen: Sequence[Chosen] | None = None
    wanted: Mask | None = None


# The calls of one sequence of calls, from an empty state. Without states each call stands alone.
Run = Sequence[Fed]

# Which run, which call of it, a tensor's name and the tensor -> what is kept of it, if anything.
# Called as the tensor is made: every tensor of one layer, over all calls, before the next.
Keep = Callable[[int, int, str, Array], Array | None]

# Makes the context that a side computes in.
Order = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class Side:
    """What is computed beside other sides, with the same weights.

    Attributes:
        runs: the calls of each sequence of calls.
        keep: what is kept.
        order: makes the context to compute in, such as ``validate.truth.orders.Split``.
    """

    runs: Sequence[Run]
    keep: Keep
    order: Order = contextlib.nullcontext


@dataclass
class _Call:
    """A call on its way through the layers, on one side.

    Attributes:
        run: its run.
        number: of the call in the run.
        fed: what it is fed.
        mask: ``attention_mask`` as the graph takes it.
        positions: ``[B, T]``.
        x: the hidden state so far ``[B, T, H]``.
        step: what all layers are given, where it is kept.
        kept: what is kept of it.
    """

    run: int
    number: int
    fed: Fed
    mask: torch.Tensor
    positions: torch.Tensor
    x: torch.Tensor
    step: Step | None
    kept: dict[str, Array]


class Layerwise:
    """A checkpoint's eager graph in one precision, whose weights are read as they are needed.

    Args:
        checkpoint: the weights.
        task: a task of the family.
        precision: of weights and activations.
    """

    def __init__(
        self, checkpoint: Checkpoint, task: str, precision: torch.dtype = torch.float32
    ) -> None:
        family = family_of(checkpoint)
        self._checkpoint = checkpoint
        self._precision = precision
        self._model = family.build(checkpoint.config, task, precision, checkpoint.entries)
        self._weights: WeightMap = family.weight_map(self._model, checkpoint, task)
        self.states = tuple(state.cast(dtype_name(precision)) for state in self._model.states)
        self._cached = any(state.axis is not None for state in self.states)
        modules = dict(self._model.named_modules())
        self._names = {id(module): name for name, module in modules.items()}
        parameters = dict(self._model.named_parameters())
        self._shapes = {each: tuple(tensor.shape) for each, tensor in parameters.items()}
        self._dtypes = {each: tensor.dtype for each, tensor in parameters.items()}
        self._embeddings = [
            f"{each}.weight" for each, module in modules.items() if isinstance(module, nn.Embedding)
        ]
        inside = {f"{self._names[id(layer)]}." for layer, _ in self._model.decoder.by_layer()}
        elsewhere = (*inside, *self._embeddings, *filter(None, [self._model.head_table]))
        self._small = [each for each in parameters if not each.startswith(elsewhere)]

    @property
    def layers(self) -> int:
        """How often ``run`` advances for each side: once a layer, and once for the head."""
        return len(self._model.decoder.by_layer()) + 1

    @torch.inference_mode()
    def run(
        self,
        sides: Sequence[Side],
        advance: Advance = lambda _layers: None,
    ) -> list[list[Recording]]:
        """All calls of all runs of all sides.

        Args:
            sides: what is computed with each layer before the next is read.
            advance: told of each finished layer of each side.

        Returns:
            By side and run the calls, each with what was kept of the main output, the states, the
            router logits and the hidden states, in this order and by the names of
            ``EagerSession``.
        """
        decoder = self._model.decoder
        stacks = Stacks(self._checkpoint, self._precision)
        self._load_small()
        # Its rows are of one call of ``run`` alone.
        ids = torch.from_numpy(np.unique(_ids(sides)))
        self._load_embedding(ids)
        hidden = hidden_names(self._model)
        begun = [self._begin(side, ids, hidden) for side in sides]
        router = 0
        for index, (layer, own) in enumerate(decoder.by_layer()):
            self._load(layer, stacks)
            for side, calls in zip(sides, begun, strict=True):
                with side.order():
                    routers = self._through(layer, calls, side.keep, own, router, ids)
                if index + 1 in hidden:
                    for call in calls:
                        self._keep(call, side.keep, [hidden[index + 1]], [call.x])
                advance(1)
            router += routers
            layer.to("meta")
        for side, calls in zip(sides, begun, strict=True):
            with side.order():
                self._end(calls, side.keep)
            advance(1)
        self._model.to("meta")
        return [
            _by_run(calls, len(side.runs), self._order())
            for side, calls in zip(sides, begun, strict=True)
        ]

    def _through(
        self,
        layer: Layer,
        calls: Sequence[_Call],
        keep: Keep,
        own: Sequence[State],
        router: int,
        ids: torch.Tensor,
    ) -> int:
        """Every call through one layer, whose states go from each to the next of its run.

        Returns:
            How many routers the layer has; ``router`` is the number of the first.
        """
        logits: tuple[torch.Tensor, ...] = ()
        # A graph without states computes each call from nothing.
        own = own if self._model.states else ()
        past: dict[int, tuple[torch.Tensor, ...]] = {}
        for call in calls:
            before = past.get(call.run)
            if before is None:
                before = self._empty(own, len(call.x))
            step = call.step or self._step(call, ids)[1]
            if call.fed.chosen is None:
                call.x, present, logits = layer(call.x, step, before)
            else:
                with Replay() as replay:
                    replay.choose(call.fed.chosen[router:])
                    call.x, present, logits = layer(call.x, step, before)
            if own:
                past[call.run] = present
                self._keep(call, keep, [state.output for state in own], present)
            names = [f"{ROUTER_LOGITS}{router + index}" for index in range(len(logits))]
            self._keep(call, keep, names, logits)
        return len(logits)

    def _begin(self, side: Side, ids: torch.Tensor, hidden: dict[int, str]) -> list[_Call]:
        """Every call with what enters the first layer, in the order that states are handed on."""
        result = []
        for number, run in enumerate(side.runs):
            seen: Ids | None = None
            for index, fed in enumerate(run):
                before = seen if self._model.states else None
                *given, seen = fed_by_definition(fed.attention_mask, before, self._cached)
                mask, positions = (torch.from_numpy(array.copy()) for array in given)
                call = _Call(number, index, fed, mask, positions, torch.empty(0), None, {})
                call.x, step = self._step(call, ids)
                if sum(part.nbytes for part in step) <= KEPT_STEP:
                    call.step = step
                if 0 in hidden:
                    self._keep(call, side.keep, [hidden[0]], [call.x])
                result.append(call)
        return result

    def _step(self, call: _Call, ids: torch.Tensor) -> tuple[torch.Tensor, Step]:
        # The embedding has only the rows of ``ids``.
        rows = torch.searchsorted(ids, torch.from_numpy(call.fed.input_ids.copy()))
        return self._model.decoder.begin(rows, call.mask, call.positions)

    def _empty(self, own: Sequence[State], batch: int) -> tuple[torch.Tensor, ...]:
        cast = [state.cast(dtype_name(self._precision)) for state in own]
        return tuple(torch.zeros(s.shape(batch, 0), dtype=getattr(torch, s.dtype)) for s in cast)

    def _keep(
        self, call: _Call, keep: Keep, names: Sequence[str], tensors: Sequence[torch.Tensor]
    ) -> None:
        for name, tensor in zip(names, tensors, strict=True):
            kept = keep(call.run, call.number, name, as_array(tensor))
            if kept is not None:
                # A view would hold all that the layer made.
                call.kept[name] = kept if kept.base is None else kept.copy()

    # --- the end

    def _end(self, calls: Sequence[_Call], keep: Keep) -> None:
        """The final norm and the head of every call."""
        decoder = self._model.decoder
        last = len(decoder.by_layer())
        for call in calls:
            call.x, hidden = decoder.end((*[call.x.new_empty(0)] * last, call.x))
            self._keep(call, keep, [f"{HIDDEN_STATES}{len(hidden) - 1}"], [call.x])
        blocks: list[list[Array]] = [[] for _ in calls]
        for _ in self._head_blocks():
            for call, done in zip(calls, blocks, strict=True):
                done.append(as_array(self._model.head(self._wanted(call), call.mask)))
        for call, done in zip(calls, blocks, strict=True):
            main = done[0] if len(done) == 1 else np.concatenate(done, axis=-1)
            done.clear()
            if self._is_cut(call):
                # Pages of zeros that nobody writes to take no memory.
                every = np.zeros((*call.fed.input_ids.shape, main.shape[-1]), dtype=main.dtype)
                every[call.fed.wanted] = main[0]
                main = every
            kept = keep(call.run, call.number, self._model.main_output, main)
            if kept is not None:
                call.kept[self._model.main_output] = kept

    def _is_cut(self, call: _Call) -> bool:
        """Whether the head is asked for some tokens alone, each of which it takes by itself."""
        return call.fed.wanted is not None and bool(self._model.head_table)

    def _wanted(self, call: _Call) -> torch.Tensor:
        if not self._is_cut(call):
            return call.x
        return call.x[torch.from_numpy(call.fed.wanted)][None]

    def _head_blocks(self) -> Iterator[None]:
        """Once for each block of the head's rows, which are in the head's place meanwhile."""
        name = self._model.head_table
        if not name:
            yield
            return
        shape = self._shapes[name]
        whole = self._stored(name, shape)
        rows = max(1, HEAD_BLOCK // (shape[1] * self._precision.itemsize))
        for first in range(0, len(whole), rows):
            set_parameter(self._model, name, whole[first : first + rows].to(self._precision))
            yield

    # --- the weights

    def storages(self, known: Mapping[str, int]) -> dict[int, int]:
        """What is known of the tensors that the loaded weights are made of, by their addresses.

        Args:
            known: by the name of a tensor, a number; of any other it is 0, and of a weight that
                several are in the largest of theirs.
        """
        return {
            parameter.untyped_storage().data_ptr(): max(
                known.get(part.name, 0) for part in self._weights[name]
            )
            for name, parameter in self._model.named_parameters()
            if parameter.device.type != "meta"
        }

    def _load_small(self) -> None:
        """The weights outside of the layers, but for embedding and head."""
        for name in self._small:
            value = assemble(
                self._checkpoint, self._weights[name], self._shapes[name], self._dtypes[name]
            )
            set_parameter(self._model, name, value)

    def _load_embedding(self, ids: torch.Tensor) -> None:
        """The rows of ``ids``, in their order."""
        for name in self._embeddings:
            rows = self._stored(name, self._shapes[name])[ids]
            set_parameter(self._model, name, rows.to(self._precision))

    def _load(self, layer: nn.Module, stacks: Stacks) -> None:
        """One layer's weights."""
        prefix = self._names[id(layer)] + "."
        for name, parameter in list(layer.named_parameters()):
            parts, dtype = self._weights[prefix + name], self._dtypes[prefix + name]
            shape = tuple(parameter.shape)
            if stack_height(shape) > 1:
                value = stacks.read(name, parts, shape, self._narrowest(parts, dtype))
            else:
                value = assemble(self._checkpoint, parts, shape, dtype)
            set_parameter(layer, name, value)

    def _narrowest(self, parts: Sequence[Part], dtype: torch.dtype) -> torch.dtype:
        """The dtype that the parts are stored in, where ``dtype`` holds all of it exactly."""
        found = {self._checkpoint.dtype(part.name) for part in parts}
        stored = found.pop()
        exact = not found and torch.promote_types(stored, dtype) == dtype
        return stored if exact and stored != torch.float64 else dtype

    def _stored(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A table as it is stored, of which rows are taken."""
        parts = self._weights[name]
        if len(parts) > 1:
            return assemble(self._checkpoint, parts, shape, self._precision)
        return self._checkpoint.read(parts[0].name).reshape(shape)

    # --- the names

    def _order(self) -> Callable[[str], tuple[int, int]]:
        """Where a name stands among a call's: main output, states, routers, hidden states."""
        states = {state.output: number for number, state in enumerate(self.states)}

        def place(name: str) -> tuple[int, int]:
            if name == self._model.main_output:
                return 0, 0
            if name in states:
                return 1, states[name]
            return 2 + name.startswith(HIDDEN_STATES), int(name.rpartition(".")[2])

        return place


def hidden_names(model: Model, device: str = "cpu") -> dict[int, str]:
    """By number of an output, the embedding's being 0, its name; read off ``Decoder.end``.

    Args:
        model: any.
        device: where the weights of its final norm are.
    """
    decoder, size = model.decoder, model.config.hidden_size
    dtype = next(decoder.parameters()).dtype
    count = len(decoder.by_layer()) + 1
    marks = tuple(torch.zeros(1, 1, size, dtype=dtype, device=device) for _ in range(count))
    _, hidden = decoder.end(marks)
    numbers = {id(mark): number for number, mark in enumerate(marks)}
    return {
        numbers[id(each)]: f"{HIDDEN_STATES}{index}"
        for index, each in enumerate(hidden)
        if id(each) in numbers
    }


def _ids(sides: Sequence[Side]) -> Ids:
    """All that are fed, and 0."""
    runs = (run for side in sides for run in side.runs)
    every = [fed.input_ids.reshape(-1) for run in runs for fed in run]
    return np.concatenate([*every, np.zeros(1, dtype=np.int64)])


def _by_run(
    calls: Sequence[_Call], runs: int, place: Callable[[str], tuple[int, int]]
) -> list[Recording]:
    result: list[Recording] = [[] for _ in range(runs)]
    for call in calls:
        result[call.run].append({name: call.kept[name] for name in sorted(call.kept, key=place)})
    return result
