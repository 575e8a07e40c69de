"""Fixtures shared by all tests: seeded tiny checkpoints, and ingots made from them."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

# Before anything imports Triton, as transformers does: its kernels run on the CPU here.
os.environ["TRITON_INTERPRET"] = "1"

# Every pass of an export checks its conditions.
os.environ["INGOT_DEBUG"] = "1"

# Before anything imports PyTorch: two workers of two threads each on two cores wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Never the user's own. The first process makes it for all workers and commands, and at its end it
# is removed.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="ingot-tests-cache-")
    os.environ["INGOT_CACHE"] = _cache.name

# Programs that tests start import the tree that is tested, wherever they run.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH")])
)

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from cpu_weights import TARGETS
from traces import Traces

from ingot.export.build import build
from ingot.export.graph import Capture
from ingot.export.progress import Stages
from ingot.export.request import ExportRequest
from ingot.graphs.family import find_family
from ingot.graphs.preset import preset_config, write_checkpoint
from ingot.plugins.device import has_gpu

if TYPE_CHECKING:
    from ingot.plugins.cpu.library import CpuLibrary
    from ingot.plugins.kernels.interpret import InterpretedLibrary

MakeCheckpoint = Callable[..., Path]
MakeIngot = Callable[..., Path]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where there is none."""
    if item.get_closest_marker("gpu") is not None and not has_gpu():
        pytest.skip("no NVIDIA GPU is here")


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """``make(family, dtype=..., **config)``: a new seeded checkpoint folder, preset ``tiny``."""

    def make(family: str = "olmoe", *, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
        folder = tmp_path_factory.mktemp(family)
        found = find_family(family)
        merged = {**preset_config(found, "tiny"), **config}
        write_checkpoint(folder, found, merged, dtype=dtype, seed=7)
        return folder

    return make


@pytest.fixture(scope="session")
def trained() -> Callable[[str], Path]:
    """``trained(family)``: a small checkpoint that was trained on text; read only."""

    def folder(family: str) -> Path:
        return _trained_data() / family

    return folder


@pytest.fixture(scope="session")
def trained_text() -> str:
    """Text of the kind that the trained checkpoints learned, which they never saw."""
    return (_trained_data() / "sample.txt").read_text()


def _trained_data() -> Path:
    data = Path(__file__).resolve().parent / "data" / "trained"
    if not data.is_dir():
        # Megabytes of weights, which a source distribution does without.
        pytest.skip("the trained checkpoints are in the repository alone")
    return data


@pytest.fixture(scope="session")
def traces() -> Traces:
    """The graphs that this process has traced."""
    return Traces()


@pytest.fixture(scope="session")
def make_ingot(tmp_path_factory: pytest.TempPathFactory, traces: Traces) -> MakeIngot:
    """``make(checkpoint, target, capture=..., **request)``: a new ingot, not validated.

    Its graph comes from ``traces``. A test that changes what is traced gives a ``capture``.
    """

    def make(checkpoint: Path, target: str, *, capture: Capture = traces, **request: Any) -> Path:
        out = tmp_path_factory.mktemp("ingot") / target
        asked = ExportRequest(str(checkpoint), target, out, **request)
        build(asked, Stages(), None, capture=capture)
        return out

    return make


@pytest.fixture(scope="module")
def shared_traces(traces: Traces) -> Iterator[None]:
    """Commands and validations that run in this process take their graphs from ``traces`` too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ingot.export.graph.trace", traces)
        yield


@pytest.fixture(scope="session")
def device(tmp_path_factory: pytest.TempPathFactory) -> InterpretedLibrary:
    """The kernel library of this tree over Triton's interpreter, with every form."""
    from ingot.plugins.kernels.build import all_forms
    from ingot.plugins.kernels.interpret import InterpretedLibrary

    # Compiled by the worker that needs it first, in the folder that holds those of all workers.
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with (folder / "kernels.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return InterpretedLibrary(all_forms(), folder / "kernels")


@pytest.fixture(scope="session")
def cpu_library() -> CpuLibrary:
    """The kernels for CPUs of this tree, built where they are not; read only but for its target."""
    from ingot.plugins.cpu.build import LIB, OBJECTS, build
    from ingot.plugins.cpu.library import CpuLibrary
    from ingot.plugins.errors import IngotError

    OBJECTS.mkdir(parents=True, exist_ok=True)
    with (OBJECTS / "build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            build(LIB)
        except IngotError as error:
            # Other systems have no such packages; `make cpu`, which CI calls, fails without.
            if "could not be fetched" not in str(error):
                raise
            pytest.skip(str(error))
    return CpuLibrary(LIB / "libingot_cpu.so")


@pytest.fixture(params=TARGETS)
def cpu_kernels(request: pytest.FixtureRequest, cpu_library: CpuLibrary) -> Iterator[CpuLibrary]:
    """``cpu_library`` on each instruction set in turn that this processor has."""
    if request.param not in cpu_library.targets:
        pytest.skip(f"this processor has no {request.param}")
    before = cpu_library.target
    cpu_library.use(request.param)
    yield cpu_library
    cpu_library.use(before)


@pytest.fixture(scope="session")
def tiny(make_checkpoint: MakeCheckpoint) -> Path:
    """A tiny OLMoE checkpoint; read only."""
    return make_checkpoint()


@pytest.fixture(scope="session")
def tiny_onnx(tiny: Path, make_ingot: MakeIngot) -> Path:
    """``tiny`` as an ``onnx`` ingot; read only."""
    return make_ingot(tiny, "onnx")


@pytest.fixture(scope="session")
def tiny_ort(tiny: Path, make_ingot: MakeIngot) -> Path:
    """``tiny`` as an ``ort`` ingot; read only."""
    return make_ingot(tiny, "ort")


@pytest.fixture(scope="session")
def ingots(make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot) -> Callable[..., Path]:
    """``ingots(family, target, **request)``: a tiny ingot, exported once; read only."""
    made: dict[str, Path] = {}

    def ingot(family: str, target: str = "ort", **request: Any) -> Path:
        key = f"{family} {target} {request}"
        if key not in made:
            made[key] = make_ingot(make_checkpoint(family), target, **request)
        return made[key]

    return ingot


@pytest.fixture(scope="session")
def own_kernels(ingots: Callable[..., Path], cpu_library: CpuLibrary) -> Path:
    """A tiny ``ort`` ingot of Mamba2 on Ingot's own kernels, this tree's; read only."""
    return ingots("mamba2", kernels="ingot", weights="checkpoint")


@pytest.fixture(scope="session")
def repository(tiny_ort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository for Triton of ``tiny_ort``, which it calls ``m``; read only."""
    from ingot.runtime.triton_plan import Settings
    from ingot.runtime.triton_repository import write_repository

    out = tmp_path_factory.mktemp("repository") / "repository"
    write_repository(tiny_ort, out, Settings(name="m", streams=2, threads=1))
    return out


@pytest.fixture
def copied(repository: Path, tmp_path: Path) -> Path:
    """A copy of ``repository``, to be damaged."""
    return Path(shutil.copytree(repository, tmp_path / "copied"))
