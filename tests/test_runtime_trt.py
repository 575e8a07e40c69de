"""The TensorRT session without a GPU: its checks, and its calls over an engine that ORT stands for.

The stand-in has TensorRT's interface and runs the ingot's own graph on host memory, so what is
tested is everything the session itself does: profiles, shapes, buffers, turns and graphs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import MakeCheckpoint, MakeIngot
from oracle import relative_rms, tokens

from export.engine import profiles
from export.ingot import ENGINE, GRAPH, EngineInfo, FileInfo, Manifest, sha256
from export.request import Limits
from graphs.checkpoint import Checkpoint
from runtime.session import SessionError, load
from runtime.trt import TrtSession, check_engine
from validate.eager import EagerSession

LIMITS = Limits(max_batch=3, max_seq=40, opt_seq=16)


class HostMemory:
    """``runtime.trt.Memory`` on the host, where addresses are real and a graph is a call."""

    stream = 77

    def __init__(self) -> None:
        self.held: dict[int, Any] = {}
        self.captured = 0
        self.launched = 0

    def allocate(self, size: int) -> int:
        block = (ctypes.c_char * max(size, 1))()
        # What a new buffer holds must not matter.
        ctypes.memset(block, 0x7F, max(size, 1))
        address = ctypes.addressof(block)
        self.held[address] = block
        return address

    def free(self, address: int) -> None:
        del self.held[address]

    def zero(self, address: int, size: int) -> None:
        assert size <= len(self.held[address])
        ctypes.memset(address, 0, size)

    def upload(self, address: int, array: np.ndarray) -> None:
        assert array.flags.c_contiguous and array.nbytes <= len(self.held[address])
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def download(self, array: np.ndarray, address: int) -> None:
        assert array.flags.c_contiguous and array.nbytes <= len(self.held[address])
        ctypes.memmove(array.ctypes.data, address, array.nbytes)

    def capture(self, enqueue: Callable[[], None]) -> Any:
        self.captured += 1
        recorded: list[Callable[[], None]] = []
        StandIn.recording = recorded
        enqueue()
        StandIn.recording = None
        assert len(recorded) == 1
        return recorded[0]

    def launch(self, graph: Any) -> None:
        self.launched += 1
        graph()


class StandIn:
    """An engine, and its execution contexts, over ONNX Runtime."""

    recording: list[Callable[[], None]] | None = None

    def __init__(self, folder: Path, memory: HostMemory) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(folder / GRAPH, options)
        self.memory = memory
        self.profiles = profiles_of(Manifest.read(folder))
        self.used: list[str] = []

    def create_execution_context(self) -> Context:
        return Context(self)


class Context:
    def __init__(self, engine: StandIn) -> None:
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert stream == HostMemory.stream
        self.profile = self.engine.profiles[index]
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self.profile.shapes[name]
        self.shapes[name] = shape
        return all(a <= d <= b for a, d, b in zip(least, shape, most, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address in self.engine.memory.held
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        # A graph keeps the addresses and shapes of its capture.
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        if StandIn.recording is not None:
            StandIn.recording.append(lambda: self._run(shapes, addresses))
        else:
            self._run(shapes, addresses)
        self.engine.used.append(self.profile.name)
        return True

    def _run(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        feeds = {}
        for item in self.engine.session.get_inputs():
            dtype = {"tensor(int64)": np.int64, "tensor(float)": np.float32}[item.type]
            feeds[item.name] = np.empty(shapes[item.name], dtype)
            self.engine.memory.download(feeds[item.name], addresses[item.name])
        names = [item.name for item in self.engine.session.get_outputs()]
        for name, array in zip(names, self.engine.session.run(names, feeds), strict=True):
            self.engine.memory.upload(addresses[name], np.ascontiguousarray(array))


def profiles_of(manifest: Manifest) -> Any:
    return profiles(manifest.inputs, manifest.states, LIMITS)


def with_engine(folder: Path) -> Manifest:
    """The manifest of a lowered graph as if an engine had been built of it."""
    manifest = Manifest.read(folder)
    info = EngineInfo(
        builder="tensorrt-rtx",
        version="1.7",
        compute_capabilities=(80, 120),
        graph_sha256=manifest.files[GRAPH].sha256,
        plugins={"MoeDispatch": 2},
        libraries=("libingot_kernels.so",),
        embedded=False,
        profiles=profiles_of(manifest),
    )
    return replace(manifest, engine=info)


def session_of(folder: Path) -> tuple[TrtSession, HostMemory, StandIn]:
    memory = HostMemory()
    engine = StandIn(folder, memory)
    return TrtSession(folder, with_engine(folder), engine=engine, memory=memory), memory, engine


@pytest.fixture(scope="module", params=["granite", "mamba2"])
def lowered(
    request: pytest.FixtureRequest, make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot
) -> Path:
    return make_ingot(make_checkpoint(request.param), "trt", builder="none", precision="fp32")


def test_feeds_the_engine_what_the_graph_needs(lowered: Path) -> None:
    """Twice, with another batch and length, so that nothing of the first is left."""
    expected = load(lowered)
    actual, memory, engine = session_of(lowered)
    ids, mask = tokens(512)
    for rows, prefill in ((3, 8), (2, 5)):
        for session in (expected, actual):
            session.reset(rows, ids.shape[1])
        at = 0
        for count in (prefill, 1, 1, 1, 2, *[1] * 5):
            columns = slice(at, at + count)
            arguments = ids[:rows, columns], mask[:rows, columns]
            real = arguments[1] != 0
            want, got = expected.step(*arguments), actual.step(*arguments)
            assert got.dtype == np.float32 and got.shape == want.shape
            if real.any():
                assert relative_rms(want[real], got[real]) < 1e-6
            want_state, got_state = expected.state(), actual.state()
            assert want_state.keys() == got_state.keys()
            for name, array in want_state.items():
                assert array.shape == got_state[name].shape
                assert np.allclose(array, got_state[name], atol=1e-5)
            at += count
    assert {"prefill", "decode"} == set(engine.used)
    recurrent = "past_states.0.ssm" in {state.input for state in actual.manifest.states}
    assert (memory.launched > 4) == recurrent
    assert memory.captured == (4 if recurrent else 0)


def test_allocates_once_for_a_capacity(lowered: Path) -> None:
    session, memory, _ = session_of(lowered)
    ids, mask = tokens(512)
    for _ in range(2):
        session.reset(3, 30)
        session.step(ids[:, :9], mask[:, :9])
        for column in range(9, 14):
            session.step(ids[:, column : column + 1], mask[:, column : column + 1])
        held = set(memory.held)
    session.reset(3, 30)
    session.step(ids[:, :9], mask[:, :9])
    assert set(memory.held) == held


@pytest.mark.parametrize(("batch", "capacity"), [(4, 8), (1, 41)])
def test_refuses_more_than_the_engine_was_built_for(
    lowered: Path, batch: int, capacity: int
) -> None:
    session, _, _ = session_of(lowered)
    with pytest.raises(SessionError, match=r"\(3 of 40\); export with a larger --max-batch"):
        session.reset(batch, capacity)


def test_reads_bfloat16_as_float32(lowered: Path) -> None:
    session, memory, _ = session_of(lowered)
    halves = np.array([0x3F80, 0xC020, 0x7F80, 0x0000], dtype=np.uint16)
    address = memory.allocate(halves.nbytes)
    memory.upload(address, halves)
    found = session._download("bfloat16", (4,), address)
    np.testing.assert_array_equal(found, np.array([1.0, -2.5, np.inf, 0.0], dtype=np.float32))


@pytest.fixture
def ingot(lowered: Path, tmp_path: Path) -> tuple[Path, Manifest]:
    """A folder with the files of an engine ingot, as far as their hashes go."""
    manifest = with_engine(lowered)
    files = dict(manifest.files)
    (tmp_path / GRAPH).write_bytes((lowered / GRAPH).read_bytes())
    for name in (ENGINE, "libingot_kernels.so"):
        (tmp_path / name).write_bytes(name.encode())
        files[name] = FileInfo(len(name), sha256(tmp_path / name))
    return tmp_path, replace(manifest, files=files)


def test_an_engine_that_fits_is_accepted(ingot: tuple[Path, Manifest]) -> None:
    folder, manifest = ingot
    assert check_engine(folder, manifest, "1.7", 120) is manifest.engine


@pytest.mark.parametrize(
    ("version", "capability", "change", "message"),
    [
        ("1.8", 80, {}, "was built by tensorrt-rtx 1.7 and 1.8 is installed"),
        ("1.7", 90, {}, "was built for compute capability 8.0, 12.0 and this GPU has 9.0"),
        ("1.7", 80, {"libraries": ()}, "without the GPU kernels of MoeDispatch; run make plugins"),
        ("1.7", 80, {"graph_sha256": "0"}, "holds an engine of another model.onnx"),
    ],
)
def test_refuses_an_engine_before_reading_it(
    ingot: tuple[Path, Manifest],
    version: str,
    capability: int,
    change: dict[str, Any],
    message: str,
) -> None:
    folder, manifest = ingot
    assert manifest.engine is not None
    manifest = replace(manifest, engine=replace(manifest.engine, **change))
    with pytest.raises(SessionError, match=message):
        check_engine(folder, manifest, version, capability)


@pytest.mark.parametrize("name", [ENGINE, "libingot_kernels.so"])
def test_refuses_a_changed_engine_or_library(ingot: tuple[Path, Manifest], name: str) -> None:
    folder, manifest = ingot
    (folder / name).write_bytes(name.encode()[::-1])
    with pytest.raises(SessionError, match=r"SHA-256 differs\); an engine is code"):
        check_engine(folder, manifest, "1.7", 80)


def test_an_engine_without_a_gpu_is_refused_in_one_sentence(
    lowered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plugins.device.has_gpu", lambda: False)
    with pytest.raises(SessionError, match=r"this machine has no NVIDIA GPU; run an ort ingot"):
        TrtSession(lowered, with_engine(lowered))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["olmoe", "jetmoe", "granite", "mamba2"])
def test_an_engine_on_the_gpu_computes_what_eager_does(
    make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot, family: str, precision: str
) -> None:
    """Needs ``make plugins`` before, and TensorRT, or TensorRT-RTX on a card it supports."""
    folder = make_checkpoint(family)
    ingot = make_ingot(folder, "trt", precision=precision, limits=LIMITS)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    checkpoint = Checkpoint.open(folder)
    truth = EagerSession(checkpoint, "generate")
    eager = EagerSession(checkpoint, "generate", precision=dtype)
    engine = load(ingot)
    ids, mask = tokens(512)
    for session in (truth, eager, engine):
        session.reset(*ids.shape)
    at = 0
    for count in (8, *[1] * 10):
        arguments = ids[:, at : at + count], mask[:, at : at + count]
        real = arguments[1] != 0
        want, rounded, got = (s.step(*arguments)[real] for s in (truth, eager, engine))
        assert relative_rms(want, got) < 3 * relative_rms(want, rounded) + 1e-5
        at += count
