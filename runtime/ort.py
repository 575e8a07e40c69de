"""The session over ONNX Runtime's CPU provider, for the targets ``onnx`` and ``ort``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from export.ingot import GRAPH, Manifest, StateInfo
from runtime.session import Floats, Ids, SessionError
from runtime.tokens import TokenInputs

Array = npt.NDArray[Any]


class OrtSession:
    """Runs an ingot on ONNX Runtime; see ``runtime.session.Session``.

    A cache whose past and present may share a buffer is allocated once, at its capacity, and
    appended to in place. Another cache is handed on from output to input without a copy.
    """

    def __init__(self, folder: Path, manifest: Manifest, *, threads: int = 0) -> None:
        self.manifest = manifest
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Warnings about unused constants of the function bodies are of no use to a user.
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(
                str(folder / GRAPH), options, providers=["CPUExecutionProvider"]
            )
        # ONNX Runtime's exceptions share no public base class.
        except Exception as error:
            version = onnxruntime.__version__
            made_with = manifest.tools.get("onnxruntime", "another version")
            raise SessionError(
                f"ONNX Runtime {version} cannot load {folder / GRAPH} (made with {made_with}): "
                f"{error}"
            ) from error
        self._inputs = {item.name for item in manifest.inputs}
        self._tokens = TokenInputs(manifest.vocab_size, manifest.states)
        self.reset(1, 0)

    def reset(self, batch: int, capacity: int) -> None:
        """See ``Session.reset``."""
        self._tokens.reset(batch, capacity)
        self._state = {state.input: _value(self._zeros(state)) for state in self.manifest.states}

    def _zeros(self, state: StateInfo) -> Array:
        length = self._tokens.capacity if state.shared else 0
        named = {"batch": self._tokens.batch, "past_sequence": length}
        sizes = [named[d] if isinstance(d, str) else d for d in state.input_shape]
        return np.zeros(sizes, dtype=np.dtype(state.dtype))

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
        feeds = self._tokens.append(input_ids, attention_mask)
        binding = self._session.io_binding()
        held = {name: _value(array) for name, array in feeds.items() if name in self._inputs}
        for name, value in {**held, **self._state}.items():
            binding.bind_ortvalue_input(name, value)
        main = self.manifest.main_output
        binding.bind_output(main)
        for state in self.manifest.states:
            if state.shared:
                binding.bind_ortvalue_output(state.output, self._state[state.input])
            else:
                binding.bind_output(state.output)
        self._session.run_with_iobinding(binding)
        names = [main, *(state.output for state in self.manifest.states)]
        results = dict(zip(names, binding.get_outputs(), strict=True))
        for state in self.manifest.states:
            if not state.shared:
                self._state[state.input] = results[state.output]
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


def _value(array: Array) -> onnxruntime.OrtValue:
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
