"""The TensorRT session without a GPU: its checks, and its calls over an engine that ORT stands for.

The stand-in has TensorRT's interface and runs the ingot's own graph on host memory, so what is
tested is everything the session itself does: profiles, shapes, buffers, turns and graphs.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import importlib.util
import sys
from dataclasses import replace
from enum import Enum
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeCheckpoint, MakeIngot
from host_cuda import HostCuda
from oracle import relative_rms, tokens

from ingot.export.engine import profiles
from ingot.export.ingot import ENGINE, GRAPH, EngineInfo, FileInfo, Manifest
from ingot.export.request import Limits
from ingot.graphs.checkpoint import Checkpoint
from ingot.plugins.device import compute_capability
from ingot.plugins.library import PATH as KERNEL_LIBRARY
from ingot.plugins.library import PLUGINS as PLUGIN_LIBRARY
from ingot.plugins.whole import sha256
from ingot.runtime.loading import load
from ingot.runtime.onnxruntime_session import open_session
from ingot.runtime.session import SessionError
from ingot.runtime.trt import Engine, TrtSession, check_engine
from ingot.validate.truth.eager import EagerSession

LIMITS = Limits(max_batch=3, max_seq=40, opt_seq=16)


# Bytes of activations by profile, and the more of the two, which TensorRT says.
ACTIVATIONS = {"prefill": 4100, "decode": 700}

TENSORRT = SimpleNamespace(
    ExecutionContextAllocationStrategy=Enum("Strategy", ["STATIC", "USER_MANAGED"])
)
Strategy = TENSORRT.ExecutionContextAllocationStrategy


class StandIn:
    """An engine, and its execution contexts, over ONNX Runtime."""

    device_memory_size_v2 = max(ACTIVATIONS.values())

    def __init__(self, folder: Path, cuda: HostCuda) -> None:
        self.session = open_session(folder / GRAPH)
        self.cuda = cuda
        self.profiles = profiles_of(Manifest.read(folder))
        self.contexts: list[Context] = []
        self.used: list[str] = []
        self.fails = False

    def create_execution_context(self, strategy: Any = Strategy.STATIC) -> Context:
        context = Context(self)
        if strategy is Strategy.STATIC:
            _, address = self.cuda.malloc(self.device_memory_size_v2)
            context.set_device_memory(address or 0, self.device_memory_size_v2)
        self.contexts.append(context)
        return context


class Context:
    def __init__(self, engine: StandIn) -> None:
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.memory = (0, 0)

    def set_device_memory(self, address: int, size: int) -> None:
        self.engine.cuda.block_of(address, size)
        self.memory = (address, size)

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert stream in self.engine.cuda.streams
        self.profile = self.engine.profiles[index]
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self.profile.shapes[name]
        self.shapes[name] = shape
        return all(a <= d <= b for a, d, b in zip(least, shape, most, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address in self.engine.cuda.blocks
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        if self.engine.fails or self.memory[1] < ACTIVATIONS[self.profile.name]:
            return False
        # A graph keeps the addresses and shapes of its capture.
        shapes, addresses, memory = dict(self.shapes), dict(self.addresses), self.memory
        self.engine.cuda.enqueue(stream, lambda: self._run(shapes, addresses, memory))
        self.engine.used.append(self.profile.name)
        return True

    def _run(
        self,
        shapes: dict[str, tuple[int, ...]],
        addresses: dict[str, int],
        memory: tuple[int, int],
    ) -> None:
        cuda = self.engine.cuda
        cuda.block_of(*memory)
        # Whatever else lies there is lost, before a run as after it.
        ctypes.memset(memory[0], 0x7F, memory[1])
        feeds = {}
        for item in self.engine.session.get_inputs():
            dtype = {"tensor(int64)": np.int64, "tensor(float)": np.float32}[item.type]
            array = feeds[item.name] = np.empty(shapes[item.name], dtype)
            cuda.block_of(addresses[item.name], array.nbytes)
            ctypes.memmove(array.ctypes.data, addresses[item.name], array.nbytes)
        names = [item.name for item in self.engine.session.get_outputs()]
        for name, array in zip(names, self.engine.session.run(names, feeds), strict=True):
            array = np.ascontiguousarray(array)
            cuda.block_of(addresses[name], array.nbytes)
            ctypes.memmove(addresses[name], array.ctypes.data, array.nbytes)
        ctypes.memset(memory[0], 0x55, memory[1])


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


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> HostCuda:
    return HostCuda().install(monkeypatch)


def session_of(folder: Path, cuda: HostCuda) -> tuple[TrtSession, StandIn]:
    engine = StandIn(folder, cuda)
    session = TrtSession(folder, with_engine(folder), engine=Engine(TENSORRT, engine))
    return session, engine


def grows(session: TrtSession) -> bool:
    """Whether the session's states grow, so that no step can be a graph."""
    return "past_states.0.ssm" not in {state.input for state in session.manifest.states}


