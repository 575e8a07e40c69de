"""What was measured, as tables of Markdown and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.on_weights.figures import Mean, Scores
from benchmarks.on_weights.rates import Rates

OURS, THEIRS = "ingot", "llama.cpp"


@dataclass
class Row:
    """One format of one model.

    Attributes:
        program: ``OURS`` or ``THEIRS``.
        name: of the format.
        made: the ingot, or the GGUF file.
        weights: bytes of the tensors alone.
        files: bytes of what is delivered, without a tokenizer.
        scores: as it runs.
        exact: with float32 activations, so of the stored weights alone.
        kinds: of each type of tensor that is really there, how many bytes.
        rates: one of each round.
    """

    program: str
    name: str
    made: Path
    weights: int
    files: int
    scores: Scores
    exact: Scores
    kinds: Counter[str] = field(default_factory=Counter)
    rates: list[Rates] = field(default_factory=list)

    def figures(self, parameters: int) -> dict[str, Any]:
        """For JSON."""
        kl, exact = Mean.of(self.scores.kl), Mean.of(self.exact.kl)
        return {
            "program": self.program,
            "format": self.name,
            "bytes": self.weights,
            "file_bytes": self.files,
            "bits_per_weight": 8 * self.weights / parameters,
            "perplexity": self.scores.perplexity,
            "kl": kl.value,
            "kl_error": kl.error,
            "kl_exact": exact.value,
            "kl_exact_error": exact.error,
            "top1": float(self.scores.same.mean()),
            "kinds": dict(self.kinds),
            "prefill": [rates.prefill for rates in self.rates],
            "decode": [rates.decode for rates in self.rates],
        }


def formats_table(rows: Iterable[Row], parameters: int) -> Iterator[str]:
    """Every format of a model, smallest last."""
    rows = sorted(rows, key=lambda row: -row.weights)
    timed = any(row.rates for row in rows)
    heads = ["", "format", "bytes", "bits a weight", "perplexity", "KL as run", "KL of the weights"]
    heads += ["top-1", *(["prefill tokens/s", "decode tokens/s"] if timed else [])]
    yield line(heads)
    yield line(["---"] * len(heads))
    for row in rows:
        cells = [
            row.program,
            row.name,
            f"{row.weights:,}",
            f"{8 * row.weights / parameters:.2f}",
            f"{row.scores.perplexity:.3f}",
            plus_minus(Mean.of(row.scores.kl)),
            plus_minus(Mean.of(row.exact.kl)),
            f"{row.scores.same.mean():.2%}",
        ]
        if timed:
            for which in ("prefill", "decode"):
                cells.append(spread([getattr(rates, which) for rates in row.rates]))
        yield line(cells)


def equal_bytes_table(rows: Iterable[Row]) -> Iterator[str]:
    """Beside each format of llama.cpp our best of no more bytes, by KL as run.

    Ours runs in two ways, and the better one stands here: with activations rounded to int8, and
    with float32 ones (``exact``). The difference is of the same tokens, so its error is smaller
    than those of the two.
    """
    rows = list(rows)
    yield line(["llama.cpp", "bytes", "KL", "ours", "bytes", "KL", "ours less theirs"])
    yield line(["---"] * 7)
    # Of float32 there is nothing to compare.
    for theirs in (row for row in rows if row.program == THEIRS and row.name != "F32"):
        fitting = [
            (name, row.weights, scores)
            for row in rows
            if row.program == OURS and row.weights <= theirs.weights
            for name, scores in ((row.name, row.scores), (f"{row.name}, exact", row.exact))
        ]
        head = [theirs.name, f"{theirs.weights:,}", plus_minus(Mean.of(theirs.scores.kl))]
        if not fitting:
            yield line([*head, "none is as small", "", "", ""])
            continue
        name, size, scores = min(fitting, key=lambda found: float(found[2].kl.mean()))
        share = f"{size:,} ({size / theirs.weights - 1:+.1%})"
        difference = Mean.of(scores.kl - theirs.scores.kl)
        yield line([*head, name, share, plus_minus(Mean.of(scores.kl)), plus_minus(difference)])


def kinds_table(rows: Iterable[Row]) -> Iterator[str]:
    """What llama.cpp really stores: a K-quant falls back where a width is no multiple of 256."""
    yield line(["llama.cpp", "types of tensors, by their share of the bytes"])
    yield line(["---", "---"])
    for row in rows:
        if row.program == THEIRS:
            total = sum(row.kinds.values())
            shares = (f"{kind} {size / total:.1%}" for kind, size in row.kinds.most_common())
            yield line([row.name, ", ".join(shares)])


def line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def plus_minus(mean: Mean) -> str:
    return f"{mean.value:.3g} ± {mean.error:.1g}"


def spread(values: list[float]) -> str:
    """Median, and in brackets the least and the most."""
    if not values:
        return ""
    return f"{np.median(values):.0f} ({min(values):.0f}-{max(values):.0f})"
