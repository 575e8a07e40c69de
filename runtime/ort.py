"""The session over ONNX Runtime's CPU provider, for the targets ``onnx`` and ``ort``."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ingot.export.ingot import GRAPH, MANIFEST, Manifest
from ingot.graphs.state import BATCH, LOGITS_TO_KEEP, PAST, SEQUENCE, TOTAL, State
from ingot.plugins.errors import shown
from ingot.runtime.onnxruntime_session import guarded, open_session, ort_value
from ingot.runtime.operators import libraries
from ingot.runtime.session import Floats, Ids, SessionError
from ingot.runtime.tokens import TokenInputs, no_memory, rows_kept

Array = npt.NDArray[Any]

# ONNX Runtime's names of what a main output may be.
_FLOATS = ("tensor(float)", "tensor(float16)")


class OrtSession:
    """Runs an ingot on ONNX Runtime; see ``runtime.session.Session``.

    A cache whose past and present may share a buffer is allocated once, at its capacity, and
    appended to in place. Another cache is handed on from output to input without a copy.

    Args:
        folder: the ingot.
        manifest: of the ingot.
        threads: see ``runtime.loading.load``.
        graph: to run in place of the ingot's own; it finds its weights in the folder.
        taps: outputs of that graph to keep beside those that the manifest names.
        weights: see ``runtime.onnxruntime_session.open_session``.
        operators: see ``runtime.loading.load``.

    Attributes:
        given: inputs of that graph beside those that the manifest names.
        fed: the token inputs of the last call.
        tapped: the taps of the last call.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        threads: int = 0,
        graph: bytes | None = None,
        taps: Sequence[str] = (),
        weights: Mapping[str, Any] | None = None,
        operators: Path | None = None,
    ) -> None:
        self.manifest = manifest
        self.given: dict[str, Array] = {}
        self.fed: dict[str, Ids] = {}
        self.tapped: dict[str, Array] = {}
        self._taps = list(taps)
        name = str(folder / GRAPH)
        needed = libraries(folder, manifest, operators)
        try:
            self._session = open_session(
                folder / GRAPH if graph is None else graph,
                name=name,
                threads=threads,
                weights_folder=folder,
                weights=weights,
                libraries=needed,
            )
        except SessionError as error:
            made_with = manifest.tools.get("onnxruntime", "another version")
            sentence = str(error).replace(name, f"{name} (made with {made_with})", 1)
            raise SessionError(sentence) from error
        # What may be left out, such as `logits_to_keep`, is no input to ONNX Runtime.
        optional = self._session.get_overridable_initializers()
        tensors = (*self._session.get_inputs(), *optional, *self._session.get_outputs())
        has = {item.name for item in tensors}
        named = {manifest.main_output, *(item.name for item in manifest.inputs)}
        missing = sorted((named | {state.output for state in manifest.states}) - has)
        if missing:
            raise SessionError(
                f"{folder / GRAPH} has no {', '.join(missing)}, which {MANIFEST} names; the two "
                "are not of one export: export again."
            )
        types = {item.name: item.type for item in self._session.get_outputs()}
        if types[manifest.main_output] not in _FLOATS:
            raise SessionError(
                f"{folder / GRAPH} computes {shown(manifest.main_output)} as "
                f"{shown(types[manifest.main_output])}, which must be one of {', '.join(_FLOATS)}: "
                "export again."
            )
        self._inputs = {item.name for item in manifest.inputs}
        self._tokens = TokenInputs(manifest.vocab_size, manifest.states)
        self.reset(1, 0)

    @property
    def changes(self) -> int:
        """See ``Session``."""
        return self._tokens.changes

    def reset(self, batch: int, capacity: int) -> None:
        """See ``Session.reset``."""
        with self._tokens.call, guarded():
            self._tokens.reset(batch, capacity)
            self._tokens.lost = True
            # The old ones are given back first, since both may not fit.
            self._state: dict[str, Any] = {}
            try:
                self._state = {
                    state.input: ort_value(self._zeros(state)) for state in self.manifest.states
                }
            except MemoryError as error:
                raise no_memory(self.manifest.states, batch, capacity) from error
            self._tokens.lost = False

    def _zeros(self, state: State) -> Array:
        shape = state.shape(self._tokens.batch, self._tokens.capacity if state.shared else 0)
        # numpy has another exception for what no address reaches.
        if math.prod(shape) > sys.maxsize // np.dtype(state.dtype).itemsize:
            raise MemoryError
        return np.zeros(shape, dtype=state.dtype)

    def fork(self) -> OrtSession:
        """See ``Session.fork``; ONNX Runtime's own session has no state."""
        twin = copy.copy(self)
        twin._tokens = TokenInputs(self.manifest.vocab_size, self.manifest.states)
        twin.reset(1, 0)
        return twin

    def step(self, input_ids: Ids, attention_mask: Ids, logits_to_keep: int = 0) -> Floats:
        """See ``Session.step``."""
        with self._tokens.call, guarded():
            self._tokens.check(input_ids, attention_mask)
            batch, tokens = input_ids.shape
            kept = rows_kept(self.manifest.task, tokens, logits_to_keep)
            self._tokens.changes += 1
            self._tokens.lost = True
            if self._tokens.seen and tokens > 1 and batch > 1 and self.manifest.by_token:
                pieces = []
                for t in range(tokens):
                    piece = self._run(input_ids[:, t : t + 1], attention_mask[:, t : t + 1], 1)
                    pieces += [piece] if t >= tokens - kept else []
                output: Floats = np.concatenate(pieces, axis=1)
            else:
                output = self._run(input_ids, attention_mask, kept)
            self._tokens.lost = False
        return output

    def _run(self, input_ids: Ids, attention_mask: Ids, kept: int) -> Floats:
        (batch, tokens), seen = input_ids.shape, self._tokens.seen
        sizes = {BATCH: batch, SEQUENCE: tokens, PAST: seen, TOTAL: seen + tokens}
        feeds = self._tokens.append(input_ids, attention_mask)
        # All of them are what the graph gives by itself.
        if kept < tokens:
            feeds[LOGITS_TO_KEEP] = np.array([kept], dtype=np.int64)
        self.fed = {name: array for name, array in feeds.items() if name in self._inputs}
        binding = self._session.io_binding()
        held = {name: ort_value(array) for name, array in {**self.fed, **self.given}.items()}
        for name, value in {**held, **self._state}.items():
            binding.bind_ortvalue_input(name, value)
        main = self.manifest.main_output
        binding.bind_output(main)
        for state in self.manifest.states:
            if state.shared:
                binding.bind_ortvalue_output(state.output, self._state[state.input])
            else:
                binding.bind_output(state.output)
        for name in self._taps:
            binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        names = [main, *(state.output for state in self.manifest.states), *self._taps]
        results = dict(zip(names, binding.get_outputs(), strict=True))
        rows = kept if LOGITS_TO_KEEP in self._inputs else tokens
        _expect(main, self._main_shape(batch, rows), results[main])
        for state in self.manifest.states:
            if not state.shared:
                shape = (sizes[d] if isinstance(d, str) else d for d in state.output_shape)
                _expect(state.output, tuple(shape), results[state.output])
                self._state[state.input] = results[state.output]
        self.tapped = {name: results[name].numpy() for name in self._taps}
        output: Floats = results[main].numpy().astype(np.float32, copy=False)
        # A copy, so that the others' memory goes.
        return output[:, rows - kept :].copy() if kept < rows else output

    def _main_shape(self, batch: int, rows: int) -> tuple[int | None, ...]:
        """What the task says of the main output; None for a size that it leaves open."""
        if self.manifest.task == "classify":
            return batch, len(self.manifest.labels)
        return batch, rows, self.manifest.vocab_size if self.manifest.task == "generate" else None

    def state(self) -> dict[str, Floats]:
        """See ``Session.state``."""
        with self._tokens.call, guarded():
            self._tokens.usable()
            seen = self._tokens.seen
            result = {}
            for state in self.manifest.states:
                array = self._state[state.input].numpy()
                if state.shared and state.axis is not None:
                    array = array.take(range(seen), axis=state.axis)
                result[state.output] = array.astype(np.float32)
        return result


def _expect(name: str, shape: tuple[int | None, ...], value: Any) -> None:
    """Refuse an output of another shape, which would be read as something else."""
    found = value.shape()
    fits = len(found) == len(shape) and all(
        wanted in (None, size) for size, wanted in zip(found, shape, strict=True)
    )
    if not fits:
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        raise SessionError(
            f"the graph gave {shown(name)} of shape {found}, and {MANIFEST} says [{sizes}]; the "
            "two are not of one export: export again."
        )
