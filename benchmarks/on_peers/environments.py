"""The versions that are compared, and a Python environment for each program that needs its own."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from benchmarks.on_peers.program import PeerError, run_logged
from ingot.plugins.whole import write_whole

# What computes and what exports; pip chooses the rest, and ``versions`` says what it chose.
PINNED: dict[str, tuple[str, ...]] = {
    "onnxruntime-genai": (
        "onnxruntime-genai==0.18.0",
        "onnxruntime==1.31.1",
        "onnx==1.23.2",
        "onnx-ir==1.1.0",
        "torch==2.13.0",
        "transformers==5.23.0",
    ),
    "mobius": (
        "mobius-onnx==0.1.0",
        "onnxruntime==1.31.1",
        "onnx==1.23.2",
        "onnx-ir==1.1.0",
        "torch==2.13.0",
        "transformers==5.23.0",
    ),
    "openvino": (
        "optimum-intel==2.2.0",
        "optimum==2.3.0",
        "openvino==2026.4.1",
        "openvino-tokenizers==2026.4.1.0",
        "nncf==3.4.0",
        "torch==2.13.0",
        "transformers==5.5.4",
    ),
}
# optimum-intel asks for it, for images; a build of it that does not fit PyTorch's breaks every
# import, and a registry may have one of the two for CPUs alone.
UNWANTED: dict[str, tuple[str, ...]] = {"openvino": ("torchvision",)}
_LIST = "installed.txt"


@dataclass
class Installed:
    """What a ``Program`` has that runs in an environment of its own.

    Attributes:
        work: where its environment and its files are kept.
        name: of ``PINNED``.
        python: the interpreter, once it is there.
        told: the packages whose versions a table names.
    """

    work: Path
    name: str = ""
    python: Path = Path()
    told: ClassVar[tuple[str, ...]] = ()

    def prepare(self) -> None:
        self.python = prepare(self.name, self.work, self.work / "logs" / f"{self.name}-install.txt")

    def versions(self) -> dict[str, str]:
        found = versions(self.name, self.work)
        return {name: found[name] for name in self.told if name in found}


def prepare(name: str, work: Path, log: Path) -> Path:
    """The interpreter of an environment, which is made where it is not there as it is pinned.

    Args:
        name: of ``PINNED``.
        work: where environments are kept.
        log: where pip's output goes.

    Raises:
        PeerError: pip finds no such versions for this machine.
    """
    folder = work / "environments" / name
    python, done = folder / "bin" / "python", folder / "pinned.txt"
    wanted = "\n".join((*PINNED[name], *(f"not {each}" for each in UNWANTED.get(name, ()))))
    if done.is_file() and done.read_text() == wanted:
        return python
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    try:
        run_logged([sys.executable, "-m", "venv", "--clear", folder], log)
        run_logged([*pip, "install", "--quiet", *PINNED[name]], log)
        for each in UNWANTED.get(name, ()):
            run_logged([*pip, "uninstall", "--quiet", "--yes", each], log)
        run_logged([*pip, "list", "--format=freeze"], folder / _LIST)
    except PeerError as error:
        raise PeerError("cannot be installed", error.details) from error
    write_whole(done, wanted)
    return python


def versions(name: str, work: Path) -> dict[str, str]:
    """What an environment really holds, by package; empty where it was not made."""
    path = work / "environments" / name / _LIST
    if not path.is_file():
        return {}
    return dict(re.findall(r"^([^=\s]+)==(\S+)$", path.read_text(), re.MULTILINE))


def compiler() -> str:
    """The C++ compiler's own name and version; empty where there is none."""
    try:
        done = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.splitlines()[0] if done.stdout else ""
