"""llama.cpp's files compared with the truth and timed, in processes of their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.llama.library import LlamaCpp
from benchmarks.on_weights.figures import Ids, Scores
from benchmarks.on_weights.rates import Rates

WORKER = Path(__file__).with_name("llama_worker.py")


def score(llama: LlamaCpp, file: Path, windows: Ids, truth: Path, work: Path) -> Scores:
    """Compare what it computes with the truth; activations of the cache are float32.

    Args:
        llama: by whom.
        file: a GGUF.
        windows: ``[W, L]``.
        truth: ``.npy`` of the truth's logits.
        work: a folder to work in.
    """
    given, found = work / "windows.npy", work / "scores.npz"
    np.save(given, windows)
    paths = {"file": str(file), "windows": str(given), "truth": str(truth), "out": str(found)}
    llama.run(WORKER, what="score", threads=llama.threads, **paths)
    return Scores.read(found)


def rates(llama: LlamaCpp, file: Path, prompt: int, new: int) -> Rates:
    """Tokens a second of one prompt and of the tokens behind it."""
    asked = {"file": str(file), "prompt": prompt, "new": new}
    return Rates(**llama.run(WORKER, what="rates", threads=llama.threads, **asked))
