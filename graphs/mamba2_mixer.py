"""The Mamba2 mixer, which an architecture may have in every layer or in some.

Source: Dao and Gu 2024, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through
Structured State Space Duality", arXiv:2405.21060, sections 6 and 7 (the block, heads and groups).
A block projects its input to a gate z, to x, B and C, and to dt; x, B and C pass a short causal
convolution; the scan mixes over time; a gated norm over each group and an output projection close
it. The tensors have Hugging Face's names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ingot.graphs.config import MOST_FACTOR, MOST_FLOAT, ConfigError, ConfigReader
from ingot.graphs.config_fields import ATTENTION
from ingot.graphs.layers import HIDDEN_ACT, Mixed, Step
from ingot.graphs.state import State, recurrent_states
from ingot.plugins.causal_conv import causal_conv
from ingot.plugins.errors import shown
from ingot.plugins.mamba2_scan import mamba2_scan

# What `layer_types` may call a layer.
RECURRENCE = ("linear_attention", "mamba", "mamba2")


@dataclass(frozen=True)
class MixerSizes:
    """What a Mamba2 mixer is made from, whatever the config calls it.

    Attributes:
        hidden_size: H.
        heads: Hm.
        head_size: Pm.
        groups: G.
        state_size: Ns.
        conv_width: W.
        chunk_size: of the scan's chunked form.
        activation: of the convolution.
        bias: whether the projections have one.
        conv_bias: whether the convolution has one.
        time_step_limit: least and most of a time step.
        norm_eps: of the gated norm; None without one.
    """

    hidden_size: int
    heads: int
    head_size: int
    groups: int
    state_size: int
    conv_width: int
    chunk_size: int
    activation: str
    bias: bool
    conv_bias: bool
    time_step_limit: tuple[float, float]
    norm_eps: float | None

    @property
    def inner_size(self) -> int:
        """Hm*Pm."""
        return self.heads * self.head_size

    @property
    def channels(self) -> int:
        """C, those of x, B and C together."""
        return self.inner_size + 2 * self.groups * self.state_size


class Mamba2GatedRMSNorm(nn.Module):
    """``RMSNorm(x * silu(z)) * weight``, the statistics over each group by itself, in float32."""

    def __init__(self, size: int, groups: int, eps: float) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """``[B, T, Hm*Pm]`` each -> the same shape and x's dtype."""
        wide = torch.promote_types(x.dtype, torch.float32)
        gated = x.to(wide) * F.silu(gate.to(wide))
        gated = gated.view(*x.shape[:-1], self.groups, -1)
        # The weight spans all groups, so the norm itself gets ones.
        ones = gated.new_ones(gated.shape[-1])
        normed = F.rms_norm(gated, ones.shape, ones, self.eps).flatten(-2)
        return self.weight * normed.to(x.dtype)


class Mamba2Mixer(nn.Module):
    """One block without its norm and residual; any architecture may have it in some layers."""

    def __init__(self, sizes: MixerSizes) -> None:
        super().__init__()
        self.sizes = s = sizes
        self.in_proj = nn.Linear(s.hidden_size, s.inner_size + s.channels + s.heads, bias=s.bias)
        # Holds the checkpoint's tensors; the operator takes them from here.
        self.conv1d = nn.Conv1d(
            s.channels, s.channels, s.conv_width, groups=s.channels, bias=s.conv_bias
        )
        self.A_log = nn.Parameter(torch.empty(s.heads))
        self.D = nn.Parameter(torch.empty(s.heads))
        self.dt_bias = nn.Parameter(torch.empty(s.heads))
        if s.norm_eps is not None:
            self.norm = Mamba2GatedRMSNorm(s.inner_size, s.groups, s.norm_eps)
        self.out_proj = nn.Linear(s.inner_size, s.hidden_size, bias=s.bias)

    def states(self, index: int) -> tuple[State, ...]:
        """The states of the layer of that number."""
        s = self.sizes
        return recurrent_states(
            index, (s.channels, s.conv_width - 1), (s.heads, s.head_size, s.state_size)
        )

    def forward(self, x: torch.Tensor, step: Step, past: tuple[torch.Tensor, ...]) -> Mixed:
        """One call.

        Args:
            x: ``[B, T, H]``.
            step: of which the mixer reads ``real``.
            past: the last W-1 inputs of the convolution, ``[B, C, W-1]``, and the scan's state,
                ``[B, Hm, Pm, Ns]``, float32 or wider; both zero before the first token, as they are
                where none are given.
        """
        s = self.sizes
        wide = torch.promote_types(x.dtype, torch.float32)
        if past:
            conv, ssm = past
        else:
            conv = x.new_zeros(x.shape[0], s.channels, s.conv_width - 1)
            ssm = x.new_zeros(x.shape[0], s.heads, s.head_size, s.state_size, dtype=wide)
        gate, xbc, dt = self.in_proj(x).split((s.inner_size, s.channels, s.heads), dim=-1)
        # Padding enters the convolution as nothing at all, as what lies before a sequence does.
        # (Masking the projection's input would let its bias through.)
        taps, bias = self.conv1d.weight, self.conv1d.bias
        xbc, new_conv = causal_conv(xbc * step.real[..., None], conv, taps, bias, s.activation)
        channels = [s.inner_size, s.groups * s.state_size, s.groups * s.state_size]
        x_heads, b_groups, c_groups = torch.split(xbc, channels, dim=-1)
        tokens, group = x.shape[:2], (s.groups, s.state_size)
        y, new_ssm = mamba2_scan(
            x_heads.view(*tokens, s.heads, s.head_size),
            dt,
            -self.A_log.to(wide).exp(),
            b_groups.view(*tokens, *group),
            c_groups.view(*tokens, *group),
            self.D.to(wide),
            self.dt_bias.to(wide),
            ssm,
            step.real,
            s.chunk_size,
            *s.time_step_limit,
        )
        y = y.flatten(-2)
        y = self.norm(y, gate) if s.norm_eps is not None else y * F.silu(gate)
        return Mixed(self.out_proj(y), (new_conv, new_ssm))


