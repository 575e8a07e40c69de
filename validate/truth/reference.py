"""The eager graph of a checkpoint twice: the truth, and in the precision of a target.

What they compute is kept on disk (``validate.truth.cache``), so that a second validation of the
same checkpoint, of another target or after another export, begins at once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ingot.export.progress import Stages
from ingot.graphs.checkpoint import Checkpoint
from ingot.graphs.family import family_of
from ingot.plugins.errors import IngotError
from ingot.validate.truth.cache import Cache, Recording, code_digest, inputs_digest, key
from ingot.validate.truth.eager import EagerSession
from ingot.validate.truth.inputs import Inputs
from ingot.validate.truth.recording import Layout, all_router_logits, record
from ingot.validate.truth.replay import Replay, Routers

# One precision higher than the target's.
TRUTH = {"float32": torch.float64, "float16": torch.float32, "bfloat16": torch.float32}


class RoutersError(IngotError):
    """A model with other routers than its config's facts tell."""


@dataclass(frozen=True)
class References:
    """What the eager graphs compute from one validation's inputs; see ``validate.truth.recording``.

    Attributes:
        precision: of the target: ``float32``, ``float16`` or ``bfloat16``.
        truth: what is computed one precision higher.
        eager: what is computed in the target's precision, with the truth's experts.
        expected: what a target is compared with.
    """

    precision: str
    truth: Recording
    eager: Recording
    expected: Recording


class Reference:
    """Truth and floor of one checkpoint; the models are loaded when they are first needed.

    A graph that does not fit in half of the free memory is streamed from the checkpoint, layer by
    layer, for every call.

    Args:
        checkpoint: the weights.
        task: a task of the family.
        precision: of the target: ``float32``, ``float16`` or ``bfloat16``.
        cache: of recordings; None keeps none.
    """

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
        self._sessions: dict[torch.dtype, EagerSession] = {}
        facts = self._model.config.facts
        self.chunk_size = facts.chunk_size
        self.routers = Routers(facts.routers, facts.experts_per_token)
        self.states = self._model.states

    @property
    def against(self) -> str:
        """What the target is compared with, in words."""
        truth = TRUTH[self.precision]
        return f"eager PyTorch in {_name(truth)}, beside eager PyTorch in {self.precision}"

    def record(self, layout: Layout, runs: Sequence[Inputs], stages: Stages) -> list[References]:
        """What both compute in each run, or what was kept of an earlier time.

        Args:
            layout: of the outputs.
            runs: each the calls from an empty state, or calls that each stand alone.
            stages: shows the steps.

        Raises:
            RoutersError: the model returns the logits of more or fewer routers than it should.
        """
        return [self._record(layout, inputs, stages) for inputs in runs]

    def _record(self, layout: Layout, inputs: Inputs, stages: Stages) -> References:
        truth = self._recording(layout, inputs, TRUTH[self.precision], None, stages)
        found, told = len(all_router_logits(truth[0])), self.routers.by_layer
        if found != sum(told):
            raise RoutersError(
                f"the model returns the logits of {found} routers, and its config's facts tell of "
                f"{sum(told)}, by layer {list(told)}; correct Facts.routers of its architecture."
            )
        own: torch.dtype = getattr(torch, self.precision)
        eager = self._recording(layout, inputs, own, truth, stages)
        return References(self.precision, truth, eager, expected=truth)

    def session(self, dtype: torch.dtype, stages: Stages) -> EagerSession:
        """The eager graph in one precision."""
        if dtype not in self._sessions:
            size = sum(parameter.numel() for parameter in self._model.parameters())
            with stages.stage(f"load eager {_name(dtype)}", size * dtype.itemsize) as advance:
                self._sessions[dtype] = EagerSession(
                    self.checkpoint, self.task, precision=dtype, advance=advance
                )
        return self._sessions[dtype]

    def _recording(
        self,
        layout: Layout,
        inputs: Inputs,
        dtype: torch.dtype,
        truth: Recording | None,
        stages: Stages,
    ) -> Recording:
        name = ""
        if self.cache is not None:
            name = self._key(inputs, dtype, self.hash(stages), replayed=truth is not None)
            kept = self.cache.get(name)
            if kept is not None:
                return kept
        session = self.session(dtype, stages)
        with (
            stages.stage(f"run eager {_name(dtype)}", len(inputs.steps), "steps") as advance,
            Replay() as replay,
        ):

            def choose(number: int) -> None:
                chosen = self.routers.chosen
                replay.choose(None if truth is None else chosen(truth[number], inputs, number))

            recording = record(session, layout, inputs, choose, advance)
        if self.cache is not None:
            self.cache.put(name, recording)
        return recording

    def hash(self, stages: Stages) -> str:
        """SHA-256 of the checkpoint, as far as the graph uses it; reads it where nobody has yet."""
        weights = family_of(self.checkpoint).weight_map(self._model, self.checkpoint, self.task)
        names = {part.name for parts in weights.values() for part in parts}
        unread = sorted(names - self.checkpoint.digests.keys())
        if unread:
            size = sum(self._bytes(name) for name in unread)
            with stages.stage("hash checkpoint", size) as advance:
                for name in unread:
                    self.checkpoint.read(name)
                    advance(self._bytes(name))
        return self.checkpoint.digest()

    def _bytes(self, name: str) -> int:
        entry = self.checkpoint.entries[name]
        return entry.end - entry.begin

    def _key(self, inputs: Inputs, dtype: torch.dtype, checkpoint: str, *, replayed: bool) -> str:
        return key(
            checkpoint=checkpoint,
            task=self.task,
            dtype=_name(dtype),
            replayed=_name(TRUTH[self.precision]) if replayed else None,
            inputs=inputs_digest(inputs.input_ids, inputs.attention_mask, inputs.wanted),
            calls=json.dumps([columns.stop for _, columns in inputs.steps]),
            stateful=inputs.stateful,
            torch=torch.__version__,
            code=code_digest(),
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
