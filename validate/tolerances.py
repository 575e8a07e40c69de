"""How far a target may be from eager PyTorch: data, each with its reason, the same everywhere."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tolerance:
    """Limits of one kind of tensor.

    Attributes:
        relative_rms: largest accepted RMS error over the reference's RMS.
        norm_ratio: largest accepted distance of the RMS ratio from 1.
        tie: for logits, in units of the reference's RMS: closer ones are a tie.
        reason: why these numbers.
    """

    relative_rms: float
    norm_ratio: float
    tie: float
    reason: str


TOLERANCES = {
    ("float32", "logits"): Tolerance(
        1e-4,
        1e-5,
        1e-3,
        "Reordered float32 sums of a few thousand terms through tens of layers stay near 1e-6; "
        "one wrong constant, weight or position is above 1e-3.",
    ),
    ("float32", "hidden"): Tolerance(
        1e-4, 1e-5, 1e-3, "As for logits: the same sums, one product fewer."
    ),
    ("float32", "key"): Tolerance(
        1e-4, 1e-5, 1e-3, "A projection, a norm and a rotation of a hidden state, all float32."
    ),
    ("float32", "value"): Tolerance(1e-4, 1e-5, 1e-3, "A projection of a hidden state, float32."),
    ("float32", "conv"): Tolerance(1e-4, 1e-5, 1e-3, "A projection of a hidden state, float32."),
    ("float32", "ssm"): Tolerance(
        1e-4,
        1e-5,
        1e-3,
        "A sum of decayed products; a chunked scan orders it another way than the recurrence.",
    ),
}
