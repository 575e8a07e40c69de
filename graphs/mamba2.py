"""Mamba2: a state-space decoder without attention; its state has a fixed size.

Source: Dao and Gu 2024, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through
Structured State Space Duality", arXiv:2405.21060, sections 6 and 7 (the block, heads and groups);
config and tensor names are Hugging Face's. A block projects its input to a gate z, to x, B and C,
and to dt; x, B and C pass a short causal convolution; the scan mixes over time; a gated norm over
each group and an output projection close it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ingot.graphs.config import ConfigError, ConfigReader
from ingot.graphs.family import Family
from ingot.graphs.layers import HIDDEN_ACT, CausalLM, ModelOutput, RMSNorm
from ingot.graphs.state import State, recurrent_states
from ingot.plugins.causal_conv import causal_conv
from ingot.plugins.mamba2_scan import mamba2_scan

# Fields that only steer how new weights are drawn.
INITIALISATION = (
    "rescale_prenorm_residual",
    "time_step_floor",
    "time_step_init_scheme",
    "time_step_max",
    "time_step_min",
    "time_step_rank",
    "time_step_scale",
)


@dataclass(frozen=True)
class Mamba2Config:
    """The fields of a Mamba2 ``config.json`` that shape the result, by their own names."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_heads: int
    head_dim: int
    state_size: int
    n_groups: int
    conv_kernel: int
    chunk_size: int
    hidden_act: str
    use_bias: bool
    use_conv_bias: bool
    time_step_limit: tuple[float, float]
    residual_in_fp32: bool
    rms_norm: bool
    layer_norm_epsilon: float
    tie_word_embeddings: bool

    @property
    def intermediate_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def conv_dim(self) -> int:
        """C, the channels of x, B and C together."""
        return self.intermediate_size + 2 * self.n_groups * self.state_size

    @classmethod
    def read(cls, raw: dict[str, Any]) -> Mamba2Config:
        """From a parsed ``config.json``; absent fields take transformers' defaults.

        Raises:
            ConfigError: a field of another type, or one that the graph does not implement.
        """
        config = ConfigReader(raw, "mamba2")
        config.taken.update(INITIALISATION)
        hidden_size = config.size("hidden_size", 4096)
        heads, head_dim = config.size("num_heads", 128), config.size("head_dim", 64)
        groups = config.size("n_groups", 8)
        expand = config.size("expand", 2)
        if expand * hidden_size != heads * head_dim:
            raise ConfigError(
                f"config.json: expand {expand} times hidden_size {hidden_size} is "
                f"{expand * hidden_size}, but num_heads {heads} times head_dim {head_dim} is "
                f"{heads * head_dim}; they must be equal."
            )
        if heads % groups:
            raise ConfigError(
                f"config.json: num_heads {heads} is not a multiple of n_groups {groups}."
            )
        config.must_be("intermediate_size", heads * head_dim, "it is expand times hidden_size")
        kernel = config.size("conv_kernel", 4)
        if kernel < 2:
            raise ConfigError(f"config.json: conv_kernel is {kernel}; it must be at least 2.")
        # Released checkpoints carry this field, and transformers gates before the norm either way.
        config.taken.add("norm_before_gate")
        result = cls(
            vocab_size=config.size("vocab_size", 32768),
            hidden_size=hidden_size,
            num_hidden_layers=config.size("num_hidden_layers", 64),
            num_heads=heads,
            head_dim=head_dim,
            state_size=config.size("state_size", 128),
            n_groups=groups,
            conv_kernel=kernel,
            chunk_size=config.size("chunk_size", 256),
            hidden_act=config.choice("hidden_act", HIDDEN_ACT, "silu"),
            use_bias=config.take("use_bias", bool, False),
            use_conv_bias=config.take("use_conv_bias", bool, True),
            time_step_limit=_time_step_limit(config),
            residual_in_fp32=config.take("residual_in_fp32", bool, True),
            rms_norm=config.take("rms_norm", bool, True),
            layer_norm_epsilon=config.take("layer_norm_epsilon", float, 1e-5),
            tie_word_embeddings=config.take("tie_word_embeddings", bool, False),
        )
        config.finish()
        return result


