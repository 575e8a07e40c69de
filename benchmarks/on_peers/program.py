"""What every program that is compared has, and how one that fails says why."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from benchmarks.on_peers.models import Model
from ingot.plugins.errors import IngotError

WORKERS = Path(__file__).with_name("workers")
# What a process says as it ends -> what a cell of the table says. The first that is found counts.
PHRASES = (
    (
        r"not currently supported|not supported|[Uu]nrecognized|[Uu]nsupported|not registered"
        r"|unknown model|custom or unsupported architecture",
        "no such architecture",
    ),
    (r"MemoryError|bad_alloc|[Kk]illed|out of memory", "not enough memory"),
    (r"No space left", "no room on the disk"),
)
# Seconds after which a process is given up.
PATIENCE = 1800
_ERROR = re.compile(r"^[\w.]*(Error|Exception|Exit)\b")


class PeerError(IngotError):
    """Why a program has no figures: a phrase for its cell, and what the program itself said."""

    def __init__(self, phrase: str, details: str = "") -> None:
        super().__init__(f"{phrase}: {details}" if details else phrase)
        self.phrase, self.details = phrase, details


@dataclass(frozen=True)
class Format:
    """One way to store and to compute a model.

    Attributes:
        name: in the table.
        options: what the program makes it by.
        exact: numbers are the checkpoint's and all is computed in float32, so that nothing but the
            order of sums may differ from transformers.
        arithmetic: the kind of products, of ``ceilings``, that a share of the peak is of.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    exact: bool = False
    arithmetic: str = "float32"

    @property
    def folder(self) -> str:
        """Its name as a folder's."""
        return re.sub(r"[^\w.]+", "-", self.name)


@dataclass(frozen=True)
class Made:
    """What a program loads.

    Attributes:
        path: the file or folder.
        weights: the files with the weights; a run reads them.
        worker: the script of ``workers`` that measures it.
        python: by which interpreter.
        given: what the script takes beside what all do.
        environment: variables beside this process's.
    """

    path: Path
    weights: tuple[Path, ...]
    worker: str
    python: Path
    given: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(file.stat().st_size for file in self.weights)


class Program(Protocol):
    """One program that is compared.

    Attributes:
        name: in the table.
        formats: what is measured of it.
    """

    name: str
    formats: tuple[Format, ...]

    def prepare(self) -> None:
        """Install or build it where that was not done.

        Raises:
            PeerError: it cannot be had here.
        """

    def make(self, model: Model, chosen: Format) -> Made:
        """Convert a checkpoint where that was not done; after ``prepare``.

        Raises:
            PeerError: it does not take that model, or not in that format.
        """

    def versions(self) -> dict[str, str]:
        """Of what computes, by name."""


def run_logged(command: Sequence[str | Path], log: Path, **environment: str) -> None:
    """Run a process to its end, with its output in a file.

    Raises:
        PeerError: it fails; the phrase is by ``PHRASES``, the details are its last error.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as out:
        try:
            done = subprocess.run(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                check=False,
                timeout=PATIENCE,
                env={**os.environ, **environment},
            )
        except subprocess.TimeoutExpired as error:
            raise PeerError("takes too long", f"more than {PATIENCE} s; see {log}") from error
        except FileNotFoundError as error:
            raise PeerError("cannot be run", str(error)) from error
    if done.returncode:
        raise refusal(log.read_text(errors="replace"), done.returncode)


def refusal(said: str, status: int, otherwise: str = "cannot be exported") -> PeerError:
    """What a process that failed is to have in its cell.

    Args:
        said: its output.
        status: its exit status; a signal's is negative.
        otherwise: the phrase where ``PHRASES`` have none.
    """
    lines = [line.strip() for line in re.split(r"[\r\n]+", said) if line.strip()]
    errors = [line for line in lines if _ERROR.match(line)]
    details = (errors or lines or [f"exit status {status}"])[-1][:300]
    if status < 0:
        return PeerError(f"crashes (signal {-status})", details)
    for pattern, phrase in PHRASES:
        if re.search(pattern, details):
            return PeerError(phrase, details)
    return PeerError(otherwise, details)


def measured(made: Made, given: dict[str, Any]) -> dict[str, Any]:
    """Run a worker once.

    Args:
        made: what it loads.
        given: what ``workers.measure.serve`` takes.

    Raises:
        PeerError: the worker fails.
    """
    asked = json.dumps({"made": str(made.path), **given, **made.given})
    try:
        done = subprocess.run(
            [made.python, WORKERS / made.worker, asked],
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
            env={**os.environ, **made.environment, **thread_variables(given["threads"])},
        )
    except subprocess.TimeoutExpired as error:
        raise PeerError("takes too long", f"more than {PATIENCE} s") from error
    if done.returncode:
        raise refusal(done.stderr, done.returncode, "does not run")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def thread_variables(threads: int) -> dict[str, str]:
    """For libraries that no program has an option of."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TOKENIZERS_PARALLELISM")
    return {**dict.fromkeys(names[:3], str(threads)), names[3]: "false"}
