"""Pieces that several architectures share. Shape letters as in ``docs/design.md``."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import islice
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn

from ingot.graphs.config import ModelConfig
from ingot.graphs.state import State
from ingot.plugins.activations import activate
from ingot.plugins.experts import route

# Hugging Face's `hidden_act` names -> the names the custom operators use.
HIDDEN_ACT = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}

# What a step holds in place of what no layer of its model reads. Its shape fails whoever uses it,
# where None for a mask would let every token see every other.
ABSENT = torch.empty(0)


class Step(NamedTuple):
    """What every layer of one call is given.

    Attributes:
        visible: ``[B, 1, T, S]`` bool, which keys each new token may see.
        real: ``[B, T]`` of the weights' dtype, 1 for tokens, 0 for padding.
        cos: ``[B, T, 1, D]`` of the weights' dtype, as is ``sin``: the rotation of each position.
    """

    visible: torch.Tensor = ABSENT
    real: torch.Tensor = ABSENT
    cos: torch.Tensor = ABSENT
    sin: torch.Tensor = ABSENT


class Mixed(NamedTuple):
    """The result of a layer, and of the part of it that mixes the tokens.

    Attributes:
        x: ``[B, T, H]``.
        present: the new states, in the order of the layer's ``states``.
        router_logits: per router of the layer ``[B*T, E]`` float32.
    """

    x: torch.Tensor
    present: tuple[torch.Tensor, ...]
    router_logits: tuple[torch.Tensor, ...] = ()


class ModelOutput(NamedTuple):
    """What every graph returns.

    Attributes:
        main: ``logits [B, T, V]``, or of the last tokens alone where so many were asked for;
            ``last_hidden_state [B, T, H]`` of a bare model, or ``logits [B, num_labels]`` of a
            classifier.
        present: the new states, in the order of the model's ``states``.
        router_logits: per router ``[B*T, E]`` float32.
        hidden_states: each ``[B, T, H]``, as transformers orders them: the embedding, every layer's
            output but the last, and the final norm's output.
    """

    main: torch.Tensor
    present: tuple[torch.Tensor, ...]
    router_logits: tuple[torch.Tensor, ...] = ()
    hidden_states: tuple[torch.Tensor, ...] = ()


class Model(nn.Module):
    """The eager graph of one task: what is exported, and what every target is compared with.

    Args:
        config: of the architecture.

    Attributes:
        main_output: ``logits`` or ``last_hidden_state``.
    """

    main_output: str
    config: ModelConfig

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def states(self) -> tuple[State, ...]:
        """The states that go from call to call, in the order of ``past``."""
        raise NotImplementedError

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
            attention_mask: int64, 1 for tokens, 0 for padding: ``[B, S]``, the past included, where
                a state grows, and otherwise ``[B, T]``.
            position_ids: ``[B, T]`` int64.
            past: the states; a call that stands alone may have none.

        Raises:
            ValueError: another number of states.
        """
        raise NotImplementedError

    @property
    def decoder(self) -> Decoder:
        """The bare model in it."""
        raise NotImplementedError

    def head(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """What is behind the bare model: its ``last_hidden_state [B, T, H]`` -> the main output.

        Args:
            x: of the bare model.
            attention_mask: as ``forward`` takes it.
        """
        raise NotImplementedError

    @property
    def head_table(self) -> str:
        """The parameter ``[V, H]`` whose rows give one logit each; empty where there is none.

        With some of its rows in its place ``head`` gives their logits alone.
        """
        return ""


class Layer(nn.Module):
    """One layer of a decoder: mixes the tokens, then the channels of each."""

    def states(self, index: int) -> tuple[State, ...]:
        """The states of this layer, as the layer of that number."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor, step: Step, past: tuple[torch.Tensor, ...]) -> Mixed:
        """``x [B, T, H]`` and the layer's states -> both as they are behind the layer."""
        raise NotImplementedError


class Decoder(Model):
    """A bare model: ``last_hidden_state [B, T, H]`` after the final norm.

    A subclass has ``layers``, each a ``Layer``, and a final ``norm``, and says how a call begins.
    """

    main_output = "last_hidden_state"
    layers: nn.ModuleList
    norm: nn.Module

    def begin(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
    ) -> tuple[torch.Tensor, Step]:
        """What enters the first layer ``[B, T, H]``, and what all layers of a call are given."""
        raise NotImplementedError

    def end(
        self, outputs: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """``last_hidden_state`` and the hidden states, as transformers orders them.

        Args:
            outputs: each ``[B, T, H]``: what entered the first layer, and every layer's output.
        """
        x = self.norm(outputs[-1])
        return x, (*outputs[:-1], x)

    @property
    def decoder(self) -> Decoder:
        """Itself."""
        return self

    def head(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Nothing: a bare model ends with ``last_hidden_state``."""
        return x

    @property
    def states(self) -> tuple[State, ...]:
        """The states of every layer in turn."""
        return tuple(state for _, own in self.by_layer() for state in own)

    def by_layer(self) -> list[tuple[Layer, tuple[State, ...]]]:
        """The layers with their states, in the order of computation."""
        layers = cast(Iterable[Layer], self.layers)
        return [(layer, layer.states(index)) for index, layer in enumerate(layers)]

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: tuple[torch.Tensor, ...],
    ) -> ModelOutput:
        """See ``Model.forward``."""
        layers = self.by_layer()
        count = sum(len(own) for _, own in layers)
        if len(past) not in (0, count):
            raise ValueError(
                f"the model has {count} states and was given {len(past)}; give all of them, or "
                "none for a call that stands alone."
            )
        x, step = self.begin(input_ids, attention_mask, position_ids)
        outputs = [x]
        present: tuple[torch.Tensor, ...] = ()
        router_logits: tuple[torch.Tensor, ...] = ()
        given = iter(past)
        for layer, own in layers:
            x, new, logits = layer(x, step, tuple(islice(given, len(own))))
            outputs.append(x)
            present += new
            router_logits += logits
        main, hidden_states = self.end(tuple(outputs))
        return ModelOutput(main, present, router_logits, hidden_states)


class CausalLM(Model):
    """A bare model with a language-model head: ``logits [B, T, V]``.

    A subclass names the class of the bare model, and where checkpoints keep it and its embedding.
    """

    main_output = "logits"
    bare: type[Decoder]
    base_model_prefix = "model"
    embeddings = "embed_tokens"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        setattr(self, self.base_model_prefix, self.bare(config))
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def decoder(self) -> Decoder:
        """The bare model."""
        result: Decoder = getattr(self, self.base_model_prefix)
        return result

    @property
    def states(self) -> tuple[State, ...]:
        """The states of the bare model."""
        return self.decoder.states

    @property
    def head_table(self) -> str:
        """See ``Model.head_table``; the embedding, where the two are tied."""
        if self.config.tie_word_embeddings:
            return f"{self.base_model_prefix}.{self.embeddings}.weight"
        return "lm_head.weight"

    def head(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """``[B, T, H]`` -> ``logits [B, T, V]``."""
        tied = self.config.tie_word_embeddings
        table = getattr(self.decoder, self.embeddings) if tied else self.lm_head
        return F.linear(x, table.weight)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: tuple[torch.Tensor, ...],
        logits_to_keep: int = 0,
    ) -> ModelOutput:
        """As the bare model's ``forward``, with logits for the new tokens.

        Args:
            input_ids: see ``Model.forward``, as for the others.
            logits_to_keep: how many of the last columns have logits, ``[B, min(K, T), V]``; 0 for
                all. States and hidden states are those of all tokens either way.

        Raises:
            ValueError: another number of states, or a negative number of columns.
        """
        if logits_to_keep < 0:
            raise ValueError(f"logits_to_keep is {logits_to_keep}; it must be 0 (all) or more.")
        out: ModelOutput = self.decoder(input_ids, attention_mask, position_ids, past)
        # Before the product, whose result is the largest tensor of a call.
        kept = out.main[:, -logits_to_keep:] if logits_to_keep else out.main
        return out._replace(main=self.head(kept, attention_mask))


class SequenceClassifier(Model):
    """A bare model and a classifier of the last token: ``logits [B, num_labels]``.

    It has no state: each call holds whole sequences, padded on either side. A subclass names the
    class of the bare model.
    """

    main_output = "logits"
    bare: type[Decoder]

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.model = self.bare(config)
        self.score = nn.Linear(config.hidden_size, config.facts.num_labels, bias=False)

    @property
    def states(self) -> tuple[State, ...]:
        """None."""
        return ()

    @property
    def decoder(self) -> Decoder:
        """The bare model."""
        return self.model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: tuple[torch.Tensor, ...],
    ) -> ModelOutput:
        """As the bare model's ``forward``, with the logits of each row's last unmasked token."""
        out: ModelOutput = self.model(input_ids, attention_mask, position_ids, past)
        return out._replace(main=self.head(out.main, attention_mask), present=())

    def head(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """``[B, T, H]`` -> ``logits [B, num_labels]`` of each row's last unmasked token."""
        place = torch.arange(x.shape[1], device=x.device)
        last = (place * attention_mask).argmax(-1)
        index = last[:, None, None].expand(-1, 1, self.config.hidden_size)
        logits: torch.Tensor = self.score(x.gather(1, index).squeeze(1))
        return logits


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019, arXiv:1910.07467), statistics in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., size]`` -> the same shape and dtype."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class GatedMLP(nn.Module):
    """``down_proj(act(gate_proj(x)) * up_proj(x))`` (Shazeer 2020, arXiv:2002.05202).

    Args:
        hidden_size: H.
        inner_size: of the gate and of what it multiplies.
        activation: a value of ``HIDDEN_ACT``.
        bias: whether the projections have one.
    """

    def __init__(
        self, hidden_size: int, inner_size: int, activation: str, *, bias: bool = False
    ) -> None:
        super().__init__()
        self.act = partial(activate, activation)
        self.gate_proj = nn.Linear(hidden_size, inner_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, inner_size, bias=bias)
        self.down_proj = nn.Linear(inner_size, hidden_size, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., H]`` -> the same shape."""
        y: torch.Tensor = self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
        return y


def load_balancing_loss(
    router_logits: tuple[torch.Tensor, ...], top_k: int, attention_mask: torch.Tensor
) -> torch.Tensor:
    """How unevenly the routers load their experts; 1 times K where all are loaded alike.

    ``E * sum_e f_e * p_e``, with f_e the share of tokens that chose expert e and p_e its mean
    probability, over all routers together (Fedus et al. 2021, arXiv:2101.03961, equations 4 to 6).

    Args:
        router_logits: each ``[B*T, E]``.
        top_k: K, experts per token.
        attention_mask: ``[B, T]``; padding does not count.

    Returns:
        A scalar.
    """
    real = attention_mask.reshape(-1) != 0
    logits = torch.cat([router[real] for router in router_logits])
    experts = logits.shape[-1]
    ids, _ = route(logits, top_k, normalize=False)
    share = F.one_hot(ids, experts).sum(1).to(logits.dtype).mean(0)
    return experts * (share * logits.softmax(-1).mean(0)).sum()
