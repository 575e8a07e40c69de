"""Plants every fault and exports everything unusual; fails where one is not judged as it should be.

``PYTHONPATH=tests python -m proof``; ``make proof`` is the whole.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from proof.bases import BASES
from proof.fault import Fault, Outcome
from proof.faults import FAULTS
from proof.rights import RIGHTS
from proof.running import RIGHT, Group, run_all


def groups_of(faults: Sequence[Fault], rights: Sequence[str]) -> list[Group]:
    """By base, in the order of families, so that one trace does for its neighbours."""
    named = {**BASES, **RIGHTS}
    wanted = dict.fromkeys([*(fault.base for fault in faults), *rights])
    found = [
        (named[name], [fault for fault in faults if fault.base == name], name in rights)
        for name in wanted
    ]
    return sorted(found, key=lambda group: group[0].family)


def chosen(
    seed: int, share: float, only: str, faults: Sequence[Fault], rights: Sequence[str]
) -> tuple[list[Fault], list[str]]:
    """A seeded part of both; of each kind of fault at least one."""
    rng = random.Random(seed)
    some = [fault for fault in faults if only in fault.title]
    right = [name for name in rights if only in name]
    if share < 1:
        first = {fault.kind: fault for fault in rng.sample(some, len(some))}
        kept = {fault.title for fault in some if rng.random() < share}
        kept |= {fault.title for fault in first.values()}
        some = [fault for fault in some if fault.title in kept]
        right = [name for name in right if rng.random() < share]
    return some, right


def table(outcomes: Sequence[Outcome]) -> str:
    """By kind: how many there were, what saw them and how many were missed."""
    lines = [
        f"{'kind':32}{'tried':>6}{'numbers':>9}{'checks':>8}{'alone':>7}{'passed':>8}{'missed':>8}"
    ]
    for kind in dict.fromkeys(outcome.kind for outcome in outcomes):
        some = [outcome for outcome in outcomes if outcome.kind == kind]
        counts: Counter[str] = Counter()
        for outcome in some:
            numbers = "numbers" in outcome.by
            checks = bool(set(outcome.by) - {"numbers"})
            counts.update(
                numbers=numbers,
                checks=checks,
                alone=checks and not numbers,
                passed=outcome.verdict.startswith("passed"),
                missed=bool(outcome.missed),
            )
        cells = [counts[name] for name in ("numbers", "checks", "alone", "passed", "missed")]
        widths = (9, 8, 7, 8, 8)
        row = "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        lines.append(f"{kind:32}{len(some):>6}{row}")
    return "\n".join(lines)


def main() -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m proof", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the share")
    parser.add_argument("--share", type=float, default=1.0, help="of all, at random")
    parser.add_argument("--only", default="", help="what the title of a fault or export holds")
    parser.add_argument("--faults", action="store_true", help="no right exports")
    parser.add_argument("--rights", action="store_true", help="no faults")
    parser.add_argument("--list", action="store_true", help="the titles, and nothing is run")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, default=Path("build/proof.json"))
    asked = parser.parse_args()
    faults, rights = chosen(
        asked.seed,
        asked.share,
        asked.only,
        [] if asked.rights else FAULTS,
        [] if asked.faults else list(RIGHTS),
    )
    if asked.list:
        for fault in faults:
            print(f"{fault.title} [{fault.kind}; {fault.place}; {', '.join(fault.by) or 'passes'}]")
        print(*rights, sep="\n")
        return 0
    torch.set_num_threads(1)
    began = time.perf_counter()
    outcomes = run_all(groups_of(faults, rights), asked.processes)
    missed = [outcome for outcome in outcomes if outcome.missed]
    print("\n" + table(outcomes))
    below = [each for each in outcomes if each.kind != RIGHT and each.verdict == "passed"]
    for outcome in below:
        print(f"passed: {outcome}")
    for outcome in missed:
        print(f"missed: {outcome}")
    asked.json.parent.mkdir(parents=True, exist_ok=True)
    found = [dataclasses.asdict(outcome) for outcome in outcomes]
    asked.json.write_text(json.dumps(found, indent=1))
    seconds = time.perf_counter() - began
    print(
        f"{len(faults)} faults, {len(rights)} right exports, {len(missed)} missed, {seconds:.0f} s"
    )
    return 1 if missed or not outcomes else 0


if __name__ == "__main__":
    sys.exit(main())
