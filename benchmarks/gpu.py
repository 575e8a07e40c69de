"""``python3 benchmarks/gpu.py``: everything a GPU is to prove and to measure, in one command.

Needs PyTorch with CUDA and this folder with ``plugins/lib``; neither a virtual environment, nor the
network, nor TensorRT. Phases run in order of what matters most, each in a process of its own with a
deadline, and ``results.json`` is written after each. The exit status is 0 where nothing failed.

    python3 benchmarks/gpu.py --out RESULTS                # everything, at most six minutes
    python3 benchmarks/gpu.py --only models,timings        # some phases
    python3 benchmarks/gpu.py --failed RESULTS             # again what failed or was not reached
    python3 benchmarks/gpu.py --rehearse                   # every phase, tiny, without a GPU
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

NEEDED = ("torch", "onnx", "safetensors", "click")
MISSING = [name for name in NEEDED if find_spec(name) is None]
if MISSING:
    sys.exit(
        f"error: {sys.executable} has no {', '.join(MISSING)}; run this with a Python that has "
        "PyTorch: make gpu GPU_PYTHON=/path/to/python3"
    )

import click  # noqa: E402

from benchmarks.on_gpu import (  # noqa: E402
    ceilings,
    correctness,
    load,
    models,
    rehearsal,
    sanitizer,
    timings,
    tuning,
)
from benchmarks.on_gpu.bench import Bench  # noqa: E402
from benchmarks.on_gpu.devices import Card, Host  # noqa: E402
from benchmarks.on_gpu.runner import (  # noqa: E402
    CUT,
    FAILED,
    OK,
    REFUSED,
    Found,
    Outcome,
    Phase,
    run_phase,
)
from benchmarks.on_gpu.table import closing  # noqa: E402
from ingot.plugins.library import PATH, Library  # noqa: E402
from ingot.plugins.whole import write_whole  # noqa: E402

# In order of what matters most. What a phase leaves of its time goes to those behind it; ``load``
# takes long only where it has to compile the kernels, and the last ones then have less.
PHASES = (
    Phase("load", 60, load.items, proves=True, whole=True),
    Phase("ceilings", 10, ceilings.items, whole=True),
    Phase("small", 35, correctness.small, proves=True),
    Phase("large", 70, correctness.large, proves=True),
    Phase("models", 75, models.items, proves=True),
    Phase("timings", 60, timings.items),
    Phase("sanitizer", 45, sanitizer.items),
    Phase("tuning", 45, tuning.items),
)
# What every other phase needs; these always run.
FIRST = ("load", "ceilings")
RESULTS = "results.json"


class Run:
    """One run: what was asked for, and what was found so far.

    Args:
        bench: what phases are given.
        out: folder of the results.
        wanted: names of the phases to run.
        budget: seconds.
        earlier: what an earlier run found, of which wanted phases keep what passed.
    """

    def __init__(
        self,
        bench: Bench,
        out: Path,
        wanted: Collection[str],
        budget: float,
        earlier: dict[str, Outcome] | None = None,
    ) -> None:
        self.bench, self.out, self.wanted, self.budget = bench, out, wanted, budget
        self.outcomes: dict[str, Outcome] = dict(earlier or {})
        self.entered: set[str] = set()
        self.began = self.written = time.monotonic()

    def go(self) -> None:
        """Run the phases that are wanted, writing the results after each."""
        phases = [phase for phase in PHASES if phase.name in self.wanted]
        for at, phase in enumerate(phases):
            # So much is kept for those behind it.
            later = sum(each.seconds for each in phases[at + 1 :])
            deadline = self.began + max(self.budget - later, 0.0)
            deadline = max(
                deadline, min(time.monotonic() + phase.seconds, self.began + self.budget)
            )
            if time.monotonic() >= deadline:
                break
            print(f"== {phase.name}", flush=True)
            self.entered.add(phase.name)
            outcome = self.outcomes[phase.name] = Outcome(items=self._passed_before(phase))
            self.write()
            run_phase(phase, self.bench, deadline, outcome, self._tell)
            self.write()
            if phase.name == "load" and self.outcomes["load"].status != OK:
                break

    def _passed_before(self, phase: Phase) -> dict[str, Found]:
        """Items of an earlier run that need not be run again."""
        if phase.whole or phase.name not in self.outcomes:
            return {}
        items = self.outcomes[phase.name].items
        return {name: found for name, found in items.items() if found["status"] == OK}

    def _tell(self, found: Found) -> None:
        sign = {OK: "ok", FAILED: "FAIL", REFUSED: "refused", CUT: "CUT"}[found["status"]]
        print(f"{sign:8}{found['text']}", flush=True)
        # Whoever kills this run finds what it had.
        if time.monotonic() - self.written > 1.0:
            self.write()

    @property
    def missing(self) -> list[str]:
        """Phases that were wanted and not entered, in order."""
        return [each.name for each in PHASES if each.name in {*self.wanted} - self.entered]

    @property
    def passed(self) -> bool:
        """Whether nothing failed and no proof is incomplete; of a rehearsal, nothing at all."""
        proofs = {phase.name for phase in PHASES if phase.proves or self.bench.rehearsal}
        if proofs & set(self.missing):
            return False
        for name, outcome in self.outcomes.items():
            if outcome.status == FAILED or (outcome.status == CUT and name in proofs):
                return False
            entered = any(found["status"] == OK for found in outcome.items.values())
            if self.bench.rehearsal and not entered:
                return False
        return True

    def write(self) -> None:
        """``results.json``, whole or not at all."""
        results = {
            "passed": self.passed,
            "rehearsal": self.bench.rehearsal,
            "seconds": round(time.monotonic() - self.began, 1),
            "machine": self.bench.found.get("machine", {}),
            "missing": self.missing,
            "phases": {name: asdict(outcome) for name, outcome in self.outcomes.items()},
        }
        write_whole(self.out / RESULTS, json.dumps(results, indent=1, default=str) + "\n")
        self.written = time.monotonic()

    def close(self) -> None:
        """Write what there is and print the table."""
        self.write()
        print(flush=True)
        seconds = time.monotonic() - self.began
        print(closing(self.outcomes, self.missing, seconds, self._capability), flush=True)

    @property
    def _capability(self) -> int | None:
        capability: int | None = self.bench.found.get("machine", {}).get("capability")
        return capability


def found_before(results: Path) -> dict[str, Outcome]:
    """What an earlier run found, by phase.

    Raises:
        click.ClickException: it is no run's results.
    """
    path = results / RESULTS if results.is_dir() else results
    try:
        phases: dict[str, Any] = json.loads(path.read_text())["phases"]
        return {name: Outcome(**outcome) for name, outcome in phases.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise click.ClickException(f"{path} is not a run's {RESULTS}: {error}") from error


def not_passed(earlier: dict[str, Outcome]) -> list[str]:
    """Phases that failed, were cut short, or were not entered."""
    return [
        phase.name
        for phase in PHASES
        if phase.name not in earlier or earlier[phase.name].status != OK
    ]


@contextmanager
def surroundings(rehearse: str | None, out: Path) -> Iterator[Bench]:
    """What phases are given: the card, or a rehearsal's stand-ins in a folder of their own."""
    if rehearse is None:

        def open_library(path: Path | None) -> Library:
            return Library(path or PATH)

        yield Bench(Card(), False, True, open_library, out)
        return
    with tempfile.TemporaryDirectory(prefix="ingot-rehearsal-") as name:
        folder = Path(name)
        how = rehearsal.prepare(folder, rehearse)
        print(f"rehearsal with the {how}", flush=True)
        library = rehearsal.reopen(folder)
        found = {"rehearsal": name, "sanitizer": str(folder / rehearsal.TOOL)}
        computes = how == "interpreter"
        yield Bench(Host(), True, computes, lambda _: library, out, found=found)


