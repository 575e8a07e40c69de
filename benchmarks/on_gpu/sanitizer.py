"""compute-sanitizer's memcheck and racecheck over small cases.

A tool that is missing or refuses the machine fails nothing. One that is there must first show that
it sees our kernels: the last call of a run writes past the end of its output on purpose, and
memcheck that does not report it has checked nothing.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial

from benchmarks.on_gpu import sanitized
from benchmarks.on_gpu.bench import ROOT, Bench
from benchmarks.on_gpu.runner import Found, Item, Refused, Wrong
from benchmarks.on_gpu.sanitized import FINISHED, PLANTED

TOOLS = ("memcheck", "racecheck")
# Seconds a tool may take; under it a kernel runs ten to a hundred times slower.
SECONDS = 60.0

# PyTorch's own kernels, which fill and copy, are not what is checked.
OPTIONS = ("--kernel-name-exclude", "kns=at6native", "--print-limit", "20")
PLACES = ("/usr/local/cuda/bin", "/opt/cuda/bin")
REFUSALS = re.compile(
    r"Device not supported|not supported on this|Unable to|failed to initialize|Internal error"
    r"|No attachable process|Failed to connect",
    re.IGNORECASE,
)
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)")


def items(bench: Bench) -> Iterator[Item]:
    """Each tool over the small cases in bfloat16."""
    for tool in TOOLS:
        yield Item(tool, partial(run_tool, bench, tool))


def find_tool() -> str | None:
    """The program's path, or None."""
    path = os.pathsep.join((os.environ.get("PATH", ""), *PLACES))
    return shutil.which("compute-sanitizer", path=path)


def run_tool(bench: Bench, tool: str) -> Found:
    """Run one tool and read what it says.

    Raises:
        Refused: it is missing, refuses this machine, or took too long.
        Wrong: it found something in our kernels.
    """
    program = bench.found.get("sanitizer") or find_tool()
    if program is None:
        raise Refused("compute-sanitizer is not installed here")
    command = [program, "--tool", tool, *OPTIONS, sys.executable, "-m", sanitized.__name__]
    if bench.rehearsal:
        command += ["--rehearse", str(bench.found["rehearsal"])]
    elif bench.found.get("library"):
        command += ["--library", bench.found["library"]]
    if tool == "memcheck":
        command.append("--plant")
    began = time.monotonic()
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            # Each tensor an allocation of its own: a write past its end is seen.
            env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        output = done.stdout
    except subprocess.TimeoutExpired as late:
        printed = late.stdout or b""
        output = printed.decode(errors="replace") if isinstance(printed, bytes) else printed
    except OSError as error:
        raise Refused(f"{program} does not start: {error}") from error
    (bench.folder / f"{tool}.log").write_text(output)
    return {"text": f"{tool}: {verdict(tool, output)} ({time.monotonic() - began:.0f} s)"}


def verdict(tool: str, output: str) -> str:
    """What a tool's output means.

    Raises:
        Refused: it did not check our kernels.
        Wrong: it found something before what was planted.
    """
    before, planted, after = output.partition(PLANTED)
    if tool == "racecheck":
        before = output
    found = [line for line in before.splitlines() if _is_finding(line)]
    if found:
        raise Wrong(f"{len(found)} findings, the first: {found[0].strip('= ')}; see {tool}.log")
    if REFUSALS.search(before) and FINISHED not in before:
        line = next(line for line in before.splitlines() if REFUSALS.search(line))
        raise Refused(f"the tool refuses this machine: {line.strip('= ')}")
    if FINISHED not in before:
        raise Refused("the tool did not come to the end of the cases in its time")
    if tool == "memcheck":
        if not planted or not any(_is_finding(line) for line in after.splitlines()):
            raise Refused("the tool did not see a write past the end, so it checked nothing")
        return "no finding; a planted write past the end was seen"
    counted = SUMMARY.search(output)
    if counted is None:
        raise Refused("the tool gave no summary")
    if int(counted[1]):
        raise Wrong(f"{counted[0]}; see {tool}.log")
    return "no hazard"


def _is_finding(line: str) -> bool:
    return line.startswith("=========") and bool(
        re.search(r"Invalid __|Misaligned|Race reported|Potential .* hazard|Error: Race", line)
    )