def feed(session: TrtSession, rows: int, *counts: int) -> list[np.ndarray]:
    """What calls of so many tokens give, one after the other."""
    ids, _ = tokens(512)
    ends = np.cumsum(counts)
    return [
        session.step(ids[:rows, end - count : end], np.ones((rows, count), np.int64))
        for end, count in zip(ends, counts, strict=True)
    ]


def test_hands_out_the_last_logits_of_all(lowered: Path, cuda: HostCuda) -> None:
    session, _ = session_of(lowered, cuda)
    ids, _ = tokens(512)
    found = []
    for kept in (0, 2):
        session.reset(2, 8)
        found.append(session.step(ids[:2, :8], np.ones((2, 8), np.int64), kept))
    np.testing.assert_array_equal(found[1], found[0][:, -2:])


@pytest.fixture(scope="module", params=["granite", "mamba2"])
def lowered(
    request: pytest.FixtureRequest, make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot
) -> Path:
    return make_ingot(make_checkpoint(request.param), "trt", builder="none", precision="fp32")


def test_feeds_the_engine_what_the_graph_needs(lowered: Path, cuda: HostCuda) -> None:
    """Twice, with another batch and length, so that nothing of the first is left."""
    expected = load(lowered)
    actual, engine = session_of(lowered, cuda)
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
    assert (cuda.launched > 4) == (not grows(actual))
    assert cuda.captured == (0 if grows(actual) else 4)


def test_allocates_once_for_a_capacity(lowered: Path, cuda: HostCuda) -> None:
    session, _ = session_of(lowered, cuda)
    for _ in range(2):
        session.reset(3, 30)
        feed(session, 3, 9, *[1] * 5)
        held = set(cuda.blocks)
    session.reset(3, 30)
    feed(session, 3, 9)
    assert set(cuda.blocks) == held


def test_both_profiles_compute_in_one_block(lowered: Path, cuda: HostCuda) -> None:
    session, engine = session_of(lowered, cuda)
    session.reset(3, 30)
    before = set(cuda.blocks)
    feed(session, 3, 9, *[1] * 5, 2)
    assert set(engine.used) == {"prefill", "decode"}
    assert len({context.memory for context in engine.contexts}) == 1
    # Beside it come the three token inputs and the logits.
    added = sorted(len(cuda.blocks[address]) for address in set(cuda.blocks) - before)
    assert len(added) == 2 + len(session.fed) and added.count(max(ACTIVATIONS.values())) == 1


def test_a_fork_computes_in_a_block_of_its_own(lowered: Path, cuda: HostCuda) -> None:
    session, engine = session_of(lowered, cuda)
    alone = StandIn(lowered, cuda)
    expected = TrtSession(lowered, session.manifest, engine=Engine(TENSORRT, alone))
    fork = session.fork()
    for each in (session, fork, expected):
        each.reset(2, 20)
    ids, mask = tokens(512)
    at = 0
    for count in (5, 1, 1, 1, 1):
        want, got, forked = (
            each.step(ids[:2, at : at + count], mask[:2, at : at + count])
            for each in (expected, session, fork)
        )
        assert np.array_equal(want, got, equal_nan=True)
        assert np.array_equal(want, forked, equal_nan=True)
        at += count
    assert len(engine.contexts) == 4
    assert len({context.memory for context in engine.contexts}) == 2
    assert len(cuda.streams) == 3


