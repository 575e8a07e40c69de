"""Divergences of two sides' next-token distributions, and what one of them knows, call by call."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ingot.validate.distribution import Distribution
from ingot.validate.judge.distribution import Doubles, log_softmax
from ingot.validate.judge.metrics import Array
from ingot.validate.quantisation import Divergence


@dataclass
class Divergences:
    """What logits add up to that are seen a call at a time and not kept.

    Attributes:
        kl: of each token.
        agreeing: tokens whose likeliest next one is the same.
        entropies: of the truth's distributions, the sum.
        probabilities: of them ``[V]``, the sum.
    """

    kl: list[float] = field(default_factory=list)
    agreeing: int = 0
    entropies: float = 0.0
    probabilities: npt.NDArray[np.float64] | None = None

    def add(self, truth: Array, found: Array) -> None:
        """The logits ``[n, V]`` of some tokens on both sides; NaN and infinity make a NaN."""
        for expected, other in zip(truth, found, strict=True):
            log_p, log_q = log_softmax(expected), log_softmax(other)
            p = np.exp(log_p)
            with np.errstate(invalid="ignore"):
                # In the limit a token of probability 0 adds nothing.
                some = np.where(p == 0, 0.0, p * log_p)
                terms = np.where(p == 0, 0.0, p * (log_p - log_q))
            self.kl.append(float(np.maximum(terms.sum(), 0.0)))
            self.agreeing += int(expected.argmax() == other.argmax())
            self.entropies -= float(some.sum())
            if self.probabilities is None:
                self.probabilities = np.zeros_like(p)
            self.probabilities += p

    @property
    def result(self) -> Divergence | None:
        """What they add up to; None where no token was seen."""
        count = len(self.kl)
        if not count or self.probabilities is None:
            return None
        ascending = tuple(np.sort(np.array(self.kl)).tolist())
        found = Distribution(count, ascending, self.agreeing / count, 0)
        return Divergence(found, information(self.probabilities / count, self.entropies / count))


def information(mean: Doubles, entropy: float) -> float:
    """The mean divergence of distributions from their own mean, in nats; never below zero.

    That is the mutual information of the tokens before and the next one, as the model has it.

    Args:
        mean: of the distributions, ``[V]``.
        entropy: of each, in the mean.
    """
    logarithms = np.log(mean, out=np.zeros_like(mean), where=mean > 0)
    return max(0.0, float(-(mean * logarithms).sum()) - entropy)
