"""The eager graph of a checkpoint twice: the truth, and in the precision of a target.

What they compute is kept on disk (``validate.truth.cache``), so that a second validation of the
same checkpoint, of another target or after another export, begins at once.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Self

import torch

from ingot.export.ingot import Manifest
from ingot.export.progress import Stages
from ingot.graphs.checkpoint import Checkpoint
from ingot.graphs.family import family_of
from ingot.plugins.errors import IngotError
from ingot.validate.processor import processor
from ingot.validate.quantisation import ROUNDED
from ingot.validate.truth.activations import RoundedActivations
from ingot.validate.truth.cache import Cache, Recording, code_digest, inputs_digest, key
from ingot.validate.truth.eager import EagerSession, dtype_name
from ingot.validate.truth.forced import experts_of
from ingot.validate.truth.inputs import Inputs
from ingot.validate.truth.joined import Joined, join
from ingot.validate.truth.layerwise import Array, Fed, Keep, Layerwise, Side, hidden_names
from ingot.validate.truth.noise import all_squared_errors, noise_of, squared_errors, together
from ingot.validate.truth.orders import SHARES, Split
from ingot.validate.truth.other_weights import OtherWeights
from ingot.validate.truth.recording import (
    ROUTER_LOGITS,
    Layout,
    all_router_logits,
    collect,
    fed,
    main_run,
)
from ingot.validate.truth.replay import Chosen, Routers
from ingot.validate.truth.stored import StoredCheckpoint, as_stored, narrowing

# One precision higher than the target's.
TRUTH = {"float32": torch.float64, "float16": torch.float32, "bfloat16": torch.float32}


class RoutersError(IngotError):
    """A model with other routers than its config's facts tell."""


@dataclass(frozen=True)
class References:
    """What the eager graphs compute from one validation's inputs; see ``validate.truth.recording``.

    Attributes:
        precision: of the target: ``float32``, ``float16`` or ``bfloat16``, or ``ROUNDED``.
        truth: what is computed one precision higher.
        eager: what is computed in the target's precision, with the truth's experts.
        expected: what a target is compared with.
        noise: of each tensor of each call the squared errors ``[n, runs]`` by token or row, of
            eager and of what it computes when it adds in other orders; of eager alone where it is
            not given. See ``validate.truth.noise``.
    """

    precision: str
    truth: Recording
    eager: Recording
    expected: Recording
    noise: Recording = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.noise:
            object.__setattr__(self, "noise", noise_of(self.truth, self.eager))