def _phase_names(_context: Any, _option: Any, value: str | None) -> list[str] | None:
    if value is None:
        return None
    known = [phase.name for phase in PHASES]
    asked = [name.strip() for name in value.split(",")]
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise click.BadParameter(f"no phase {', '.join(unknown)}; there are {', '.join(known)}.")
    return asked


@click.command(help=__doc__.split("\n\n", 1)[1].replace("    python3", "\b\n    python3", 1))
@click.option("--out", type=click.Path(path_type=Path), help="Folder of results.json and logs.")
@click.option("--only", callback=_phase_names, metavar="PHASE,...", help="Run these phases alone.")
@click.option(
    "--failed",
    type=click.Path(path_type=Path, exists=True),
    metavar="RESULTS",
    help="Run again what did not pass there, and add it to those results.",
)
@click.option("--budget", type=float, default=360.0, show_default=True, help="Seconds in all.")
@click.option("--rehearse", is_flag=True, help="Tiny sizes on the CPU; fails if a phase is missed.")
@click.option(
    "--kernels",
    type=click.Choice(["auto", "interpreter", "recorder"]),
    default="auto",
    show_default=True,
    help="What computes a rehearsal's kernels.",
)
def main(
    out: Path | None,
    only: list[str] | None,
    failed: Path | None,
    budget: float,
    rehearse: bool,
    kernels: str,
) -> None:
    wanted = [phase.name for phase in PHASES]
    earlier: dict[str, Outcome] = {}
    if failed is not None:
        earlier = found_before(failed)
        wanted = not_passed(earlier)
        out = out or (failed if failed.is_dir() else failed.parent)
        if not wanted:
            print("nothing failed and nothing is missing there")
            return
    if only is not None:
        wanted = [name for name in wanted if name in only]
    wanted = [phase.name for phase in PHASES if phase.name in {*FIRST, *wanted}]
    out = out or ROOT / "build" / "on_gpu" / ("rehearsal" if rehearse else "results")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.ClickException(f"--out {out}: {error.strerror}") from error
    with surroundings(kernels if rehearse else None, out) as bench:
        run = Run(bench, out, wanted, budget, earlier)
        # A run that is stopped from outside says what it has, and leaves no process behind.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _stop)
        try:
            run.go()
        except KeyboardInterrupt:
            print("stopped from outside", flush=True)
        finally:
            run.close()
        passed = run.passed
    sys.stdout.flush()
    os._exit(0 if passed else 1)


def _stop(_number: int, _frame: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
