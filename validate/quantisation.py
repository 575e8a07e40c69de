"""What storing the weights in fewer bits costs, apart from what kernels make of them: plain data.

Eager PyTorch over the weights as an ingot stores them is held against eager PyTorch over the
checkpoint's own. No kernel and no graph is part of it: it is what the format takes from the model.

How much of a divergence is too much depends on the model. So two measures go with it. *Plain
rounding* is the same in the same format with the simplest scales there are, each block's largest
number; whatever chooses scales well is no further off, and a scale of another block, or a matrix
that was decoded wrongly, is. The *information* is what a model knows of the next token from those
before it: the mean divergence of its distributions from their own mean. A model that lost all of it
might as well not read the text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ingot.validate.distribution import Distribution

# The precision of a graph whose products round their activations to int8, block by block.
ROUNDED = "float32 with activations rounded"
# Deviations of a share of tokens that are chance.
CHANCE = 3.0


@dataclass(frozen=True)
class Activations:
    """Activations that the kernels of an ingot round, and what was proved in spite of it.

    Attributes:
        blocks: numbers of a row that share a scale, each number that some product has; none where
            they are rounded to floats.
        twin: whether the same graph without that rounding was held to the noise floor of float32.
        why: it was not, in one sentence without a full stop; empty where it was.
        to: what they are rounded to.
    """

    blocks: tuple[int, ...]
    twin: bool
    why: str = ""
    to: str = "int8"


@dataclass(frozen=True)
class Divergence:
    """The distributions of the stored weights against those of the checkpoint's.

    Attributes:
        found: over all tokens, the checkpoint's being the truth; with perplexities where they are
            of a text.
        information: of the checkpoint's model over the same tokens, in nats; see the module.
    """

    found: Distribution
    information: float

    @property
    def share(self) -> float:
        """Of the information, what is lost; infinite of a model that has none and lost some."""
        if not self.information:
            return math.inf if self.found.kl_mean else 0.0
        return self.found.kl_mean / self.information


@dataclass(frozen=True)
class LayerError:
    """How far a hidden state is off that has gone through layers of stored weights.

    Attributes:
        layer: that it leaves; -1 for what enters the first.
        normed: whether it has been through the final norm too.
        error: of each token the RMS of the difference over the RMS of its state, and of all tokens
            the RMS of those; a token with massive activations counts as any other.
        plain: the same with plain rounding; None where that was not computed.
    """

    layer: int
    normed: bool
    error: float
    plain: float | None = None


@dataclass(frozen=True)
class WeightError:
    """How far the stored weights of one kind in one layer are from the checkpoint's.

    Attributes:
        layer: None outside of the layers.
        kind: the name without layer and expert, such as ``mlp.experts.down_proj``.
        matrices: how many there are, one an expert.
        error: RMS of the difference over RMS of the weights, of all of them.
        worst: of one matrix, the largest.
        name: of that matrix.
        plain: as ``error``, with plain rounding; None where that was not computed.
    """

    layer: int | None
    kind: str
    matrices: int
    error: float
    worst: float
    name: str
    plain: float | None = None


@dataclass(frozen=True)
class Limits:
    """What storing the weights may cost.

    Attributes:
        share: of the information, the mean divergence; ``max_kl`` takes its place.
        times: what plain rounding costs, so many times; None where there is no such rounding.
        max_kl: the largest mean divergence that the user accepts, in nats; None by default. It is
            the only limit then.
        nats: the mean divergence that is accepted, however little the model knows.
        negligible: the median divergence that is accepted, however little plain rounding costs.
    """

    share: float
    times: float | None = None
    max_kl: float | None = None
    nats: float = 0.0
    negligible: float = 0.0


@dataclass(frozen=True)
class Quantisation:
    """What the stored weights of one ingot cost.

    Attributes:
        stored: what they are stored in, as ``weights`` of ``ingot.json`` has it.
        limits: that it is held to.
        recorded: over the tokens that a validation feeds; None of a model without logits.
        plain: the same of plain rounding; None where the format has no other way, and of a
            classifier.
        text: over the text that was given, if one was.
        layers: hidden states, in the order of the layers.
        routing: by router, the share of tokens with the experts that the checkpoint's weights
            choose.
        weights: the weights themselves, in the order of the layers.
    """

    stored: str
    limits: Limits
    recorded: Divergence | None
    plain: Divergence | None = None
    text: Divergence | None = None
    layers: tuple[LayerError, ...] = ()
    routing: tuple[float, ...] = ()
    weights: tuple[WeightError, ...] = ()

    @property
    def judged(self) -> Divergence | None:
        """What is held to the share of the information: a text tells more than random tokens."""
        return self.text or self.recorded

    @property
    def limit(self) -> float:
        """The largest mean divergence that is accepted, in nats; infinite without logits."""
        if self.limits.max_kl is not None:
            return self.limits.max_kl
        if self.judged is None:
            return math.inf
        return max(self.limits.nats, self.limits.share * self.judged.information)

    @property
    def recorded_median(self) -> float:
        """The median divergence over the tokens that a validation feeds; NaN without logits."""
        return math.nan if self.recorded is None else self.recorded.found.kl_median

    @property
    def times(self) -> float | None:
        """The median divergence over that of plain rounding; None where either is missing.

        The mean would be of the few tokens, on either side, at which a near-tied router turned.
        """
        if self.plain is None or self.recorded is None:
            return None
        return _ratio(self.recorded.found.kl_median, self.plain.found.kl_median)

    def summary(self) -> dict[str, Any]:
        """What ``ingot.json`` keeps: the figures that are judged, and their limits."""
        result: dict[str, Any] = {"stored": self.stored}
        for name, each in (("", self.recorded), ("plain_", self.plain), ("text_", self.text)):
            if each is not None:
                result[f"{name}kl_mean"] = each.found.kl_mean
                result[f"{name}top1_agreement"] = each.found.top1_agreement
        if self.judged is not None:
            result["kl_limit"] = self.limit
        if self.text is not None and self.text.found.perplexity is not None:
            result["perplexity"] = self.text.found.perplexity
            result["original_perplexity"] = self.text.found.truth_perplexity
        if self.weights:
            result["weights_error"] = max(each.worst for each in self.weights)
        return result

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong, one sentence each without a full stop."""
        return tuple(self._problems())

    def _problems(self) -> Iterator[str]:
        # The comparisons are such that NaN is a problem.
        if self.judged is not None and not self.judged.found.kl_mean <= self.limit:
            yield self._too_much(self.judged)
        if self.limits.times is None or self.limits.max_kl is not None:
            return
        few = self.recorded is not None and self.recorded_median <= self.limits.negligible
        if self.times is not None and not (few or self.times <= self.limits.times):
            yield (
                f"{self.stored} costs a median KL of {self.recorded_median:.3g} nats a token, "
                f"{self.times:.3g} times what plain rounding to {self.stored} costs, and up to "
                f"{self.limits.times:g} times are accepted{self._where()}; the scales or the "
                "numbers of some weight are wrong, or a calibration text did harm: export again "
                "without one"
            )
        elif self.recorded is not None and self.plain is not None:
            mine, other = self.recorded.found, self.plain.found
            chance = CHANCE * math.sqrt(other.top1_agreement / other.tokens)
            if not mine.top1_agreement >= other.top1_agreement / self.limits.times - chance:
                yield (
                    f"with {self.stored} {mine.top1_agreement:.1%} of the likeliest tokens are the "
                    f"checkpoint's, and with plain rounding {other.top1_agreement:.1%}; at least "
                    f"{other.top1_agreement / self.limits.times:.1%} is expected, but for chance"
                    f"{self._where()}"
                )
        elif self.layers and self.layers[-1].plain is not None:
            last = self.layers[-1]
            if not _ratio(last.error, last.plain or 0.0) <= self.limits.times:
                yield (
                    f"{self.stored} moves the last hidden state by {last.error:.3g} of its size, "
                    f"and plain rounding by {last.plain:.3g}; up to {self.limits.times:g} times "
                    f"that is accepted{self._where()}"
                )

    def _too_much(self, judged: Divergence) -> str:
        over = "over the given text" if self.text is not None else "a token"
        if self.limits.max_kl is not None:
            whose = f"the limit that was given is {self.limits.max_kl:g}"
        else:
            whose = f"the limit of {self.stored} is {self.limit:.3g}"
            if self.limit > self.limits.nats:
                share = f"{self.limits.share:.0%} of what the model knows of the next token"
                whose += f", {share}"
        return (
            f"{self.stored} costs KL {_number(judged)} nats {over}, and {whose}; store more bits, "
            "in smaller blocks or with a calibration text, or accept it with --max-kl"
        )

    def _where(self) -> str:
        """The layer from which on the hidden states are further off than plain rounding is."""
        allowed = self.limits.times or math.inf
        for each in self.layers:
            if each.plain is not None and not _ratio(each.error, each.plain) <= allowed:
                place = "what enters the first layer" if each.layer < 0 else f"layer {each.layer}"
                return (
                    f"; it begins at {place}, whose hidden state is off by {each.error:.3g}, and "
                    f"with plain rounding by {each.plain:.3g}"
                )
        return ""


def _ratio(error: float, floor: float) -> float:
    """One error over another; of two exact ones it is 1."""
    if not floor:
        return math.inf if error else 1.0
    return error / floor


def _number(found: Divergence | None) -> str:
    return "none" if found is None else f"{found.found.kl_mean:.3g}"
