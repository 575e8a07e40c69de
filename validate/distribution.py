"""Next-token distributions of one side against another's: plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Distribution:
    """The next-token distributions of the target against the truth's, over all real tokens.

    Attributes:
        tokens: how many.
        kl: Kullback-Leibler divergence of each, truth from target, in nats, ascending.
        top1_agreement: share whose likeliest token is the truth's.
        near_ties: how many of the others were within rounding of a tie.
        perplexity: of the target over the text that was given; None without text.
        truth_perplexity: of the truth.
        ratio_interval: 95 % confidence interval of their ratio.
    """

    tokens: int
    kl: tuple[float, ...]
    top1_agreement: float
    near_ties: int
    perplexity: float | None = None
    truth_perplexity: float | None = None
    ratio_interval: tuple[float, float] | None = None

    @property
    def kl_mean(self) -> float:
        return sum(self.kl) / len(self.kl)

    @property
    def kl_median(self) -> float:
        return self.kl[len(self.kl) // 2]

    @property
    def kl_p99(self) -> float:
        return self.kl[min(len(self.kl) - 1, int(0.99 * len(self.kl)))]

    @property
    def kl_max(self) -> float:
        return self.kl[-1]
