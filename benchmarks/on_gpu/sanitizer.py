"""compute-sanitizer's memcheck and racecheck over small cases.

A tool that is missing or refuses the machine fails nothing. One that is there must first show that
it sees our kernels: the last call of a run writes past the end of its output on purpose, and
memcheck that does not report it has checked nothing.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial

from benchmarks.on_gpu import sanitized
from benchmarks.on_gpu.bench import ROOT, Bench
from benchmarks.on_gpu.runner import Found, Item, Refused, Wrong, die_with_parent
from benchmarks.on_gpu.sanitized import FINISHED, PLANTED

TOOLS = ("memcheck", "racecheck")
# Seconds a tool may take; under it a kernel runs ten to a hundred times slower.
SECONDS = 60.0

# PyTorch's own kernels, which fill and copy, are not what is checked.
OPTIONS = ("--kernel-name-exclude", "kns=at6native", "--print-limit", "20")
PLACES = ("/usr/local/cuda/bin", "/opt/cuda/bin")
OUT_OF_TIME, ENDED = "=== out of time", "=== ended with status"
# The kernel of the planted write.
PLANTED_AT = "linear_one"
FINDING = re.compile(r"^=+.*(?:Invalid __|Misaligned|Race reported|hazard detected)", re.MULTILINE)
HAZARDS = re.compile(r"RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) errors?, (\d+) warning")
REFUSALS = re.compile(
    r"Device not supported|not supported on this|Unable to|failed to initialize|Internal error"
    r"|No attachable process|Failed to connect",
    re.IGNORECASE,
)


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
    output = _run(command, _seconds(bench, tool))
    (bench.folder / f"{tool}.log").write_text(output)
    return {"text": f"{tool}: {verdict(tool, output)} ({time.monotonic() - began:.0f} s)"}


def _seconds(bench: Bench, tool: str) -> float:
    """A tool's share of what the phase has left."""
    left = bench.deadline - time.monotonic()
    return max(1.0, min(SECONDS, left / (len(TOOLS) - TOOLS.index(tool)) - 2.0))


def _run(command: list[str], seconds: float) -> str:
    """What a command prints within some time; then all that it started is ended.

    Raises:
        Refused: it does not start.
    """
    try:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            # Each tensor an allocation of its own: a write past its end is seen.
            env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            process_group=0,
            preexec_fn=die_with_parent,
        )
    except OSError as error:
        raise Refused(f"{command[0]} does not start: {error}") from error
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return f"{output}\n{OUT_OF_TIME}\n"
    return f"{output}\n{ENDED} {process.returncode}\n"


def verdict(tool: str, output: str) -> str:
    """What a tool's output means.

    Raises:
        Refused: it did not check our kernels.
        Wrong: it found something before what was planted.
    """
    before, _, after = output.partition(PLANTED)
    found = [line for line in before.splitlines() if FINDING.search(line)]
    if tool == "memcheck" and found:
        raise Wrong(f"{len(found)} findings, the first: {found[0].strip('= ')}; see {tool}.log")
    if FINISHED not in before:
        raise Refused(_why_not_finished(before))
    if tool == "memcheck":
        return _planted(after)
    counted = HAZARDS.search(output)
    if counted is None:
        raise Refused("the tool gave no summary")
    errors, warnings = int(counted[1]), int(counted[2])
    if errors:
        first = found[0].strip("= ") if found else counted[0]
        raise Wrong(f"{errors} errors to be looked at, the first: {first}; see {tool}.log")
    return "no hazard" if not warnings else f"{warnings} warnings, no error; see {tool}.log"


def _why_not_finished(output: str) -> str:
    refused = next((line for line in output.splitlines() if REFUSALS.search(line)), None)
    if refused is not None:
        return f"the tool refuses this machine: {refused.strip('= ')}"
    if OUT_OF_TIME in output:
        return "the tool did not come to the end of the cases in its time"
    lines = [line for line in output.splitlines() if line.strip() and ENDED not in line]
    return f"the cases did not end: {lines[-1].strip('= ') if lines else 'nothing was printed'}"


def _planted(after: str) -> str:
    """What memcheck made of the write past the end, which is the one kernel's."""
    if not FINDING.search(after):
        raise Refused("the tool did not see a write past the end, so it checked nothing")
    blocks = re.findall(r"(Invalid __\w+__ \w+)[^\n]*\n=+\s+at ([\w:.<>]+)", after)
    foreign = [f"{what} at {where}" for what, where in blocks if PLANTED_AT not in where]
    if foreign:
        raise Wrong(f"a finding that was not planted: {foreign[0]}; see memcheck.log")
    return "no finding; a planted write past the end was seen"
