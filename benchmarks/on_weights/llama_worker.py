"""What llama.cpp computes of a file, and how fast, in a process of its own.

One argument: JSON with ``what``, ``source``, ``threads`` and what it takes; the last line of the
output is JSON too.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.llama.model import Model, bindings, quiet
from benchmarks.on_weights.figures import Floats, Ids, score
from benchmarks.on_weights.rates import measure


def run_score(api: Any, given: dict[str, Any]) -> None:
    windows, truth = np.load(given["windows"]), np.load(given["truth"], mmap_mode="r")
    model = Model(api, given["file"], windows.shape[1], given["threads"])
    if model.vocabulary != truth.shape[-1]:
        raise SystemExit(f"{given['file']} has {model.vocabulary} tokens, not {truth.shape[-1]}")

    def logits(ids: Ids) -> Floats:
        model.reset()
        return model.step(ids, every=True)

    score(logits, windows, truth).save(Path(given["out"]))


def run_rates(api: Any, given: dict[str, Any]) -> dict[str, float]:
    prompt, new = given["prompt"], given["new"]
    model = Model(api, given["file"], prompt + new, given["threads"])
    ids = np.random.default_rng(0).integers(0, model.vocabulary, prompt)

    def step(tokens: int) -> None:
        model.step(ids[:tokens], every=False)

    return asdict(measure(model.reset, step, prompt, new))


def main() -> None:
    given = json.loads(sys.argv[1])
    api = bindings(Path(given["source"]))
    with quiet(api):
        answer: Any = {"score": run_score, "rates": run_rates}[given["what"]](api, given)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