def test_an_engine_that_finds_no_room_says_so(
    lowered: Path, cuda: HostCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, engine = session_of(lowered, cuda)
    session.reset(1, 8)
    monkeypatch.setattr(engine, "create_execution_context", lambda strategy: None)
    with pytest.raises(SessionError, match="could not make room to run; TensorRT's message"):
        feed(session, 1, 3)


def test_a_reset_in_mid_sequence_begins_at_zero(lowered: Path, cuda: HostCuda) -> None:
    """In either turn; and nothing is cleared that is written before it is read."""
    session, _ = session_of(lowered, cuda)
    for steps in (2, 3):
        session.reset(2, 30)
        feed(session, 2, 6, *[1] * steps)
        assert any(array.any() for array in session.state().values())
        cuda.zeroed.clear()
        session.reset(2, 30)
        state = session.state()
        assert not any(array.any() for array in state.values())
        assert sum(size for _, size in cuda.zeroed) == sum(a.nbytes for a in state.values())
        assert bool(cuda.zeroed) == (not grows(session))


def test_graphs_are_destroyed_when_nothing_can_launch_them(lowered: Path, cuda: HostCuda) -> None:
    session, _ = session_of(lowered, cuda)
    if grows(session):
        pytest.skip("no step of a growing cache is a graph")
    session.reset(2, 30)
    feed(session, 2, 4, *[1] * 5)
    assert len(cuda.executables) == 2
    session.reset(2, 30)
    assert cuda.executables == {}
    feed(session, 2, 4, *[1] * 5)
    before = set(cuda.executables)
    assert len(before) == 2
    # Its inputs do not fit the buffers that the graphs read.
    feed(session, 2, 9)
    assert cuda.executables == {}
    feed(session, 2, *[1] * 4)
    assert len(cuda.executables) == 2 and not before & set(cuda.executables)
    assert cuda.graphs == {}


def test_an_engine_that_fails_in_a_capture_leaves_the_session_of_use(
    lowered: Path, cuda: HostCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, engine = session_of(lowered, cuda)
    if grows(session):
        pytest.skip("no step of a growing cache is a graph")
    session.reset(2, 30)
    want = feed(session, 2, 4, *[1] * 5)
    session.reset(2, 30)
    begin = cuda.stream_begin_capture

    def and_fail(stream: int, mode: int) -> tuple[int]:
        engine.fails = True
        return begin(stream, mode)

    with monkeypatch.context() as patched:
        patched.setattr(cuda, "stream_begin_capture", and_fail)
        with pytest.raises(SessionError, match="the engine could not run"):
            feed(session, 2, 4, *[1] * 5)
    engine.fails = False
    assert cuda.graphs == cuda.executables == {}
    session.reset(2, 30)
    for expected, found in zip(want, feed(session, 2, 4, *[1] * 5), strict=True):
        assert np.array_equal(expected, found, equal_nan=True)


def test_gives_the_device_back_what_it_held(lowered: Path, cuda: HostCuda) -> None:
    session, engine = session_of(lowered, cuda)
    session.reset(2, 30)
    feed(session, 2, 4, *[1] * 5)
    assert len(cuda.blocks) > 4 and len(cuda.streams) == 1
    del session
    gc.collect()
    assert engine.contexts and cuda.alive == 0


def test_goes_on_smaller_where_there_was_no_memory(lowered: Path, cuda: HostCuda) -> None:
    session, _ = session_of(lowered, cuda)
    session.reset(1, 8)
    want = feed(session, 1, 3, 1)
    cuda.room = 1
    with pytest.raises(SessionError, match="refused cudaMalloc: out of memory; give it less"):
        session.reset(3, 40)
    with pytest.raises(SessionError, match="state is lost; call reset first"):
        feed(session, 3, 3)
    cuda.room = 1 << 30
    session.reset(1, 8)
    for expected, found in zip(want, feed(session, 1, 3, 1), strict=True):
        assert np.array_equal(expected, found, equal_nan=True)


@pytest.mark.parametrize(("batch", "capacity"), [(4, 8), (1, 41)])
def test_refuses_more_than_the_engine_was_built_for(
    lowered: Path, cuda: HostCuda, batch: int, capacity: int
) -> None:
    session, _ = session_of(lowered, cuda)
    with pytest.raises(SessionError, match=r"\(3 of 40\); export with a larger --max-batch"):
        session.reset(batch, capacity)


def test_refuses_what_every_session_does_and_is_lost_after_a_refused_reset(
    lowered: Path, cuda: HostCuda
) -> None:
    session, _ = session_of(lowered, cuda)
    for batch, capacity in ((0, 4), (-1, 4), (1, -1), (1.5, 4), ("1", 4), (1, 2**63), (999, 4)):
        session.reset(2, 20)
        with pytest.raises(SessionError, match=r"give a batch of at least 1|built for"):
            session.reset(batch, capacity)  # type: ignore[arg-type]
        for call in (lambda: feed(session, 2, 3), session.state):
            with pytest.raises(SessionError, match="the state is lost; call reset first"):
                call()
    session.reset(2, 20)
    feed(session, 2, 3)
    late = np.array([[1, 1], [0, 1]])
    if grows(session):
        session.step(late, late)
    else:
        with pytest.raises(SessionError, match="padding behind the first token of row 1"):
            session.step(late, late)
    with session._tokens.call, pytest.raises(SessionError, match="busy with a call"):
        feed(session, 2, 1)


def test_reads_bfloat16_as_float32(lowered: Path, cuda: HostCuda) -> None:
    session, _ = session_of(lowered, cuda)
    halves = np.array([0x3F80, 0xC020, 0x7F80, 0x0000], dtype=np.uint16)
    address = session._memory.allocate(halves.nbytes)
    session._memory.upload(address, halves)
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
        ("1.7", 80, {"libraries": ("another.so",)}, "without the GPU kernels of MoeDispatch"),
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
    monkeypatch.setattr("ingot.plugins.device.has_gpu", lambda: False)
    with pytest.raises(SessionError, match=r"this machine has no NVIDIA GPU; run an ort ingot"):
        TrtSession(lowered, with_engine(lowered))


def _absent(module: str) -> bool:
    # Python asks a module's package first, and that may be missing too.
    names = module.split(".")
    parents = [".".join(names[:count]) for count in range(1, len(names) + 1)]
    return any(importlib.util.find_spec(name) is None for name in parents)


def why_no_engine(card: int) -> str | None:
    """Why no engine can be built and run on a card of this compute capability, or None."""
    if _absent("tensorrt") and _absent("tensorrt_rtx"):
        return "neither tensorrt nor tensorrt_rtx is installed"
    for module in ("polygraphy", "cuda.bindings"):
        if _absent(module):
            return f"{module} is not installed"
    if not KERNEL_LIBRARY.is_file() and not PLUGIN_LIBRARY.is_file():
        return f"{KERNEL_LIBRARY} is not built; run make plugins"
    # An export takes TensorRT where both are.
    if _absent("tensorrt"):
        supported = vars(importlib.import_module("tensorrt_rtx").ComputeCapability)
        if f"SM{card}" not in supported:
            return f"tensorrt_rtx does not support compute capability {card // 10}.{card % 10}"
    return None


@pytest.mark.parametrize(
    ("missing", "card", "reason"),
    [
        (["tensorrt", "tensorrt_rtx"], 120, "neither tensorrt nor tensorrt_rtx is installed"),
        (["polygraphy"], 120, "polygraphy is not installed"),
        (["cuda"], 120, "cuda.bindings is not installed"),
        (["libraries"], 120, "is not built; run make plugins"),
        (["tensorrt"], 90, "tensorrt_rtx does not support compute capability 9.0"),
        (["tensorrt"], 100, "tensorrt_rtx does not support compute capability 10.0"),
        (["tensorrt"], 120, None),
        ([], 90, None),
    ],
)
def test_an_engine_is_not_run_where_something_is_missing(
    missing: list[str],
    card: int,
    reason: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("tensorrt", "tensorrt_rtx", "polygraphy", "cuda", "cuda.bindings"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        here = name not in missing
        monkeypatch.setitem(sys.modules, name, module if here else None)
        # NVIDIA's list of what TensorRT-RTX 1.7 runs on.
        vars(module)["ComputeCapability"] = Enum("C", ["SM80", "SM86", "SM89", "SM120"])
    library = tmp_path / "library.so"
    if "libraries" not in missing:
        library.touch()
    for name in ("KERNEL_LIBRARY", "PLUGIN_LIBRARY"):
        monkeypatch.setattr(sys.modules[__name__], name, library)
    found = why_no_engine(card)
    assert found == reason or (reason is not None and reason in str(found))


def test_knows_the_cards_of_the_tensorrt_rtx_that_is_installed() -> None:
    capabilities = vars(pytest.importorskip("tensorrt_rtx").ComputeCapability)
    assert "SM120" in capabilities and not {"SM90", "SM100"} & capabilities.keys()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["olmoe", "jetmoe", "granite", "mamba2"])
def test_an_engine_on_the_gpu_computes_what_eager_does(
    make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot, family: str, precision: str
) -> None:
    """Needs ``make plugins`` before, and TensorRT, or TensorRT-RTX on a card it supports."""
    reason = why_no_engine(compute_capability())
    if reason is not None:
        pytest.skip(reason)
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
