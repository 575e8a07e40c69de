"""Work on somebody else's data, in a process of its own with limits of time and memory.

A chat template is a program, and a tokenizer may take any time and memory, or end its process. The
parent calls ``ask``; the child is a fresh interpreter that runs this very file, which imports the
worker's file and answers by its ``answer``. It starts no thread, shares nothing and inherits no
environment, so it may be asked from any process, and from several threads of one.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

# Beside processor time: a worker that waits, or a machine that is full.
WALL_SECONDS = 6
# What work needs of the user's environment: the local time and its language; threads of a library
# would count against the memory with the stacks and heaps they set aside.
_KEPT = ("LANG", "LC_ALL", "LC_TIME", "TZ")
_ALONE = {"MALLOC_ARENA_MAX": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


class ChildError(Exception):
    """A child without an answer: what it did, as the end of a sentence."""


def ask(worker: Path, request: Any, *, seconds: int, megabytes: int) -> Any:
    """What a worker answers.

    Args:
        worker: a Python file with a function ``answer(request)``; it imports nothing of Ingot.
        request: anything JSON can say, as is the answer.
        seconds: of processor time.
        megabytes: of memory.

    Raises:
        ChildError: it raised, took more than it may, or ended otherwise.
        ValueError, TypeError, RecursionError: the request is no JSON.
    """
    given = json.dumps(request).encode()
    command = [_python(), "-P", __file__, str(worker), str(seconds), str(megabytes)]
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path if entry)  # noqa: PTH100
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    try:
        done = subprocess.run(
            command,
            input=given,
            capture_output=True,
            env={**kept, **_ALONE, "PYTHONPATH": path},
            timeout=seconds + WALL_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise ChildError(f"takes more than {seconds + WALL_SECONDS} seconds") from None
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        raise ChildError(f"takes more than {seconds} seconds")
    try:
        reply = json.loads(done.stdout)
    except ValueError:
        raise ChildError(
            f"ends its process (status {done.returncode}), as where it takes more than {megabytes} "
            "MB of memory"
        ) from None
    if "error" in reply:
        raise ChildError(reply["error"])
    return reply["answer"]


def _python() -> str:
    """The interpreter; a program that embeds one, such as Triton's, is not."""
    name = Path(sys.executable or "").name
    return sys.executable if name.startswith("python") else shutil.which("python3") or "python3"


def _limit(seconds: int, megabytes: int) -> None:
    for what, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, megabytes << 20),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))


def _say(reply: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(reply))


def main(worker: str, seconds: str, megabytes: str) -> None:
    """The child: answer the request that stands on its standard input."""
    request = json.load(sys.stdin)
    spec = importlib.util.spec_from_file_location("worker", worker)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    _limit(int(seconds), int(megabytes))
    try:
        reply = {"answer": module.answer(request)}
    except MemoryError:
        reply = {"error": f"takes more than {megabytes} MB of memory"}
    # A panic of Rust is no Exception.
    except BaseException as error:
        reply = {"error": _in_one_line(error)}
    try:
        _say(reply)
    except MemoryError:
        _say({"error": f"takes more than {megabytes} MB of memory"})


def _in_one_line(error: BaseException) -> str:
    """An exception of which anything may be somebody else's text, which may hold any character."""
    try:
        said = "".join(c if c.isprintable() else " " for c in str(error)[:400])
    except Exception:
        said = ""
    said = " ".join(said.split())
    if len(said) > 200:
        return f"{said[:200]} [...]"
    return said.rstrip(".") or type(error).__name__


if __name__ == "__main__":
    main(*sys.argv[1:])