class Reference:
    """Truth and floor of one checkpoint, computed layer by layer in the memory of one layer.

    Args:
        checkpoint: the weights.
        task: a task of the family.
        precision: of the target: ``float32``, ``float16`` or ``bfloat16``.
        cache: of recordings; None keeps none.

    Attributes:
        is_eager: whether the truth is what the target is compared with.
    """

    is_eager = True

    def __init__(
        self,
        checkpoint: Checkpoint,
        task: str,
        precision: str = "float32",
        cache: Cache | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.task = task
        self.precision = precision
        self.cache = cache
        self._model = family_of(checkpoint).build(
            checkpoint.config, task, stored=checkpoint.entries
        )
        # What the eager graph reads its weights from.
        self._weights = checkpoint
        self.vocab_size = self._model.config.vocab_size
        self.facts = self._model.config.facts
        self.chunk_size = self.facts.chunk_size
        self.routers = Routers(self.facts.routers, self.facts.experts_per_token)
        self.states = self._model.states
        # The tensors whose products round to bfloat16; see ``narrowing``.
        self._narrow: dict[str, int] = {}
        self._digest: str | None = None
        self._recurrent = any(state.axis is None for state in self.states)
        self._switch = self.facts.switch_length

    @cached_property
    def _processor(self) -> str:
        """Another one sums in another order, which is no matter one precision higher."""
        return json.dumps(processor())

    @classmethod
    def of_ingot(
        cls, folder: Path, manifest: Manifest, checkpoint: Checkpoint, cache: Cache | None = None
    ) -> Self:
        """The truth of what an ingot computes from the weights as it stores them.

        Args:
            folder: the ingot.
            manifest: of it.
            checkpoint: what it was made from.
            cache: of recordings; None keeps none.
        """
        reference = cls(checkpoint, manifest.task, manifest.precision, cache)
        reference._weights = as_stored(folder, manifest, checkpoint, reference._model)
        if manifest.activations:
            reference._narrow = narrowing(folder, manifest, checkpoint, reference._model)
        return reference

    @property
    def main_output(self) -> str:
        """The name of the graph's main output."""
        return self._model.main_output

    @property
    def stored(self) -> StoredCheckpoint | None:
        """The weights that an ingot stores, where something is lost by it; else None."""
        return self._weights if isinstance(self._weights, StoredCheckpoint) else None

    def of_weights(self, weights: Checkpoint) -> Reference:
        """The same model over other weights of the same checkpoint."""
        result = copy.copy(self)
        result._weights = weights
        return result

    def layerwise(self, dtype: torch.dtype) -> Layerwise:
        """The eager graph in one precision, for many calls that are known beforehand."""
        return Layerwise(self._weights, self.task, dtype)

    @property
    def layers(self) -> dict[str, int]:
        """By the name of a router's logits or of a hidden state the layer that it is of.

        -1 for what enters the first; of what is behind the last layer there is none.
        """
        routers = [at for at, count in enumerate(self.routers.by_layer) for _ in range(count)]
        found = {f"{ROUTER_LOGITS}{number}": layer for number, layer in enumerate(routers)}
        hidden = hidden_names(self._model, "meta")
        return {**found, **{name: number - 1 for number, name in hidden.items()}}

    @property
    def layer_count(self) -> int:
        """How many layers there are."""
        return len(self._model.decoder.by_layer())

    @property
    def experts(self) -> tuple[int, ...]:
        """E of each router, in the order they run."""
        return experts_of(self._model) if self.routers.top_k else ()

    @property
    def name(self) -> str:
        """Whose numbers the target is compared with, in words."""
        return "eager PyTorch"

    @property
    def against(self) -> str:
        """What the target is compared with, in words."""
        truth = TRUTH[self.precision]
        return f"eager PyTorch in {dtype_name(truth)}, beside eager PyTorch in {self.precision}"

    def record(self, layout: Layout, runs: Sequence[Inputs], stages: Stages) -> list[References]:
        """What both compute in each run, or what was kept of an earlier time.

        Args:
            layout: of the outputs.
            runs: each the calls from an empty state, or calls that each stand alone.
            stages: shows the steps.

        Raises:
            RoutersError: the model returns the logits of more or fewer routers than it should.
        """
        truths = self.truths(layout, runs, stages)
        found, told = len(all_router_logits(truths[0][0])), self.routers.by_layer
        if found != sum(told):
            raise RoutersError(
                f"the model returns the logits of {found} routers, and its config's facts tell of "
                f"{sum(told)}, by layer {list(told)}; correct Facts.routers of its architecture."
            )
        rounded = self._rounded(layout, runs, truths, stages)
        return [
            References(self.precision, truth, eager, expected=truth, noise=noise)
            for truth, (eager, noise) in zip(truths, rounded, strict=True)
        ]

    def rounding(
        self,
        layout: Layout,
        runs: Sequence[Inputs],
        references: Sequence[References],
        stages: Stages,
    ) -> list[References]:
        """The same truth, beside eager PyTorch that rounds activations to int8, block by block.

        Blocks are of as many numbers as those of the stored matrix that activations meet.

        Args:
            layout: of the outputs.
            runs: as for ``record``.
            references: that ``record`` gave of them.
            stages: shows the steps.
        """
        dtype: torch.dtype = getattr(torch, self.precision)
        blocks = self._narrow or ({} if self.stored is None else self.stored.decoded.blocks)
        sizes = ", ".join(map(str, sorted(set(blocks.values()))))
        keys = [
            self._key(inputs, dtype, stages, replayed=True, activations=f"rounded by {sizes}")
            for inputs in runs
        ]

        def make(missing: list[int]) -> list[Recording]:
            fed_runs = [
                _calls(runs[n], partial(self._chosen, runs[n], references[n].truth))
                for n in missing
            ]
            graph = self.layerwise(dtype)

            def order() -> RoundedActivations:
                return RoundedActivations(graph.storages(blocks))

            side = Side(fed_runs, _keeper(layout, runs, missing), order)
            what = f"run eager {dtype_name(dtype)} with activations rounded"
            with stages.stage(what, graph.layers, "steps") as advance:
                return graph.run([side], advance)[0]

        return [
            References(ROUNDED, each.truth, eager, each.expected)
            for each, eager in zip(references, self._recorded(keys, make), strict=True)
        ]

    def session(self, dtype: torch.dtype, stages: Stages) -> EagerSession:
        """The eager graph in one precision, for calls that are not known beforehand."""
        size = sum(parameter.numel() for parameter in self._model.parameters())
        with stages.stage(f"load eager {dtype_name(dtype)}", size * dtype.itemsize) as advance:
            return EagerSession(self._weights, self.task, precision=dtype, advance=advance)

    def truths(
        self,
        layout: Layout,
        runs: Sequence[Inputs],
        stages: Stages,
        dtype: torch.dtype | None = None,
    ) -> list[Recording]:
        """What the eager graph computes in each run when it chooses its experts itself.

        Args:
            layout: of the outputs.
            runs: as for ``record``.
            stages: shows the steps.
            dtype: to compute in; by default that of the truth.
        """
        dtype = dtype or TRUTH[self.precision]
        keys = [self._key(inputs, dtype, stages) for inputs in runs]

        def make(missing: list[int]) -> list[Recording]:
            fed_runs = [_calls(runs[number]) for number in missing]
            side = Side(fed_runs, _keeper(layout, runs, missing))
            return self._run([side], dtype, stages)[0]

        return self._recorded(keys, make)

    def _rounded(
        self, layout: Layout, runs: Sequence[Inputs], truths: Sequence[Recording], stages: Stages
    ) -> list[tuple[Recording, Recording]]:
        """Eager PyTorch in the target's precision under the truth's experts, and its noise."""
        dtype: torch.dtype = getattr(torch, self.precision)
        keys = [
            [self._key(inputs, dtype, stages, replayed=True, orders=n) for n in (0, len(SHARES))]
            for inputs in runs
        ]
        found = [tuple(filter(None, map(self._kept, names))) for names in keys]
        missing = [number for number, kept in enumerate(found) if len(kept) < len(keys[number])]

        joined = [join(runs[n], recurrent=self._recurrent, switch=self._switch) for n in missing]

        def keep_error(run: int, number: int, name: str, array: Array) -> Array:
            calls, truth = joined[run], truths[missing[run]]
            got = calls.collected(layout, number, name, array)
            return squared_errors(calls.expected(layout, number, name, truth), got)

        chosen = [partial(self._chosen, runs[n], truths[n]) for n in missing]
        one_by_one = [_calls(runs[n], each) for n, each in zip(missing, chosen, strict=True)]
        together_fed = [_joined(*each) for each in zip(joined, chosen, strict=True)]
        sides = [Side(one_by_one, _keeper(layout, runs, missing))]
        # Its noise is wanted by token alone; the first of the joined shows what joining costs.
        sides += [Side(together_fed, keep_error)]
        sides += [Side(together_fed, keep_error, partial(Split, share)) for share in SHARES]
        eager, plain, *others = self._run(sides if missing else [], dtype, stages) or [[], []]
        for place, number in enumerate(missing):
            own = all_squared_errors(truths[number], eager[place])
            for other in others:
                joined[place].scaled(layout, other[place], plain[place], own)
            samples = [joined[place].by_call(layout, other[place], own) for other in others]
            found[number] = (eager[place], list(map(together, zip(own, *samples, strict=True))))
            for name, recording in zip(keys[number], found[number], strict=True):
                self._keep(name, recording)
        return [(kept[0], kept[1]) for kept in found]

    def _chosen(self, inputs: Inputs, truth: Recording, number: int) -> list[Chosen]:
        return self.routers.chosen(truth[number], inputs, number)

    def _run(
        self, sides: Sequence[Side], dtype: torch.dtype, stages: Stages
    ) -> list[list[Recording]]:
        """What each side keeps; where there is none nothing is loaded."""
        if not sides:
            return []
        graph = self.layerwise(dtype)
        total = graph.layers * len(sides)
        with stages.stage(f"run eager {dtype_name(dtype)}", total, "steps") as advance:
            return graph.run(sides, advance)

    def _recorded(
        self, keys: Sequence[str], make: Callable[[list[int]], list[Recording]]
    ) -> list[Recording]:
        """What was kept under each name, or is made now and kept under it.

        Args:
            keys: the names.
            make: the places of names under which nothing was kept -> what belongs there.
        """
        found = {place: self._kept(name) for place, name in enumerate(keys)}
        missing = [place for place, each in found.items() if each is None]
        for place, recording in zip(missing, make(missing) if missing else [], strict=True):
            found[place] = recording
            self._keep(keys[place], recording)
        return [each for each in found.values() if each is not None]

    def _kept(self, name: str) -> Recording | None:
        return self.cache.get(name) if self.cache is not None else None

    def _keep(self, name: str, recording: Recording) -> None:
        if self.cache is not None:
            self.cache.put(name, recording)

    def hash(self, stages: Stages) -> str:
        """SHA-256 of the checkpoint, as far as the graph uses it; reads it where nobody has yet."""
        if self._digest is None:
            weights = family_of(self.checkpoint).weight_map(self._model, self.checkpoint, self.task)
            names = {part.name for parts in weights.values() for part in parts}
            unread = sorted(names - self.checkpoint.digests.keys())
            if unread:
                size = sum(self._bytes(name) for name in unread)
                with stages.stage("hash checkpoint", size) as advance:
                    for name in unread:
                        self.checkpoint.read(name)
                        advance(self._bytes(name))
            self._digest = self.checkpoint.digest()
        return self._digest

    def _stored(self) -> str | None:
        """What of the weights is not the checkpoint's, in words; None where nothing is."""
        return self._weights.key if isinstance(self._weights, OtherWeights) else None

    def _bytes(self, name: str) -> int:
        entry = self.checkpoint.entries[name]
        return entry.end - entry.begin

    def _key(
        self,
        inputs: Inputs,
        dtype: torch.dtype,
        stages: Stages,
        *,
        replayed: bool = False,
        orders: int = 0,
        activations: str | None = None,
    ) -> str:
        """The name of a recording in the cache; empty where there is none."""
        if self.cache is None:
            return ""
        return key(
            checkpoint=self.hash(stages),
            stored=self._stored(),
            task=self.task,
            dtype=dtype_name(dtype),
            replayed=dtype_name(TRUTH[self.precision]) if replayed else None,
            orders=orders,
            inputs=inputs_digest(inputs.input_ids, inputs.attention_mask, inputs.wanted),
            forced=inputs_digest(*(mask for masks in inputs.forced for mask in masks)),
            calls=json.dumps([columns.stop for _, columns in inputs.steps]),
            stateful=inputs.stateful,
            torch=torch.__version__,
            processor=self._processor if replayed else None,
            code=code_digest(),
            activations=activations,
        )


def _calls(inputs: Inputs, chosen: Callable[[int], list[Chosen]] = lambda _number: []) -> list[Fed]:
    """The calls of a run, each with the experts to force; without any the graph chooses.

    What the run itself gives comes first.
    """
    result = []
    for number, call in enumerate(main_run(inputs)):
        ids, mask = fed(inputs, call)
        wanted = None if inputs.kept is None else inputs.wanted[:, call.columns]
        given = inputs.forced[number] if inputs.forced else chosen(number) or None
        result.append(Fed(ids, mask, given, wanted))
    return result


def _joined(joined: Joined, chosen: Callable[[int], list[Chosen]]) -> list[Fed]:
    """The joined calls of a run, with the experts that ``chosen`` gives of each of its calls."""
    return _calls(joined.inputs, lambda number: joined.chosen(number, chosen))


def _keeper(layout: Layout, runs: Sequence[Inputs], places: Sequence[int]) -> Keep:
    """Says what is kept of each tensor of each call where the runs at some places are run."""

    def keep(run: int, number: int, name: str, array: Array) -> Array:
        inputs = runs[places[run]]
        return collect(layout, inputs, main_run(inputs)[number], {name: array})[name]

    return keep
