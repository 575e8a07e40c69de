"""llama.cpp: fetched as source, built for this machine, and run in processes of its own.

The source archive of ``llama-cpp-python`` holds llama.cpp whole, with its converter from Hugging
Face's format; the library alone is built of it, and ctypes bindings to that version lie beside it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.pinned import Package
from ingot.plugins.errors import IngotError
from ingot.plugins.whole import staged

SOURCE = Package(
    "llama-cpp-python",
    "0.3.36",
    "llama_cpp_python-0.3.36.tar.gz",
    "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
)
OFF = ("COMMON", "EXAMPLES", "SERVER", "TESTS", "TOOLS")
TOOLS = Path(__file__).with_name("tools.py")
CONVERTER = Path(__file__).with_name("convert.py")


class LlamaCppError(IngotError):
    """What llama.cpp refuses, or cannot be built for."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of a GGUF file.

    Attributes:
        name: GGUF's.
        kind: its type there, such as ``Q4_K``.
        size: its bytes.
        elements: its numbers.
    """

    name: str
    kind: str
    size: int
    elements: int


@dataclass(frozen=True)
class LlamaCpp:
    """A built llama.cpp.

    Attributes:
        folder: holds ``source`` and ``library``.
        threads: of every process.
    """

    folder: Path
    threads: int

    @classmethod
    def prepare(cls, folder: Path, downloads: Path, threads: int) -> LlamaCpp:
        """Fetch and build it where that was not done; building takes minutes.

        Args:
            folder: where it is to be.
            downloads: where the archive is kept.
            threads: see ``LlamaCpp``.

        Raises:
            FetchError: the registry gives none, or another one.
            LlamaCppError: no cmake, or no compiler that builds it.
        """
        if folder.is_dir():
            return cls(folder, threads)
        archive = SOURCE.fetch(downloads)
        with staged(folder, replace=False) as work:
            with tarfile.open(archive) as source:
                source.extractall(work, filter="data")
            (unpacked,) = work.iterdir()
            unpacked.rename(work / "source")
            build(work / "source" / "vendor" / "llama.cpp", work / "build", threads)
            # Each library names the next by a file's name alone and looks for it in a folder; the
            # one that they are built in is gone by then.
            shutil.copytree(work / "build" / "bin", work / "library", symlinks=True)
            shutil.rmtree(work / "build")
        return cls(folder, threads)

    def convert(self, checkpoint: Path, out: Path, kind: str = "F32") -> None:
        """Write a GGUF of a Hugging Face folder, by llama.cpp's own converter.

        Args:
            checkpoint: the folder.
            out: the file.
            kind: ``F32`` or ``BF16``.

        Raises:
            LlamaCppError: a checkpoint it does not know.
        """
        self.run(CONVERTER, checkpoint=str(checkpoint), out=str(out), kind=kind)

    def quantise(self, source: Path, out: Path, kind: str, importance: Path | None = None) -> None:
        """Write a GGUF file's tensors in another format, such as ``Q4_K_M``, or ``F32`` again.

        Args:
            source: a GGUF.
            out: the one to write.
            kind: llama.cpp's name of the format.
            importance: by ``importance.record``, for a choice of scales by a text.

        Raises:
            LlamaCppError: a format it does not know, or a tensor that does not fit.
        """
        given = None if importance is None else str(importance)
        self._tool("quantise", file=str(source), out=str(out), kind=kind, importance=given)

    def tensors(self, file: Path) -> list[Tensor]:
        """What a GGUF file holds, by the types it really has."""
        return [Tensor(**tensor) for tensor in self._tool("tensors", file=str(file))]

    def _tool(self, what: str, **given: Any) -> Any:
        return self.run(TOOLS, what=what, threads=self.threads, **given)

    def run(self, script: Path, **given: Any) -> Any:
        """What a script prints that takes JSON and finds the library and the bindings.

        Args:
            script: of this project; it is told where ``source`` is.
            given: the rest of what it takes.

        Raises:
            LlamaCppError: it fails.
        """
        done = subprocess.run(
            [sys.executable, script, json.dumps({"source": str(self.folder / "source"), **given})],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "LLAMA_CPP_LIB_PATH": str(self.folder / "library")},
        )
        if done.returncode:
            said = done.stderr.strip().splitlines()
            # Of a stack trace the last line says what is wrong; llama.cpp itself uses several.
            telling = (
                said[-1:] if any(line.startswith("Traceback") for line in said) else said[-12:]
            )
            raise LlamaCppError(f"llama.cpp refuses {given}: " + "\n".join(telling))
        return json.loads(done.stdout.splitlines()[-1])


def build(source: Path, folder: Path, threads: int) -> None:
    """Build ``libllama`` with what this processor has.

    Raises:
        LlamaCppError: no cmake, or no compiler that builds it.
    """
    options = [f"-DLLAMA_BUILD_{part}=OFF" for part in OFF]
    options += ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DLLAMA_CURL=OFF"]
    # Libraries that are moved find each other beside themselves.
    options += ["-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON", "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON"]
    options += ["-DCMAKE_INSTALL_RPATH=$ORIGIN"]
    for command in (
        ["cmake", "-S", source, "-B", folder, *options],
        ["cmake", "--build", folder, "--target", "llama", "--parallel", str(threads)],
    ):
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError as error:
            raise LlamaCppError("llama.cpp is built by cmake, which is not here.") from error
        if done.returncode:
            raise LlamaCppError(f"llama.cpp does not build here: {done.stderr.strip()[-800:]}")
