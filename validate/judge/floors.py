"""What eager PyTorch's error usually is: a floor that no lucky call takes away."""

from __future__ import annotations

import numpy as np

from ingot.validate.truth.noise import relative_errors
from ingot.validate.truth.reference import References


def usual_floors(references: References) -> dict[str, float]:
    """The relative RMS error over all calls of a run, by tensor; of each call the largest."""
    squares: dict[str, list[float]] = {}
    calls = zip(references.truth, references.noise, strict=True)
    for truth, noise in calls:
        for name, want in truth.items():
            if want.size:
                error = float(relative_errors(noise[name], want).max())
                squares.setdefault(name, []).append(error**2)
    return {name: float(np.sqrt(np.mean(found))) for name, found in squares.items()}
