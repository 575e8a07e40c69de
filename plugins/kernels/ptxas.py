"""Which ptxas assembles the kernels, and which driver loads what it made.

A cubin of a CUDA 13 toolkit is loaded by NVIDIA's driver R580 and later only, one of CUDA 12 by
R525 and later (NVIDIA's table of minor version compatibility). Triton carries an older and a newer
ptxas; by itself it takes the newer one from a compute capability on that changes between versions
of Triton. So the choice is made here, and it is the same whatever the version.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ingot.plugins.errors import IngotError

# ``default`` is the older one up to and with 9.0, and the newer one above.
CHOICES = ("default", "older", "newer")

# Triton's variables for its two tools. Which of them it reads depends on its version and on the
# compute capability.
_VARIABLES = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")

# Triton asks each tool for its version once a process, and remembers the answer by compute
# capability alone; it is a part of the key of what was compiled before.
_REMEMBERED = ("get_ptxas_version", "get_features")


@dataclass(frozen=True)
class Ptxas:
    """One ptxas.

    Attributes:
        path: of the program.
        version: such as ``12.9.86``.
    """

    path: Path
    version: str


@dataclass(frozen=True)
class MinimumDriver:
    """The first driver that loads a cubin.

    Attributes:
        release: 525 for R525.
        cuda: what ``cuDriverGetVersion`` answers there, 12000 for CUDA 12.0.
    """

    release: int
    cuda: int


# By major version of the toolkit that ptxas is of.
_OF_TOOLKIT = {12: MinimumDriver(525, 12000), 13: MinimumDriver(580, 13000)}

# What the cards themselves need, where that may be more.
_OF_CARD = {
    89: MinimumDriver(520, 11080),
    90: MinimumDriver(520, 11080),
    100: MinimumDriver(570, 12080),
    120: MinimumDriver(570, 12080),
}


def choose(choice: str, capability: int) -> Ptxas:
    """The ptxas to take for one compute capability; where there is one only, that one.

    Args:
        choice: one of ``CHOICES``.
        capability: major times ten plus minor.

    Raises:
        IngotError: there is no ptxas.
    """
    tools = available()
    older = choice == "older" or (choice == "default" and capability <= 90)
    return tools[0] if older else tools[-1]


@cache
def available() -> tuple[Ptxas, ...]:
    """The ptxas that Triton carries, the oldest first; without any, the one that is installed.

    Raises:
        IngotError: there is none.
    """
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    paths: list[str | Path] = [*folder.glob("ptxas*")]
    if not paths:
        # Some distributions take them out of the package.
        named = (os.environ.get(name) or "" for name in _VARIABLES)
        paths = [path for path in (*named, shutil.which("ptxas") or "") if path]
    found = {tool.version: tool for path in paths if (tool := _asked(Path(path)))}
    if not found:
        raise IngotError(
            f"{folder} has no ptxas and none is installed; install Triton from PyPI, which brings "
            "one, or set TRITON_PTXAS_PATH to one of a CUDA toolkit."
        )
    return tuple(found[version] for version in sorted(found, key=_numbers))


def _asked(path: Path) -> Ptxas | None:
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    version = re.search(r"\bV(\d+\.\d+\.\d+)", done.stdout)
    return Ptxas(path, version[1]) if version else None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


@contextmanager
def used(tool: Ptxas) -> Iterator[None]:
    """Let Triton assemble with this ptxas, for any compute capability, in this process."""
    before = {name: os.environ.get(name) for name in _VARIABLES}
    os.environ.update(dict.fromkeys(_VARIABLES, str(tool.path)))
    _forget()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        _forget()


def _forget() -> None:
    from triton.backends.nvidia import compiler

    for name in _REMEMBERED:
        clear = getattr(getattr(compiler, name, None), "cache_clear", None)
        if clear is not None:
            clear()


def minimum_driver(capability: int, version: str) -> MinimumDriver:
    """The first driver that loads what a ptxas made for a compute capability.

    Args:
        capability: major times ten plus minor.
        version: of the ptxas.

    Raises:
        IngotError: a toolkit that is not in the table.
    """
    toolkit = _OF_TOOLKIT.get(_numbers(version)[0])
    if toolkit is None:
        raise IngotError(
            f"ptxas {version} is of no CUDA toolkit whose driver is known, which are "
            f"{', '.join(map(str, _OF_TOOLKIT))}; add its row to plugins/kernels/ptxas.py."
        )
    card = _OF_CARD.get(capability, toolkit)
    return max(toolkit, card, key=lambda driver: driver.release)
