"""Mamba2: a state-space decoder without attention; its state has a fixed size.

Source: Dao and Gu 2024, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through
Structured State Space Duality", arXiv:2405.21060, section 7; config and tensor names are Hugging
Face's. Every layer is a norm, a mixer (``mamba2_mixer.py``) and a residual.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ingot.graphs.checkpoint import Entry
from ingot.graphs.config import MOST_FACTOR, ConfigError, ConfigReader, Facts, ModelConfig
from ingot.graphs.family import Family
from ingot.graphs.layers import HIDDEN_ACT, CausalLM, Decoder, Layer, Mixed, RMSNorm, Step
from ingot.graphs.mamba2_mixer import (
    RECURRENCE,
    Mamba2Mixer,
    MixerSizes,
    draw,
    read_time_step_limit,
)
from ingot.graphs.state import State

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
class Mamba2Config(ModelConfig):
    """The fields of a Mamba2 ``config.json`` that shape the result, by their own names."""

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

    @property
    def mixer(self) -> MixerSizes:
        return MixerSizes(
            hidden_size=self.hidden_size,
            heads=self.num_heads,
            head_size=self.head_dim,
            groups=self.n_groups,
            state_size=self.state_size,
            conv_width=self.conv_kernel,
            chunk_size=self.chunk_size,
            activation=self.hidden_act,
            bias=self.use_bias,
            conv_bias=self.use_conv_bias,
            time_step_limit=self.time_step_limit,
            norm_eps=self.layer_norm_epsilon if self.rms_norm else None,
        )

    @classmethod
    def read(cls, raw: dict[str, Any]) -> Mamba2Config:
        """From a parsed ``config.json``; absent fields take transformers' defaults.

        Raises:
            ConfigError: a field of another type, or one that the graph does not implement.
        """
        config = ConfigReader(raw, "mamba2")
        config.ignore(*INITIALISATION)
        hidden_size = config.size("hidden_size", 4096)
        heads = config.size("num_heads", 128, MOST_FACTOR)
        head_dim = config.size("head_dim", 64, MOST_FACTOR)
        groups = config.size("n_groups", 8, MOST_FACTOR)
        expand = config.size("expand", 2, MOST_FACTOR)
        if expand * hidden_size != heads * head_dim:
            raise ConfigError(
                f"config.json: expand {expand} times hidden_size {hidden_size} is "
                f"{expand * hidden_size}, but num_heads {heads} times head_dim {head_dim} is "
                f"{heads * head_dim}; they must be equal."
            )
        config.multiple("num_heads", of="n_groups")
        config.must_be("intermediate_size", heads * head_dim, "it is expand times hidden_size")
        kernel = config.size("conv_kernel", 4, MOST_FACTOR)
        if kernel < 2:
            raise ConfigError(f"config.json: conv_kernel is {kernel}; it must be at least 2.")
        # Released checkpoints carry this field, and transformers gates before the norm either way.
        config.ignore("norm_before_gate")
        # A recurrence has no positions, so nothing limits them.
        config.ignore("max_position_embeddings", "n_positions", "n_ctx")
        layers, chunk_size = config.layers(default=64), config.size("chunk_size", 256)
        config.all_layers(layers, layer_types=RECURRENCE, layers_block_type=RECURRENCE)
        result = cls(
            vocab_size=config.size("vocab_size", 32768),
            hidden_size=hidden_size,
            num_hidden_layers=layers,
            num_heads=heads,
            head_dim=head_dim,
            state_size=config.size("state_size", 128, MOST_FACTOR),
            n_groups=groups,
            conv_kernel=kernel,
            chunk_size=chunk_size,
            hidden_act=config.choice("hidden_act", HIDDEN_ACT, "silu"),
            use_bias=config.take("use_bias", bool, False),
            use_conv_bias=config.take("use_conv_bias", bool, True),
            time_step_limit=read_time_step_limit(config),
            residual_in_fp32=config.take("residual_in_fp32", bool, True),
            rms_norm=config.take("rms_norm", bool, True),
            layer_norm_epsilon=config.epsilon("layer_norm_epsilon", 1e-5),
            tie_word_embeddings=config.take("tie_word_embeddings", bool, False),
            facts=Facts(
                routers=(0,) * layers,
                chunk_size=chunk_size,
                eos_token_ids=config.token_ids("eos_token_id"),
                pad_token_id=config.take("pad_token_id", int, 0),
            ),
        )
        config.finish()
        return result


class Mamba2Block(Layer):
    def __init__(self, config: Mamba2Config) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = Mamba2Mixer(config.mixer)

    def states(self, index: int) -> tuple[State, ...]:
        return self.mixer.states(index)

    def forward(self, x: torch.Tensor, step: Step, past: tuple[torch.Tensor, ...]) -> Mixed:
        # The residual may be wider than the weights.
        normed = self.norm(x.to(self.norm.weight.dtype))
        mixed, present, _ = self.mixer(normed, step, past)
        return Mixed(x + mixed, present)


class Mamba2Model(Decoder):
    """The bare model: ``last_hidden_state [B, T, H]`` after the final norm."""

    config: Mamba2Config

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Mamba2Block(config) for _ in range(config.num_hidden_layers))
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)

    def begin(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
    ) -> tuple[torch.Tensor, Step]:
        """See ``Decoder.begin``; the positions are not used, since a recurrence knows the order."""
        x = self.embeddings(input_ids)
        step = Step(real=attention_mask.to(x.dtype))
        if self.config.residual_in_fp32:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        return x, step

    def end(
        self, outputs: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """See ``Decoder.end``; transformers has every layer's output, and the final norm's."""
        x = self.norm_f(outputs[-1].to(self.norm_f.weight.dtype))
        return x, (*outputs[1:], x)


class Mamba2ForCausalLM(CausalLM):
    """The bare model and a language-model head: ``logits [B, T, V]``."""

    bare = Mamba2Model
    base_model_prefix = "backbone"
    embeddings = "embeddings"


def as_stored(config: ModelConfig, stored: Mapping[str, Entry]) -> ModelConfig:
    """A norm that is stored is computed, as in transformers, which reads no ``rms_norm``."""
    assert isinstance(config, Mamba2Config)
    if any(name.endswith(".mixer.norm.weight") for name in stored):
        return replace(config, rms_norm=True)
    return config


def preset_gain(name: str, config: dict[str, Any]) -> float:
    """A tied head with a small embedding does not merely repeat the last token."""
    tied = config.get("tie_word_embeddings", False)
    return 0.25 if tied and name.endswith("embeddings.weight") else 1.0


FAMILY = Family(
    model_type="mamba2",
    read_config=Mamba2Config.read,
    as_stored=as_stored,
    tasks={"generate": Mamba2ForCausalLM, "features": Mamba2Model},
    prefix="backbone.",
    keep_in_fp32=("A_log", "D", "dt_bias"),
    tied={"lm_head.weight": "backbone.embeddings.weight"},
    head_tensors=("lm_head.weight",),
    tokenizer_class="GPTNeoXTokenizer",
    draw=draw,
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
