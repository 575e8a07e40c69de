"""Rotary position embeddings: default, linear, dynamic, yarn, longrope and llama3 frequencies.

Sources: RoFormer (Su et al. 2021, arXiv:2104.09864); YaRN (Peng et al. 2023, arXiv:2309.00071,
sections 3.1 to 3.4, which also states linear and dynamic NTK scaling); LongRoPE (Ding et al. 2024,
arXiv:2402.13753); the Llama 3.1 rule as released. The constants and the order of float32 operations
are those of transformers' ``modeling_rope_utils``, so that the frequencies are the same to the last
bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ingot.graphs.config import (
    LEAST_FLOAT,
    MOST_FLOAT,
    MOST_POSITIONS,
    ConfigError,
    ConfigReader,
)
from ingot.plugins.errors import shown

# By rope type the numbers that it needs, and those that it may have.
_SCALED: dict[str, tuple[set[str], set[str]]] = {
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
    "longrope": (
        {"short_factor", "long_factor"},
        {"factor", "original_max_position_embeddings", "attention_factor"},
    ),
    "llama3": (
        {"factor", "low_freq_factor", "high_freq_factor"},
        {"original_max_position_embeddings"},
    ),
}
# Which part of a head is rotated.
SHARE = "partial_rotary_factor"
# An earlier name of a type -> the type.
_OLD_TYPES = {"su": "longrope"}
# Types that are told how long the sequences of the pretraining were.
_PRETRAINED = ("yarn", "longrope", "llama3")
# One number for each frequency.
_LISTS = ("short_factor", "long_factor")


@dataclass(frozen=True)
class RopeParameters:
    """What the frequencies are made from.

    Attributes:
        rope_type: a key of the table above.
        rope_theta: base of the frequencies.
        dim: of a head, how many of its first numbers are rotated.
        max_position_embeddings: longest context the config names.
        values: the remaining numbers of ``rope_parameters``, by their Hugging Face names.
    """

    rope_type: str
    rope_theta: float
    dim: int
    max_position_embeddings: int
    values: dict[str, Any]

    @classmethod
    def read(
        cls,
        config: ConfigReader,
        head_size: int,
        max_position_embeddings: int,
        *,
        rope_theta: float = 10000.0,
        share: float = 1.0,
    ) -> RopeParameters:
        """From ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling``.

        Args:
            config: of the model.
            head_size: D.
            max_position_embeddings: longest context the config names.
            rope_theta: what it is where the config does not say.
            share: of a head, that is rotated in this architecture.

        Raises:
            ConfigError: an unknown rope type, or a missing, extra or malformed value.
        """
        new, old = _object(config, "rope_parameters"), _object(config, "rope_scaling")
        theta = config.take("rope_theta", float, rope_theta)
        if new and old and _normal(new, theta) != _normal(old, theta):
            raise ConfigError(
                "config.json: rope_scaling and rope_parameters disagree; keep one of them."
            )
        values = dict(new or old)
        theta = ConfigReader(values, config.model_type).take("rope_theta", float, theta)
        config.taken["rope_theta"] = theta
        if theta <= 0:
            raise ConfigError(f"config.json: rope_theta is {theta}; it must be positive.")
        rope_type = _rope_type(values)
        if rope_type == "yarn" and theta == 1:
            raise ConfigError("config.json: rope_theta is 1; rope type 'yarn' needs another.")
        whole = "every head is rotated as a whole"
        config.must_be(SHARE, share, whole if share == 1 else f"{share:g} of a head is rotated")
        if values.pop(SHARE, None) not in (None, share):
            raise ConfigError(f"config.json: {SHARE} other than {share:g} is not implemented.")
        dim = int(head_size * share)
        # transformers reads it here first, for the types that have it.
        outside = config.take("original_max_position_embeddings", int, 0)
        if outside:
            values["original_max_position_embeddings"] = outside
        if rope_type == "yarn" and "factor" in values and values["factor"] is None:
            original = values.get("original_max_position_embeddings") or max_position_embeddings
            _check_number("original_max_position_embeddings", original, positive=True)
            values["factor"] = max_position_embeddings / original
        for name, value in values.items():
            # transformers 5 has one such object for each kind of layer where kinds differ.
            if isinstance(value, dict):
                raise ConfigError(
                    f"config.json: rope parameters of their own for {shown(name)}; Ingot's "
                    f"{config.model_type} has the same ones in every layer."
                )
        return cls(
            rope_type,
            float(theta),
            dim,
            max_position_embeddings,
            _checked(rope_type, values, dim, max_position_embeddings),
        )

    @property
    def original_max_position_embeddings(self) -> int:
        return int(
            self.values.get("original_max_position_embeddings", self.max_position_embeddings)
        )

    @property
    def context_length(self) -> int:
        """Longest sequence the frequencies are meant for.

        A scaling by a factor takes what was pretrained that many times as far. Where the config
        says no length of the pretraining, that is ``max_position_embeddings``, as in transformers;
        some configs name the stretched length there, and then the longer of both counts.
        """
        factor = float(self.values.get("factor", 1.0))
        stretched = self.original_max_position_embeddings * factor
        return int(min(max(self.max_position_embeddings, stretched), MOST_POSITIONS))

    @property
    def switch_length(self) -> int | None:
        """Tokens beyond which a call's frequencies follow from its longest position, if they do."""
        if self.rope_type == "dynamic":
            return self.max_position_embeddings
        return self.original_max_position_embeddings if self.rope_type == "longrope" else None

    def frequencies(self) -> tuple[torch.Tensor, float]:
        """Inverse frequencies ``[D/2]`` float32 and the factor on cos and sin.

        Those of ``longrope`` are of sequences within the length of the pretraining; see ``long``.

        Raises:
            ConfigError: parameters that leave frequencies without a finite value.
        """
        exponent = torch.arange(0, self.dim, 2, dtype=torch.float32, device="cpu") / self.dim
        plain = 1.0 / (self.rope_theta**exponent)
        result, factor = plain, 1.0
        if self.rope_type == "linear":
            result = plain / self.values["factor"]
        elif self.rope_type == "llama3":
            result = self._llama3(plain)
        elif self.rope_type == "yarn":
            result, factor = self._yarn(exponent)
        elif self.rope_type == "longrope":
            result, factor = self._longrope("short_factor"), self._longrope_attention()
        if not torch.isfinite(result).all():
            raise ConfigError(
                f"config.json: rope type {self.rope_type!r} with rope_theta {self.rope_theta} and "
                f"{shown(self.values)} gives frequencies that are not finite."
            )
        return result, factor

    def long(self) -> torch.Tensor | None:
        """Inverse frequencies ``[D/2]`` of sequences past the pretraining's; ``longrope`` alone."""
        return self._longrope("long_factor") if self.rope_type == "longrope" else None

    def _longrope(self, name: str) -> torch.Tensor:
        factors = torch.tensor(self.values[name], dtype=torch.float32, device="cpu")
        exponent = torch.arange(0, self.dim, 2, dtype=torch.float32, device="cpu") / self.dim
        return 1.0 / (factors * self.rope_theta**exponent)

    def _longrope_attention(self) -> float:
        given = self.values.get("attention_factor")
        if given is not None:
            return float(given)
        original = self.original_max_position_embeddings
        factor = self.values.get("factor", self.max_position_embeddings / original)
        return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))

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


