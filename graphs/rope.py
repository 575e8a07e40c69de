"""Rotary position embeddings: default, linear, dynamic, yarn and llama3 frequencies.

Sources: RoFormer (Su et al. 2021, arXiv:2104.09864); YaRN (Peng et al. 2023, arXiv:2309.00071,
sections 3.1 to 3.4, which also states linear and dynamic NTK scaling); the Llama 3.1 rule as
released. The constants and the order of float32 operations are those of transformers'
``modeling_rope_utils``, so that the frequencies are the same to the last bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ingot.graphs.config import ConfigError, ConfigReader

_SCALED = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "dynamic": ({"factor"}, set()),
    "yarn": (
        {"factor"},
        {
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        },
    ),
    "llama3": (
        {"factor", "low_freq_factor", "high_freq_factor"},
        {"original_max_position_embeddings"},
    ),
}  # type: dict[str, tuple[set[str], set[str]]]


@dataclass(frozen=True)
class RopeParameters:
    """What the frequencies are made from.

    Attributes:
        rope_type: a key of the table above.
        rope_theta: base of the frequencies.
        dim: rotated size of a head, D.
        max_position_embeddings: longest context the config names.
        values: the remaining numbers of ``rope_parameters``, by their Hugging Face names.
    """

    rope_type: str
    rope_theta: float
    dim: int
    max_position_embeddings: int
    values: dict[str, Any]

    @classmethod
    def read(cls, config: ConfigReader, dim: int, max_position_embeddings: int) -> RopeParameters:
        """From ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling``.

        Raises:
            ConfigError: an unknown rope type, or a missing, extra or malformed value.
        """
        new = config.take("rope_parameters", dict, {})
        old = config.take("rope_scaling", dict, {})
        theta = config.take("rope_theta", float, 10000.0)
        if new and old and {"rope_theta": theta, **new} != {"rope_theta": theta, **old}:
            raise ConfigError(
                "config.json: rope_scaling and rope_parameters disagree; keep one of them."
            )
        values = dict(new or old)
        theta = ConfigReader(values, config.model_type).take("rope_theta", float, theta)
        values.pop("rope_theta", None)
        if theta <= 0:
            raise ConfigError(f"config.json: rope_theta is {theta}; it must be positive.")
        legacy_type = values.pop("type", None)
        rope_type = values.pop("rope_type", None) or legacy_type or "default"
        if not isinstance(rope_type, str) or rope_type not in _SCALED:
            raise ConfigError(
                f"config.json: rope type {rope_type!r} is not implemented; supported: "
                f"{', '.join(_SCALED)}."
            )
        if values.pop("partial_rotary_factor", None) not in (None, 1, 1.0):
            raise ConfigError("config.json: partial_rotary_factor other than 1 is not implemented.")
        if rope_type == "yarn" and values.get("truncate", True) is None:
            values["truncate"] = False  # as in transformers, where only its absence means true
        values = {name: value for name, value in values.items() if value is not None}
        required, optional = _SCALED[rope_type]
        for name, value in values.items():
            if name not in required | optional:
                raise ConfigError(
                    f"config.json: {name} does not belong to rope type {rope_type!r}; it takes "
                    f"{', '.join(sorted(required | optional)) or 'nothing'}."
                )
            if name == "truncate":
                good, expected = isinstance(value, bool), "true or false"
            else:
                # Zero turns an optional number off; the others divide.
                divides = name in required or name == "original_max_position_embeddings"
                good, expected = type(value) in (int, float), "a positive number"
                good = good and 0 <= value < math.inf and not (divides and value == 0)
            if not good:
                raise ConfigError(
                    f"config.json: rope parameter {name} is {value!r}; it must be {expected}."
                )
        for name in required:
            if name not in values:
                raise ConfigError(f"config.json: rope type {rope_type!r} needs {name}.")
        if rope_type == "dynamic" and dim == 2:
            raise ConfigError("config.json: rope type 'dynamic' needs a head size above 2.")
        if dim % 2:
            raise ConfigError(f"config.json: rotary embeddings need an even head size, not {dim}.")
        return cls(rope_type, float(theta), dim, max_position_embeddings, values)

    @property
    def original_max_position_embeddings(self) -> int:
        return int(
            self.values.get("original_max_position_embeddings", self.max_position_embeddings)
        )

    @property
    def context_length(self) -> int:
        """Longest sequence the frequencies are meant for; dynamic ones stretch with the call."""
        stretch = self.values["factor"] if self.rope_type == "dynamic" else 1
        return int(self.max_position_embeddings * stretch)

    def frequencies(self) -> tuple[torch.Tensor, float]:
        """Inverse frequencies ``[D/2]`` float32 and the factor on cos and sin."""
        exponent = torch.arange(0, self.dim, 2, dtype=torch.float32, device="cpu") / self.dim
        plain = 1.0 / (self.rope_theta**exponent)
        if self.rope_type == "linear":
            return plain / self.values["factor"], 1.0
        if self.rope_type == "llama3":
            return self._llama3(plain), 1.0
        if self.rope_type == "yarn":
            return self._yarn(exponent)
        return plain, 1.0

    def _llama3(self, plain: torch.Tensor) -> torch.Tensor:
        factor = self.values["factor"]
        low, high = self.values["low_freq_factor"], self.values["high_freq_factor"]
        context = self.original_max_position_embeddings
        wavelength = 2 * math.pi / plain
        scaled = torch.where(wavelength > context / low, plain / factor, plain)
        smooth = (context / wavelength - low) / (high - low)
        blended = (1 - smooth) * scaled / factor + smooth * scaled
        between = (wavelength >= context / high) & (wavelength <= context / low)
        return torch.where(between, blended, scaled)

    def _yarn(self, exponent: torch.Tensor) -> tuple[torch.Tensor, float]:
        factor = self.values["factor"]
        context = self.original_max_position_embeddings

        def mscale(weight: float) -> float:
            return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

        attention = self.values.get("attention_factor")
        if attention is None:
            over, under = self.values.get("mscale"), self.values.get("mscale_all_dim")
            attention = mscale(over) / mscale(under) if over and under else mscale(1.0)

        def correction(rotations: float) -> float:
            ratio = context / (rotations * 2 * math.pi)
            return self.dim * math.log(ratio) / (2 * math.log(self.rope_theta))

        low = correction(self.values.get("beta_fast") or 32)
        high = correction(self.values.get("beta_slow") or 1)
        if self.values.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        if low == high:
            high += 0.001
        steps = torch.arange(self.dim // 2, dtype=torch.float32, device="cpu")
        extrapolated = 1 - torch.clamp((steps - low) / (high - low), 0, 1)
        position = self.rope_theta**exponent
        inverse = (1.0 / (factor * position)) * (1 - extrapolated) + (1.0 / position) * extrapolated
        return inverse, float(attention)


class RotaryEmbedding(nn.Module):
    """cos and sin tables of the positions asked for.

    ``dynamic`` frequencies depend on the longest position of the call: past
    ``max_position_embeddings`` the base grows with it (YaRN paper, section 3.3).
    """

    def __init__(self, parameters: RopeParameters) -> None:
        super().__init__()
        self.parameters_ = parameters
        # A plain attribute: it is a constant of the graph, not a weight of the checkpoint.
        self.inverse, self.attention_factor = parameters.frequencies()
        self._copies: dict[torch.device, torch.Tensor] = {}

    def forward(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``position_ids [B, T]`` int64 -> cos, sin ``[B, T, 1, D]`` float32."""
        if self.parameters_.rope_type == "dynamic":
            inverse = self._dynamic(position_ids)
        else:
            inverse = self._inverse_on(position_ids.device)
        angle = position_ids[:, :, None, None].to(torch.float32) * inverse
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos() * self.attention_factor, angle.sin() * self.attention_factor

    def _inverse_on(self, device: torch.device) -> torch.Tensor:
        # Kept for each device: a CUDA graph that is being captured cannot copy from the host.
        if device == self.inverse.device:
            return self.inverse
        if device not in self._copies:
            self._copies[device] = self.inverse.to(device)
        return self._copies[device]

    def _dynamic(self, position_ids: torch.Tensor) -> torch.Tensor:
        p = self.parameters_
        factor = float(p.values["factor"])
        length = (position_ids.max() + 1).clamp(min=p.max_position_embeddings).to(torch.float32)
        growth = factor * length / p.max_position_embeddings - (factor - 1)
        base = p.rope_theta * growth ** (p.dim / (p.dim - 2))
        steps = torch.arange(0, p.dim, 2, dtype=torch.float32, device=position_ids.device)
        return 1.0 / (base ** (steps / p.dim))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate heads ``[B, T, heads, D]`` by cos, sin ``[B, T, 1, D]``, halves paired (GPT-NeoX)."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + turned * sin
