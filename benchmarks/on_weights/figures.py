"""How far one next-token distribution is from another, token by token; numpy alone.

Shape letters: W windows of text, L tokens of a window, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]
# From the ids of a window to its logits.
Model = Callable[[Ids], Floats]

# Rows of logits that are widened to float64 at once: 64 of 50,000 are 26 MB.
ROWS = 64


@dataclass(frozen=True)
class Scores:
    """What a model's logits say of each token of the windows.

    Attributes:
        kl: ``[W, L]``, Kullback-Leibler divergence of the truth's distribution from the model's, in
            nats.
        same: ``[W, L]``, whether both give the same token the most.
        loss: ``[W, L - 1]``, minus the log of what the model gives the token that follows, in nats.
    """

    kl: Doubles
    same: npt.NDArray[np.bool_]
    loss: Doubles

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.loss.mean()))

    def save(self, path: Path) -> None:
        np.savez(path, kl=self.kl, same=self.same, loss=self.loss)

    @classmethod
    def read(cls, path: Path) -> Scores:
        with np.load(path) as saved:
            return cls(saved["kl"], saved["same"], saved["loss"])


@dataclass(frozen=True)
class Mean:
    """A mean over all tokens, and its standard error.

    Tokens of one window share its text, so windows and not tokens count as drawn independently.
    """

    value: float
    error: float

    @classmethod
    def of(cls, by_token: npt.NDArray[np.generic]) -> Mean:
        """Args:
        by_token: ``[W, tokens]``; the error of a single window is not known, and so NaN.
        """
        windows = by_token.mean(axis=1, dtype=np.float64)
        spread = windows.std(ddof=1) / np.sqrt(len(windows)) if len(windows) > 1 else np.nan
        return cls(float(windows.mean()), float(spread))


def score(model: Model, windows: Ids, truth: Floats) -> Scores:
    """Compare a model with the truth on every window.

    Args:
        model: gives ``[L, V]`` logits of one window.
        windows: ``[W, L]``.
        truth: ``[W, L, V]`` logits; may be mapped from a file.
    """
    kl = np.empty(windows.shape)
    same = np.empty(windows.shape, bool)
    loss = np.empty((windows.shape[0], windows.shape[1] - 1))
    for at, ids in enumerate(windows):
        logits = model(ids)
        for start in range(0, len(ids), ROWS):
            rows = slice(start, start + ROWS)
            expected, found = log_softmax(truth[at, rows]), log_softmax(logits[rows])
            kl[at, rows] = (np.exp(expected) * (expected - found)).sum(axis=1)
            same[at, rows] = truth[at, rows].argmax(axis=1) == logits[rows].argmax(axis=1)
            followed = ids[1:][rows]
            loss[at, rows] = -found[np.arange(len(followed)), followed]
    return Scores(kl, same, loss)


def log_softmax(logits: Floats) -> Doubles:
    """``[..., V]`` logs of probabilities, in float64: a KL of 1e-9 is still one."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return wide
