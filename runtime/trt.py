"""The session over a TensorRT or TensorRT-RTX engine.

An engine is code for the GPU: it is read only where its hash is the manifest's, whatever ``verify``
says, and only by the builder's own version on a device it was built for.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ingot.export.ingot import ENGINE, GRAPH, MODULES, SIZES, EngineInfo, Manifest
from ingot.plugins import device as gpu
from ingot.plugins.library import PATH as KERNELS
from ingot.plugins.library import PLUGINS
from ingot.plugins.whole import sha256
from ingot.runtime.cuda_runtime import Device
from ingot.runtime.session import Floats, Ids, SessionError
from ingot.runtime.tokens import TokenInputs, rows_kept

# The buffer that contexts compute in; no tensor has a space in its name.
ACTIVATIONS = "context memory"


def check_engine(
    folder: Path, manifest: Manifest, version: str, capability: int, *, hashed: bool = False
) -> EngineInfo:
    """Prove that an engine may be loaded here, before it is read.

    Args:
        folder: the ingot.
        manifest: of the ingot.
        version: of the TensorRT that is installed.
        capability: of the device, major times ten plus minor.
        hashed: whether the files were found to be the manifest's just before.

    Raises:
        SessionError: one sentence with what differs and what to do.
    """
    engine = manifest.engine
    if engine is None:
        raise SessionError(f"{folder} holds no engine; export it with another --builder than none.")
    if version != engine.version:
        raise SessionError(
            f"{folder} was built by {engine.builder} {engine.version} and {version} is installed; "
            "an engine runs on the version that built it: install that one, or export again."
        )
    if capability not in engine.compute_capabilities:
        built_for = ", ".join(f"{c // 10}.{c % 10}" for c in engine.compute_capabilities)
        raise SessionError(
            f"{folder} was built for compute capability {built_for} and this GPU has "
            f"{capability // 10}.{capability % 10}; export again on this machine."
        )
    # One of the two is loaded, and only what is named here was hashed.
    libraries = {PLUGINS.name, KERNELS.name}.intersection(engine.libraries)
    if engine.plugins and not libraries and not engine.embedded:
        raise SessionError(
            f"{folder} was built without the GPU kernels of {', '.join(engine.plugins)}; run make "
            "plugins and export again."
        )
    if engine.graph_sha256 != manifest.files[GRAPH].sha256:
        raise SessionError(f"{folder} holds an engine of another {GRAPH}; export again.")
    for name in () if hashed else (ENGINE, *engine.libraries):
        if sha256(folder / name) != manifest.files[name].sha256:
            raise SessionError(
                f"{folder / name} is not the file that was exported (its SHA-256 differs); an "
                "engine is code, so it is not loaded: export again."
            )
    return engine


class Engine:
    """A deserialised engine; a session and its forks share it.

    Args:
        trt: the Python module that deserialised it.
        engine: the module's ``ICudaEngine``.
    """

    def __init__(self, trt: Any, engine: Any) -> None:
        self._trt = trt
        self._engine = engine

    @property
    def memory_size(self) -> int:
        """Bytes that a context computes in: what the most demanding profile needs."""
        return int(self._engine.device_memory_size_v2)

    def context(self, profile: int, address: int, stream: int) -> Any:
        """An execution context of one profile that has no memory of its own.

        Args:
            profile: index.
            address: of ``memory_size`` bytes on the device. Contexts may share them where no two
                run at the same time, since nothing is kept there from one run to the next.
            stream: on which the context will run.

        Raises:
            SessionError: TensorRT refuses, mostly for lack of memory.
        """
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(strategy)
        if context is not None:
            context.set_device_memory(address, self.memory_size)
            if context.set_optimization_profile_async(profile, stream):
                return context
        raise SessionError(
            "the engine could not make room to run; TensorRT's message is above, see nvidia-smi "
            "for what else holds the GPU's memory."
        )


def load_engine(folder: Path, manifest: Manifest, *, hashed: bool) -> Engine:
    """The deserialised engine, with its plugins registered.

    Raises:
        SessionError: no GPU, TensorRT is not installed, or the engine does not fit here.
    """
    info = manifest.engine
    module = MODULES[info.builder] if info else "tensorrt"
    if not gpu.has_gpu():
        raise SessionError(
            f"{folder} holds an engine and this machine has no NVIDIA GPU; run an ort ingot here."
        )
    if importlib.util.find_spec(module) is None:
        raise SessionError(f"the Python package {module} is missing; install it for this ingot.")
    trt = importlib.import_module(module)
    engine = check_engine(
        folder, manifest, str(trt.__version__), gpu.compute_capability(), hashed=hashed
    )
    if PLUGINS.name in engine.libraries and not engine.embedded:
        trt.get_plugin_registry().load_library(str(folder / PLUGINS.name))
    elif engine.plugins and not engine.embedded:
        from ingot.plugins.tensorrt.python_plugins import register

        register(trt, folder / KERNELS.name)
    runtime = trt.Runtime(_logger(module))
    runtime.engine_host_code_allowed = engine.embedded
    found = runtime.deserialize_cuda_engine((folder / ENGINE).read_bytes())
    if found is None:
        raise SessionError(f"{info and info.builder} cannot read {folder / ENGINE}; see above.")
    return Engine(trt, found)


@cache
def _logger(module: str) -> Any:
    # TensorRT keeps the first logger of the process without holding a reference to it.
    trt = importlib.import_module(module)
    return trt.Logger(trt.Logger.ERROR)


@dataclass
class Buffer:
    """Device memory that grows at need.

    Attributes:
        address: 0 before the first use.
        size: bytes.
    """

    address: int = 0
    size: int = 0


class TrtSession:
    """Runs an ingot's engine; see ``runtime.session.Session``.

    States live on the device in two buffers each, read from one and written to the other in turn,
    and both are allocated at ``reset``. The contexts of its profiles run one after the other, so
    they compute in one block of memory. Where every state has a fixed size, a decode step is a
    CUDA graph from its third call on, one for each turn.

    Args:
        folder: the ingot.
        manifest: of the ingot.
        hashed: whether the folder's files were found to be the manifest's just before.
        engine: by default the folder's, after its checks.

    Attributes:
        fed: the token inputs of the last call.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        hashed: bool = False,
        engine: Engine | None = None,
    ) -> None:
        self.manifest = manifest
        self._folder = folder
        self._engine = engine or load_engine(folder, manifest, hashed=hashed)
        self._memory = Device()
        assert manifest.engine is not None
        self._profiles = manifest.engine.profiles
        self._contexts: dict[int, Any] = {}
        self._inputs = {item.name: item for item in manifest.inputs}
        self._outputs = {item.name: item for item in manifest.outputs}
        self._tokens = TokenInputs(manifest.vocab_size, manifest.states)
        self._buffers: dict[str, Buffer] = {}
        self._graphs: dict[int, int] = {}
        self.fed: dict[str, Ids] = {}
        self.tapped: dict[str, Floats] = {}
        self._fixed = all(state.axis is None for state in manifest.states)
        self.reset(1, 0)

    @property
    def changes(self) -> int:
        """See ``Session``."""
        return self._tokens.changes

    def fork(self) -> TrtSession:
        """See ``Session.fork``; the engine is shared, its contexts and memory are not."""
        return TrtSession(self._folder, self.manifest, hashed=True, engine=self._engine)

    def reset(self, batch: int, capacity: int) -> None:
        """See ``Session.reset``.

        Raises:
            SessionError: more than the engine was built for.
        """
        with self._tokens.call:
            # First, since it refuses sizes that make no sense.
            self._tokens.reset(batch, capacity)
            self._tokens.lost = True
            most = self._profiles[0].shapes["input_ids"][2]
            if batch > most[0] or capacity > most[1]:
                raise SessionError(
                    f"{batch} sequences of {capacity} tokens are more than this engine was built "
                    f"for ({most[0]} of {most[1]}); export with a larger --max-batch or --max-seq."
                )
            self._turn = 0
            self._calls: dict[int, int] = {}
            self._drop_graphs()
            for state in self.manifest.states:
                size = self._bytes(state.dtype, state.shape(batch, capacity))
                before, _ = (self._room(f"{state.input}/{turn}", size) for turn in self._turns())
                # A cache that grows holds nothing yet, and the other buffer is written first.
                if state.axis is None:
                    self._memory.zero(before, size)
            self._tokens.lost = False

    def _bytes(self, dtype: str, shape: tuple[int, ...]) -> int:
        return SIZES[dtype] * int(np.prod(shape, dtype=np.int64))

    def _room(self, name: str, size: int) -> int:
        """The address of a buffer of at least so many bytes."""
        buffer = self._buffers.setdefault(name, Buffer())
        if buffer.address == 0 or buffer.size < size:
            if buffer.address:
                # They hold the address.
                self._drop_graphs()
                self._memory.free(buffer.address)
                # Should there be no memory for the new one, the old one is gone all the same.
                buffer.address = 0
            buffer.address, buffer.size = self._memory.allocate(size), size
        return buffer.address

    def _drop_graphs(self) -> None:
        while self._graphs:
            _, graph = self._graphs.popitem()
            self._memory.destroy(graph)

    def step(self, input_ids: Ids, attention_mask: Ids, logits_to_keep: int = 0) -> Floats:
        """See ``Session.step``; an engine computes the logits of all tokens."""
        with self._tokens.call:
            self._tokens.check(input_ids, attention_mask)
            tokens = input_ids.shape[1]
            kept = rows_kept(self.manifest.task, tokens, logits_to_keep)
            self._tokens.changes += 1
            self._tokens.lost = True
            output = self._step(input_ids, attention_mask)
            self._tokens.lost = False
        return output[:, tokens - kept :].copy() if kept < tokens else output

    def _step(self, input_ids: Ids, attention_mask: Ids) -> Floats:
        seen = self._tokens.seen
        feeds = self._tokens.append(input_ids, attention_mask)
        self.fed = {name: array for name, array in feeds.items() if name in self._inputs}
        batch, tokens = input_ids.shape
        context = self._context(tokens)
        for name, array in self.fed.items():
            address = self._room(name, array.nbytes)
            self._memory.upload(address, np.ascontiguousarray(array))
            self._bind(context, name, array.shape, address)
        for state in self.manifest.states:
            before, after = (self._buffers[f"{state.input}/{t}"] for t in self._turns())
            self._bind(context, state.input, state.shape(batch, seen), before.address)
            context.set_tensor_address(state.output, after.address)
        main = self._outputs[self.manifest.main_output]
        named = {"batch": batch, "sequence": tokens}
        shape = tuple(named[d] if isinstance(d, str) else d for d in main.shape)
        address = self._room(main.name, self._bytes(main.dtype, shape))
        context.set_tensor_address(main.name, address)
        self._run(context, tokens)
        self._turn = 1 - self._turn
        return self._download(main.dtype, shape, address)

    def _turns(self) -> tuple[int, int]:
        return self._turn, 1 - self._turn

    def _bind(self, context: Any, name: str, shape: tuple[int, ...], address: int) -> None:
        if not context.set_input_shape(name, shape):
            raise SessionError(f"the engine refuses {name} of shape {list(shape)}.")
        context.set_tensor_address(name, address)

    def _context(self, tokens: int) -> Any:
        """The execution context of the profile that fits so many new tokens."""
        decode = len(self._profiles) > 1 and tokens == 1
        index = 1 if decode else 0
        if index not in self._contexts:
            address = self._room(ACTIVATIONS, self._engine.memory_size)
            self._contexts[index] = self._engine.context(index, address, self._memory.stream)
        return self._contexts[index]

    def _run(self, context: Any, tokens: int) -> None:
        graph = self._graphs.get(self._turn)
        if tokens == 1 and graph is not None:
            self._memory.launch(graph)
            return
        self._enqueue(context)
        if tokens != 1 or not self._fixed or not self.manifest.states:
            return
        # The first call of a shape may allocate, which a capture may not.
        self._calls[self._turn] = self._calls.get(self._turn, 0) + 1
        if self._calls[self._turn] > 1:
            self._graphs[self._turn] = self._memory.capture(lambda: self._enqueue(context))

    def _enqueue(self, context: Any) -> None:
        if not context.execute_async_v3(self._memory.stream):
            raise SessionError("the engine could not run; TensorRT's message is above.")

    def _download(self, dtype: str, shape: tuple[int, ...], address: int) -> Floats:
        if dtype != "bfloat16":
            array = np.empty(shape, dtype=dtype)
            self._memory.download(array, address)
            return array.astype(np.float32, copy=False)
        # numpy has no bfloat16: it is the upper half of a float32.
        halves = np.empty(shape, dtype=np.uint16)
        self._memory.download(halves, address)
        result: Floats = (halves.astype(np.uint32) << 16).view(np.float32)
        return result

    def state(self) -> dict[str, Floats]:
        """See ``Session.state``."""
        with self._tokens.call:
            self._tokens.usable()
            return {
                state.output: self._download(
                    state.dtype,
                    state.shape(self._tokens.batch, self._tokens.seen),
                    self._buffers[f"{state.input}/{self._turn}"].address,
                )
                for state in self.manifest.states
            }