def read_time_step_limit(config: ConfigReader) -> tuple[float, float]:
    """``[least, most]``; infinity may be written as JSON's extension or as transformers 5 does."""
    given = config.take("time_step_limit", list, [0.0, math.inf])
    bounds = [math.inf if n == {"__float__": "Infinity"} else n for n in given]
    numbers = [n for n in bounds if type(n) in (int, float) and (n == math.inf or n < MOST_FLOAT)]
    if len(numbers) != 2 or len(bounds) != 2 or not 0 <= numbers[0] < numbers[1]:
        raise ConfigError(
            f"config.json: time_step_limit is {shown(given)}; it must be two numbers, the first at "
            "least 0 and below the second, which may be Infinity."
        )
    return float(numbers[0]), float(numbers[1])


def read_mixer(config: ConfigReader, hidden_size: int, norm_eps: float) -> MixerSizes:
    """From the fields of a model in which not all layers are mixers, ``mamba_n_heads`` and so on.

    Args:
        config: whose ``hidden_act`` is the convolution's as well.
        hidden_size: H.
        norm_eps: of the gated norm.

    Raises:
        ConfigError: sizes that do not go together.
    """
    inner = config.size("mamba_expand", 2, MOST_FACTOR) * hidden_size
    heads = config.size("mamba_n_heads", 128, MOST_FACTOR)
    groups = config.size("mamba_n_groups", 1, MOST_FACTOR)
    size = inner // heads
    if config.raw.get("mamba_d_head") == "auto":
        config.ignore("mamba_d_head")
    else:
        size = config.size("mamba_d_head", size, MOST_FACTOR)
    if heads * size != inner:
        raise ConfigError(
            f"config.json: mamba_expand times hidden_size is {inner}, but mamba_n_heads {heads} "
            f"times mamba_d_head {size} is {heads * size}; they must be equal."
        )
    config.multiple("mamba_n_heads", of="mamba_n_groups")
    width = config.size("mamba_d_conv", 4, MOST_FACTOR)
    if width < 2:
        raise ConfigError(f"config.json: mamba_d_conv is {width}; it must be at least 2.")
    return MixerSizes(
        hidden_size=hidden_size,
        heads=heads,
        head_size=size,
        groups=groups,
        state_size=config.size("mamba_d_state", 256, MOST_FACTOR),
        conv_width=width,
        chunk_size=config.size("mamba_chunk_size", 256),
        activation=config.choice("hidden_act", HIDDEN_ACT, "silu"),
        bias=config.take("mamba_proj_bias", bool, False),
        conv_bias=config.take("mamba_conv_bias", bool, True),
        time_step_limit=read_time_step_limit(config),
        norm_eps=norm_eps,
    )


def read_attention_layers(config: ConfigReader, layers: int) -> tuple[bool, ...]:
    """Which layers are of attention, and not a mixer: none where ``layer_types`` does not say.

    Args:
        config: where it may have its older name as well, ``layers_block_type``.
        layers: how many there are.

    Raises:
        ConfigError: names of another number of layers, or an unknown one.
    """
    other = config.take("layers_block_type", list, [])
    given = config.take("layer_types", list, other)
    if other and given != other:
        raise ConfigError(
            "config.json: layer_types and layers_block_type are two names of one field, and differ."
        )
    if not given:
        return (False,) * layers
    known = (*ATTENTION, *RECURRENCE)
    if len(given) != layers or any(kind not in known for kind in given):
        raise ConfigError(
            f"config.json: layer_types is {shown(given)}; it must name each of {layers} layers, by "
            f"one of {', '.join(known)}."
        )
    return tuple(kind in ATTENTION for kind in given)


def draw(name: str, normal: torch.Tensor, generator: torch.Generator) -> torch.Tensor | None:
    """A mixer as Mamba2 is initialised with: A from -16 to -1, time steps from 0.001 to 0.1."""
    if name.endswith(".D"):
        return 1.0 + 0.1 * normal
    if not name.endswith((".A_log", ".dt_bias")):
        return None
    uniform = torch.rand(normal.shape, generator=generator, device=normal.device)
    if name.endswith(".A_log"):
        return (1.0 + 15.0 * uniform).log()
    step = 10.0 ** (-3.0 + 2.0 * uniform)
    # The inverse of softplus.
    return step + (-torch.expm1(-step)).log()
