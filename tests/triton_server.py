"""Triton Inference Server without Docker: from the wheel of nvidia-pytriton, on loopback.

``python tests/triton_server.py`` unpacks it into ``.tools/triton`` (once) and boots it. The wheel
has the Python backend only, no ONNX Runtime or TensorRT. It is not installed: its dependencies are
not ours. The backend's interpreter is isolated, but it takes the packages of the environment whose
``python3`` is first on ``PATH``; so it gets one of its own, with the numpy 1 of its stub.

ONNX Runtime's backend is taken from the folder that ``INGOT_TRITON_BACKENDS`` names, where
``onnxruntime/libtriton_onnxruntime.so`` lies beside the ONNX Runtime it was linked with.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TOOLS = Path(__file__).resolve().parent.parent / ".tools" / "triton"
WHEEL = "nvidia-pytriton==0.7.0"
# Of x86_64 and of aarch64. What is in it is run, so the version alone does not do.
WHEEL_SHA256 = (
    "21f063ff93bb426d0c06b7a55e7eb9efcfe62c0dddd9a908e9877e18710128df",
    "f99e07ee56fe065337453956afba17d2673e02ec6a632c3de26ce6e7b32a0898",
)
NUMPY = "numpy==1.26.4"
READY = TOOLS / "ready"
SERVER = TOOLS / "wheel" / "pytriton" / "tritonserver"
BACKENDS = TOOLS / "backends"
PYTHON = TOOLS / "python"
LIBRARIES = TOOLS / "wheel" / "nvidia_pytriton.libs"
MORE_BACKENDS = "INGOT_TRITON_BACKENDS"
LOOPBACK = "127.0.0.1"


def version() -> str:
    """What is in the folder when it is complete."""
    return f"{WHEEL} {NUMPY} onnxruntime=={importlib.metadata.version('onnxruntime')}"


def missing() -> str | None:
    """Why no server can be booted here, or None."""
    if READY.is_file() and READY.read_text() == version():
        return None
    return "no server in .tools/triton: `make triton-test` fetches it"


def backend_missing() -> str | None:
    """Why no graph can be served here, or None."""
    if absent := missing():
        return absent
    folder = os.environ.get(MORE_BACKENDS)
    if folder and (Path(folder) / "onnxruntime" / "libtriton_onnxruntime.so").is_file():
        return None
    return f"{MORE_BACKENDS} names no folder with onnxruntime/libtriton_onnxruntime.so"


def prepare() -> None:
    """Fetch and unpack the server, where that was not done."""
    if missing() is None:
        return
    shutil.rmtree(TOOLS, ignore_errors=True)
    TOOLS.mkdir(parents=True)
    pip: list[str | Path] = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wanted = TOOLS / "wheel.txt"
    wanted.write_text(" ".join([WHEEL, *(f"--hash=sha256:{known}" for known in WHEEL_SHA256)]))
    fetch: list[str | Path] = ["download", "--no-deps", "--require-hashes", "--dest", TOOLS]
    fetch += ["-r", wanted]
    subprocess.run([*pip, *fetch], check=True)
    (wheel,) = TOOLS.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(TOOLS / "wheel")
    wheel.unlink()
    shutil.copytree(SERVER / "backends" / "python", BACKENDS / "python")
    stub = SERVER / "python_backend_stubs" / f"{sys.version_info[0]}.{sys.version_info[1]}"
    shutil.copy(stub / "triton_python_backend_stub", BACKENDS / "python")
    # A wheel keeps no permissions.
    for program in (BACKENDS / "python/triton_python_backend_stub", SERVER / "bin/tritonserver"):
        program.chmod(0o755)
    subprocess.run([sys.executable, "-m", "venv", PYTHON], check=True)
    packages = version().split()[1:]
    subprocess.run([PYTHON / "bin" / "python", *pip[1:], "install", *packages], check=True)
    READY.write_text(version())


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        process: of the server; its models' processes are children.
        http: port.
        grpc: port.
        metrics: port.
        log: file.
    """

    process: subprocess.Popen[bytes]
    http: int
    grpc: int
    metrics: int
    log: Path

    @property
    def url(self) -> str:
        """Of the gRPC endpoint."""
        return f"{LOOPBACK}:{self.grpc}"

    def get(self, path: str, port: int = 0) -> tuple[int, str]:
        """Status and text; 0 where nothing answers."""
        try:
            with urllib.request.urlopen(
                f"http://{LOOPBACK}:{port or self.http}{path}", timeout=5
            ) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, ""
        except OSError:
            return 0, ""

    def ready(self) -> bool:
        """What a readiness probe sees."""
        return self.get("/v2/health/ready")[0] == 200

    def resident(self) -> int:
        """Bytes of memory of the server and of its models' processes."""
        family, found = {self.process.pid}, 0
        parents = {}
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                parents[int(folder.name)] = (int(fields[1]), int(fields[21]))
        # A child has a higher id than its parent, but for a wrap of the ids.
        for pid in sorted(parents):
            if parents[pid][0] in family:
                family.add(pid)
        for pid in family:
            found += parents.get(pid, (0, 0))[1]
        return found * os.sysconf("SC_PAGE_SIZE")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((LOOPBACK, 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def _backends() -> Iterator[Path]:
    """A folder with every backend there is, since the server looks in one only."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "python").symlink_to(BACKENDS / "python")
        if backend_missing() is None:
            more = Path(os.environ[MORE_BACKENDS]).resolve() / "onnxruntime"
            (Path(folder) / "onnxruntime").symlink_to(more)
            # A backend in C++ asks for it by this name, which the wheel changed.
            (library,) = LIBRARIES.glob("libtritonserver-*.so")
            (Path(folder) / "libtritonserver.so").symlink_to(library)
        yield Path(folder)


@contextlib.contextmanager
def boot(repository: Path, models: str, log: Path) -> Iterator[Server]:
    """A server over a repository, by the repository's own launch script.

    Args:
        repository: made by ``ingot triton``.
        models: to load, by name.
        log: is written to.
    """
    environment = {
        **os.environ,
        "PATH": f"{PYTHON / 'bin'}:{os.environ['PATH']}",
        "TRITONSERVER": str(SERVER / "bin" / "tritonserver"),
        "MODELS": models,
        "ORT_DISABLE_TELEMETRY": "1",
    }
    # What pytest was given is not the server's.
    for name in ("PYTHONPATH", "VIRTUAL_ENV"):
        environment.pop(name, None)
    http, grpc, metrics = _free_ports(3)
    with _backends() as backends:
        libraries = [backends, LIBRARIES, sysconfig.get_config_var("LIBDIR")]
        environment["LD_LIBRARY_PATH"] = ":".join(map(str, libraries))
        options = [f"--backend-directory={backends}"]
        for name, port in (("http", http), ("grpc", grpc), ("metrics", metrics)):
            options += [f"--{name}-address={LOOPBACK}", f"--{name}-port={port}"]
        with log.open("wb") as file:
            process = subprocess.Popen(
                [repository / "launch.sh", *options],
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        server = Server(process, http, grpc, metrics, log)
        try:
            until = time.monotonic() + 120
            while not server.ready():
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"the server did not come up:\n{log.read_text()[-4000:]}")
                time.sleep(0.2)
            yield server
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(90)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


if __name__ == "__main__":
    prepare()
    print(f"{SERVER / 'bin' / 'tritonserver'} is there: {version()}")