def _object(config: ConfigReader, name: str) -> dict[str, Any]:
    """One of the two objects; as in transformers, whatever is empty or false says nothing."""
    if config.raw.get(name) in ([], False):
        config.ignore(name)
        return {}
    return config.take(name, dict, {})


def _normal(values: dict[str, Any], theta: float) -> dict[str, Any]:
    """What parameters say, whichever of its two names their type has."""
    said = {"rope_theta": theta, **{k: v for k, v in values.items() if v is not None}}
    named = said.pop("type", "default")
    return {"rope_type": named, **said}


def _rope_type(values: dict[str, Any]) -> str:
    """The type, by either of its names; absent or null is ``default``."""
    given = [values[name] for name in ("rope_type", "type") if values.get(name) is not None]
    rope_type = given[0] if given else "default"
    if isinstance(rope_type, str):
        rope_type = _OLD_TYPES.get(rope_type, rope_type)
    if not isinstance(rope_type, str) or rope_type not in _SCALED:
        raise ConfigError(
            f"config.json: rope type {shown(rope_type)} is not implemented; supported: "
            f"{', '.join(_SCALED)}."
        )
    return rope_type


def _checked(
    rope_type: str, given: dict[str, Any], dim: int, max_position_embeddings: int
) -> dict[str, Any]:
    """The numbers that a type has, each in its range.

    What belongs to another type, or to a program's notes, has no effect; transformers warns of it.
    """
    required, optional = _SCALED[rope_type]
    values = {name: given[name] for name in (*required, *optional) if given.get(name) is not None}
    # As in transformers, where only its absence means true.
    if rope_type == "yarn" and "truncate" in given and given["truncate"] is None:
        values["truncate"] = False
    for name, value in values.items():
        if name == "truncate":
            if not isinstance(value, bool):
                raise ConfigError(
                    f"config.json: rope parameter truncate is {shown(value)}; it must be true or "
                    "false."
                )
        elif name in _LISTS:
            if not isinstance(value, list) or len(value) != dim // 2:
                raise ConfigError(
                    f"config.json: rope parameter {name} is {shown(value)}; it must be a list of "
                    f"{dim // 2} positive numbers, one for each frequency of a head of {dim}."
                )
            for number in value:
                _check_number(name, number, positive=True)
        else:
            # Zero turns an optional number off; the others divide.
            divides = name in required or name in ("factor", "original_max_position_embeddings")
            _check_number(name, value, positive=divides)
    # In a set's order a message would change from run to run.
    for name in sorted(required):
        if name not in values:
            raise ConfigError(f"config.json: rope type {rope_type!r} needs {name}.")
    if rope_type in _PRETRAINED:
        original = values.get("original_max_position_embeddings", max_position_embeddings)
        if original < 2:
            raise ConfigError(
                f"config.json: rope type {rope_type!r} needs an original_max_position_embeddings "
                f"of at least 2, not {shown(original)}."
            )
    if rope_type == "dynamic" and dim == 2:
        raise ConfigError("config.json: rope type 'dynamic' needs a head size above 2.")
    if dim % 2:
        raise ConfigError(f"config.json: rotary embeddings need an even head size, not {dim}.")
    return values


