"""The session over ONNX Runtime's CPU provider, for the targets ``onnx`` and ``ort``."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ingot.export.ingot import GRAPH, MANIFEST, Manifest
from ingot.graphs.state import State
from ingot.runtime.onnxruntime_session import open_session, ort_value
from ingot.runtime.session import Floats, Ids, SessionError
from ingot.runtime.tokens import TokenInputs

Array = npt.NDArray[Any]


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
    ) -> None:
        self.manifest = manifest
        self.given: dict[str, Array] = {}
        self.fed: dict[str, Ids] = {}
        self.tapped: dict[str, Array] = {}
        self._taps = list(taps)
        name = str(folder / GRAPH)
        try:
            self._session = open_session(
                folder / GRAPH if graph is None else graph,
                name=name,
                threads=threads,
                weights_folder=folder,
            )
        except SessionError as error:
            made_with = manifest.tools.get("onnxruntime", "another version")
            sentence = str(error).replace(name, f"{name} (made with {made_with})", 1)
            raise SessionError(sentence) from error
        has = {item.name for item in (*self._session.get_inputs(), *self._session.get_outputs())}
        named = {manifest.main_output, *(item.name for item in manifest.inputs)}
        missing = sorted((named | {state.output for state in manifest.states}) - has)
        if missing:
            raise SessionError(
                f"{folder / GRAPH} has no {', '.join(missing)}, which {MANIFEST} names; the two "
                "are not of one export: export again."
            )
        self._inputs = {item.name for item in manifest.inputs}
        self._tokens = TokenInputs(manifest.vocab_size, manifest.states)
        self.reset(1, 0)

    def reset(self, batch: int, capacity: int) -> None:
        """See ``Session.reset``."""
        self._tokens.reset(batch, capacity)
        self._state = {state.input: ort_value(self._zeros(state)) for state in self.manifest.states}

    def _zeros(self, state: State) -> Array:
        room = self._tokens.capacity if state.shared else 0
        return np.zeros(state.shape(self._tokens.batch, room), dtype=state.dtype)

    def fork(self) -> OrtSession:
        """See ``Session.fork``; ONNX Runtime's own session has no state."""
        twin = copy.copy(self)
        twin._tokens = TokenInputs(self.manifest.vocab_size, self.manifest.states)
        twin.reset(1, 0)
        return twin

    def step(self, input_ids: Ids, attention_mask: Ids) -> Floats:
        """See ``Session.step``."""
        self._tokens.check(input_ids, attention_mask)
        batch, tokens = input_ids.shape
        # ONNX Runtime's GroupQueryAttention refuses several rows of several tokens after a past.
        shared = any(state.shared for state in self.manifest.states)
        if self._tokens.seen and tokens > 1 and batch > 1 and shared:
            pieces = [
                self._run(input_ids[:, t : t + 1], attention_mask[:, t : t + 1])
                for t in range(tokens)
            ]
            return np.concatenate(pieces, axis=1)
        return self._run(input_ids, attention_mask)

    def _run(self, input_ids: Ids, attention_mask: Ids) -> Floats:
        self._tokens.lost = True
        feeds = self._tokens.append(input_ids, attention_mask)
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
        for state in self.manifest.states:
            if not state.shared:
                self._state[state.input] = results[state.output]
        self.tapped = {name: results[name].numpy() for name in self._taps}
        self._tokens.lost = False
        output: Floats = results[main].numpy().astype(np.float32, copy=False)
        return output

    def state(self) -> dict[str, Floats]:
        """See ``Session.state``."""
        seen = self._tokens.seen
        result = {}
        for state in self.manifest.states:
            array = self._state[state.input].numpy()
            if state.shared and state.axis is not None:
                array = array.take(range(seen), axis=state.axis)
            result[state.output] = array.astype(np.float32)
        return result
