"""How far beyond the noise floor a target may be: data, with reasons, the same everywhere."""

from __future__ import annotations

from dataclasses import dataclass

from ingot.validate.quantisation import ROUNDED

# Of kernels that round activations to int8, in errors of eager PyTorch with the same rounding.
# Right ones were measured at 1.00 to 1.15, since both round the same numbers alike, and at 1.5 in a
# call of one token in which a number went to the other of two steps; were theirs other numbers, it
# would be 1 as well. What is wrong beside that adds to it as squares do.
INT8_LIMIT = 3.0
# Unit roundoff: the least floor. Eager PyTorch may be exact where a target rounds once.
ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8, ROUNDED: 2.0**-8}


@dataclass(frozen=True)
class Limit:
    """Limits of one kind of tensor.

    Attributes:
        score: largest error accepted of a float32 graph, in floors.
        half: the same of a half-precision one. The errors there are roundings of each result, of
            which there are as many whatever the order of the sums, and so right graphs differ less:
            they were measured at up to 2 floors, over all families with ordinary weights, with
            heavy tails, with massive activations and with sharp attention.
        reason: why.
    """

    score: float
    half: float
    reason: str

    def of(self, precision: str) -> float:
        """The largest score accepted in a precision."""
        if precision == ROUNDED:
            return INT8_LIMIT
        return self.score if precision == "float32" else self.half


LIMITS = {
    "logits": Limit(8.0, 4.0, "as for hidden states; one product more averages the errors out"),
    "hidden": Limit(
        8.0,
        4.0,
        "another order of the same float32 sums, and other kernels for exp and the norm, were "
        "measured at up to 3.5 floors, massive activations and sharp attention included; a "
        "constant that is 0.1 % wrong is at hundreds",
    ),
    "router": Limit(8.0, 4.0, "a projection of a hidden state"),
    "key": Limit(8.0, 4.0, "a projection, a norm and a rotation of a hidden state"),
    "value": Limit(8.0, 4.0, "a projection of a hidden state"),
    "conv": Limit(8.0, 4.0, "a projection of a hidden state"),
    "ssm": Limit(8.0, 4.0, "a sum of decayed products, taken in another order by a chunked scan"),
}

# Of the norm ratio's distance from 1, in what independent rounding errors explain. The error of a
# whole tensor sees a wrong scale late in half precision; the ratio sees it as early as it can.
NORM_LIMIT = 8.0
# Of half-precision graphs, of which right ones were measured at up to 1.5, and where two experts
# are all but equal at 4.
HALF_NORM_LIMIT = 6.0

# Two logits closer than so many floors, in units of the logits' RMS, are a tie: an error of one
# logit may well be several times the RMS error of all.
TIE_LIMIT = 64.0

# A score. A target may be exact where eager rounds, and nothing is a factor beyond zero; and any
# score may rise by this. It is a twentieth of what the precision itself costs.
SCORE_FLOOR = 0.05

# A router may choose another expert where the truth's margin is below so many RMS errors of the
# eager graph's logits: a right target is up to 8 floors off, the margin is a difference of two
# logits, and of many tokens some are three deviations out.
FLIP_LIMIT = 32.0


@dataclass(frozen=True)
class Cost:
    """What storing the weights in one format may cost a model.

    Attributes:
        share: the mean KL divergence, as a share of what the model knows of the next token; see
            ``validate.quantisation``.
        nats: the mean KL divergence that is accepted of any model, however little it knows.
        reason: why.
    """

    share: float
    nats: float
    reason: str


# By ``weights`` of ``ingot.json``. Of random weights those of JetMoE cost most by far, and the more
# the deeper they are: its routers choose otherwise.
QUANTISATION = {
    "checkpoint": Cost(0.05, 1e-3, "nothing is lost, but where what is tied has two types"),
    "float16": Cost(0.05, 1e-3, "measured at up to 0.03, of 24 random layers"),
    "bfloat16": Cost(0.2, 1e-2, "measured at up to 0.13, of 24 random layers"),
    "int8": Cost(0.3, 1e-2, "measured at up to 0.1, of 8 random layers"),
    "int4": Cost(
        0.75,
        0.05,
        "measured at up to 0.41, of 2 random layers, of small trained ones at 0.01, and of a "
        "released model of 135 million parameters with massive activations at 0.61, over random "
        "tokens; random weights with heavy tails, whose logits are all but equal, lose half of "
        "0.003 nats",
    ),
}
# Of what plain rounding in the same format costs, in the median. Scales of least squared error cost
# 0.6 to 0.9 times as much; a layer whose scales are twice what they should be costs 2 to 30 times
# as much.
TIMES_PLAIN = 1.5
# A median of so many nats is nothing, whatever plain rounding costs: where massive activations make
# a model all but certain, both are some 1e-13.
NEGLIGIBLE = 1e-3
