"""Tokens a second of an ingot, in a process of its own as llama.cpp's are.

One argument: JSON with ``ingot``, ``prompt``, ``new`` and ``threads``; the last line is JSON too.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.on_weights.rates import Rates, measure
from ingot.runtime.loading import load


def rates(ingot: str, prompt: int, new: int, threads: int) -> Rates:
    """See ``LlamaCpp.rates``."""
    session = load(ingot, threads=threads, verify=False)
    ids = np.random.default_rng(0).integers(0, session.manifest.vocab_size, prompt)[None]

    def reset() -> None:
        session.reset(1, prompt + new)

    def step(tokens: int) -> None:
        session.step(ids[:, :tokens], np.ones_like(ids[:, :tokens]))

    return measure(reset, step, prompt, new)


if __name__ == "__main__":
    print(json.dumps(asdict(rates(**json.loads(sys.argv[1])))))