def _check_number(name: str, value: Any, *, positive: bool) -> None:
    good = type(value) in (int, float) and 0 <= value < MOST_FLOAT
    if not good or (value < LEAST_FLOAT and (positive or value != 0)):
        raise ConfigError(
            f"config.json: rope parameter {name} is {shown(value)}; it must be a positive number "
            "that float32 holds."
        )


class RotaryEmbedding(nn.Module):
    """cos and sin tables of the positions asked for.

    Two types depend on the longest position of the call. ``dynamic``: past
    ``max_position_embeddings`` the base grows with it (YaRN paper, section 3.3). ``longrope``: past
    ``original_max_position_embeddings`` the long factors take the place of the short ones. The keys
    that a cache holds by then stay as they were rotated, as in transformers; so a prompt that
    crosses that length in one call and one that is decoded over it do not compute the same.
    """

    def __init__(self, parameters: RopeParameters) -> None:
        super().__init__()
        self.parameters_ = parameters
        # A plain attribute: it is a constant of the graph, not a weight of the checkpoint.
        self.inverse, self.attention_factor = parameters.frequencies()
        self.long = parameters.long()
        self._copies: dict[tuple[str, torch.device], torch.Tensor] = {}

    def forward(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``position_ids [B, T]`` int64 -> cos, sin ``[B, T, 1, R]`` float32."""
        if self.parameters_.rope_type == "dynamic":
            inverse = self._dynamic(position_ids)
        else:
            inverse = self._on(position_ids.device, "short", self.inverse)
            if self.long is not None:
                long = self._on(position_ids.device, "long", self.long)
                length = position_ids.max() + 1
                within = length <= self.parameters_.original_max_position_embeddings
                inverse = torch.where(within, inverse, long)
        angle = position_ids[:, :, None, None].to(torch.float32) * inverse
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos() * self.attention_factor, angle.sin() * self.attention_factor

    def _on(self, device: torch.device, name: str, constant: torch.Tensor) -> torch.Tensor:
        # Kept for each device: a CUDA graph that is being captured cannot copy from the host.
        if device == constant.device:
            return constant
        if (name, device) not in self._copies:
            self._copies[name, device] = constant.to(device)
        return self._copies[name, device]

    def _dynamic(self, position_ids: torch.Tensor) -> torch.Tensor:
        p = self.parameters_
        factor = float(p.values["factor"])
        length = (position_ids.max() + 1).clamp(min=p.max_position_embeddings).to(torch.float32)
        growth = factor * length / p.max_position_embeddings - (factor - 1)
        base = p.rope_theta * growth ** (p.dim / (p.dim - 2))
        steps = torch.arange(0, p.dim, 2, dtype=torch.float32, device=position_ids.device)
        return 1.0 / (base ** (steps / p.dim))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate heads ``[B, T, heads, D]`` by cos, sin ``[B, T, 1, R]``, halves paired (GPT-NeoX).

    The first R of a head's numbers are rotated, and the others stay as they are.
    """
    size = cos.shape[-1]
    if size < x.shape[-1]:
        return torch.cat((rotate(x[..., :size], cos, sin), x[..., size:]), dim=-1)
    half = size // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + turned * sin