def _time_step_limit(config: ConfigReader) -> tuple[float, float]:
    """``[least, most]``; infinity may be written as JSON's extension or as transformers 5 does."""
    given = config.take("time_step_limit", list, [0.0, math.inf])
    bounds = [math.inf if n == {"__float__": "Infinity"} else n for n in given]
    numbers = [n for n in bounds if type(n) in (int, float)]
    if len(numbers) != 2 or len(bounds) != 2 or not 0 <= numbers[0] < numbers[1]:
        raise ConfigError(
            f"config.json: time_step_limit is {given!r}; it must be two numbers, the first at "
            "least 0 and below the second, which may be Infinity."
        )
    return float(numbers[0]), float(numbers[1])


class Mamba2GatedRMSNorm(nn.Module):
    """``RMSNorm(x * silu(z)) * weight``, the statistics over each group by itself, in float32."""

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__()
        self.groups = config.n_groups
        self.weight = nn.Parameter(torch.empty(config.intermediate_size))
        self.eps = config.layer_norm_epsilon

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
    def __init__(self, config: Mamba2Config) -> None:
        super().__init__()
        self.config = c = config
        width = c.intermediate_size + c.conv_dim + c.num_heads
        self.in_proj = nn.Linear(c.hidden_size, width, bias=c.use_bias)
        # Holds the checkpoint's tensors; the operator takes them from here.
        self.conv1d = nn.Conv1d(
            c.conv_dim, c.conv_dim, c.conv_kernel, groups=c.conv_dim, bias=c.use_conv_bias
        )
        self.A_log = nn.Parameter(torch.empty(c.num_heads))
        self.D = nn.Parameter(torch.empty(c.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(c.num_heads))
        if c.rms_norm:
            self.norm = Mamba2GatedRMSNorm(c)
        self.out_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.use_bias)

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor, conv: torch.Tensor, ssm: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One block without its norm and residual.

        Args:
            x: ``[B, T, H]``.
            mask: ``[B, T]`` of x's dtype, 1 for tokens, 0 for padding.
            conv: the last W-1 inputs of the convolution, ``[B, C, W-1]``.
            ssm: the scan's state, ``[B, Hm, Pm, Ns]``, float32 or wider.

        Returns:
            ``[B, T, H]`` and the two new states.
        """
        c = self.config
        gate, xbc, dt = self.in_proj(x).split(
            (c.intermediate_size, c.conv_dim, c.num_heads), dim=-1
        )
        # Padding enters the convolution as nothing at all, as what lies before a sequence does.
        # (Masking the projection's input would let its bias through.)
        taps, bias = self.conv1d.weight, self.conv1d.bias
        xbc, new_conv = causal_conv(xbc * mask[..., None], conv, taps, bias, c.hidden_act)
        channels = [c.intermediate_size, c.n_groups * c.state_size, c.n_groups * c.state_size]
        x_heads, b_groups, c_groups = torch.split(xbc, channels, dim=-1)
        tokens, group = x.shape[:2], (c.n_groups, c.state_size)
        wide = torch.promote_types(x.dtype, torch.float32)
        y, new_ssm = mamba2_scan(
            x_heads.view(*tokens, c.num_heads, c.head_dim),
            dt,
            -self.A_log.to(wide).exp(),
            b_groups.view(*tokens, *group),
            c_groups.view(*tokens, *group),
            self.D.to(wide),
            self.dt_bias.to(wide),
            ssm,
            mask,
            c.chunk_size,
            *c.time_step_limit,
        )
        y = y.flatten(-2)
        y = self.norm(y, gate) if c.rms_norm else y * F.silu(gate)
        return self.out_proj(y), new_conv, new_ssm


class Mamba2Block(nn.Module):
    def __init__(self, config: Mamba2Config) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = Mamba2Mixer(config)

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor, conv: torch.Tensor, ssm: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # The residual may be wider than the weights.
        normed = self.norm(x.to(self.norm.weight.dtype))
        mixed, conv, ssm = self.mixer(normed, mask, conv, ssm)
        return x + mixed, conv, ssm


class Mamba2Model(nn.Module):
    """The bare model: ``last_hidden_state [B, T, H]`` after the final norm."""

    main_output = "last_hidden_state"

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__()
        self.config = config
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Mamba2Block(config) for _ in range(config.num_hidden_layers))
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)

    @property
    def states(self) -> tuple[State, ...]:
        c = self.config
        conv = (c.conv_dim, c.conv_kernel - 1)
        ssm = (c.num_heads, c.head_dim, c.state_size)
        return tuple(
            state
            for layer in range(c.num_hidden_layers)
            for state in recurrent_states(layer, conv, ssm)
        )

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: tuple[torch.Tensor, ...],
    ) -> ModelOutput:
        """One prefill or decode call.

        Args:
            input_ids: ``[B, T]`` int64.
            attention_mask: ``[B, T]`` int64, 1 for tokens, 0 for padding on the left.
            position_ids: not used; a recurrence knows the order.
            past: ``[B, C, W-1]`` and ``[B, Hm, Pm, Ns]`` of each layer in turn.

        The hidden states are every layer's output, and the final norm's, as in transformers.
        """
        x = self.embeddings(input_ids)
        mask = attention_mask.to(x.dtype)
        if self.config.residual_in_fp32:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        present: list[torch.Tensor] = []
        hidden_states = []
        for layer, conv, ssm in zip(self.layers, past[::2], past[1::2], strict=True):
            x, *new = layer(x, mask, conv, ssm)
            present += new
            hidden_states.append(x)
        x = self.norm_f(x.to(self.norm_f.weight.dtype))
        return ModelOutput(x, tuple(present), hidden_states=(*hidden_states, x))


class Mamba2ForCausalLM(CausalLM):
    """The bare model and a language-model head: ``logits [B, T, V]``."""

    bare = Mamba2Model
    base_model_prefix = "backbone"
    embeddings = "embeddings"


def preset_gain(name: str, config: dict[str, Any]) -> float:
    """A tied head with a small embedding does not merely repeat the last token."""
    tied = config.get("tie_word_embeddings", False)
    return 0.25 if tied and name.endswith("embeddings.weight") else 1.0


FAMILY = Family(
    model_type="mamba2",
    hub_name="AntonV/mamba2-2.7b-hf",
    read_config=Mamba2Config.read,
    tasks={"generate": Mamba2ForCausalLM, "features": Mamba2Model},
    prefix="backbone.",
    keep_in_fp32=("A_log", "D", "dt_bias"),
    tied={"lm_head.weight": "backbone.embeddings.weight"},
    head_tensors=("lm_head.weight",),
    preset_gain=preset_gain,
    presets={
        "tiny": {
            "vocab_size": 512,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_heads": 8,
            "head_dim": 16,
            "state_size": 16,
            "n_groups": 2,
            "chunk_size": 8,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": None,
            "pad_token_id": 0,
        },
        "small": {
            "vocab_size": 50288,
            "hidden_size": 512,
            "num_hidden_layers": 8,
            "num_heads": 16,
            "head_dim": 64,
            "state_size": 64,
            "n_groups": 1,
            "chunk_size": 64,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": None,
            "pad_token_id": 0,
        },
        # The released Mamba2-2.7B.
        "full": {
            "vocab_size": 50288,
            "hidden_size": 2560,
            "num_hidden_layers": 64,
            "num_heads": 80,
            "head_dim": 64,
            "state_size": 128,
            "n_groups": 1,
            "chunk_size": 256,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 0,
        },
    },
)
