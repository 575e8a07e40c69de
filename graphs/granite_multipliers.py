"""The four multipliers on the signal path of Granite's architectures.

Source: Granite team 2024, "Granite 3.0 Language Models", section 3; they are those of maximal
update parametrisation (Yang et al. 2022, arXiv:2203.03466, table 8). They stand in the graphs where
the paper has them; the export folds them into weights and attention scales, so they cost nothing at
run time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ingot.graphs.config import ConfigReader, ModelConfig
from ingot.graphs.layers import CausalLM

# Where nothing is multiplied, as in a config that names none.
NOT_MULTIPLIED = {
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
}


@dataclass(frozen=True)
class MultipliedConfig(ModelConfig):
    """The four, by their own names."""

    embedding_multiplier: float
    logits_scaling: float
    residual_multiplier: float
    attention_multiplier: float


def read_multipliers(config: ConfigReader) -> dict[str, float]:
    """The four, by their names.

    Raises:
        ConfigError: one of another type, or one that nothing can be computed with.
    """
    result = {name: config.take(name, float, value) for name, value in NOT_MULTIPLIED.items()}
    config.divisor("logits_scaling", 1.0)
    # To one kernel a scale of 0 is none, and another refuses all that are not above it.
    config.positive("attention_multiplier", 1.0)
    return result


class ScaledLM(CausalLM):
    """A ``CausalLM`` whose logits are divided by ``logits_scaling``."""

    config: MultipliedConfig

    def head(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """See ``CausalLM.head``."""
        return super().head(x, attention_mask) / self.config.logits_scaling
