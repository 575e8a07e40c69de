"""Mixtures of gated MLPs, the spellings that checkpoints have of them, and the MLP beside one.

Source: Shazeer et al. 2017, arXiv:1701.06538, section 2. Tensor names are Hugging Face's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from ingot.graphs.checkpoint import Part
from ingot.graphs.config import MOST_EXPERTS, ConfigReader
from ingot.plugins.activations import activate
from ingot.plugins.moe_dispatch import moe_dispatch


def wide_logits(logits: torch.Tensor) -> torch.Tensor:
    """A router's logits in float32 or wider, as routing takes them."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def read_experts(
    config: ConfigReader, name: str, other: str, experts: int, chosen: int, *, least: int = 1
) -> tuple[int, int]:
    """How many experts there are, and how many of them a token takes.

    Args:
        config: of the model.
        name: of the field that says how many there are.
        other: a name that it may have instead.
        experts: transformers' default.
        chosen: transformers' default of ``num_experts_per_tok``.
        least: the fewest there may be.

    Raises:
        ConfigError: numbers that do not go together.
    """
    experts = config.size(other, experts, MOST_EXPERTS, least=least)
    experts = config.size(name, experts, MOST_EXPERTS, least=least)
    config.must_be(other, experts, f"it is another name of {name}")
    # Other programs' names of the field are held against either.
    config.taken[other] = experts
    chosen = config.size("num_experts_per_tok", chosen, MOST_EXPERTS)
    if experts:
        config.at_most("num_experts_per_tok", name)
    return experts, chosen


class Experts(nn.Module):
    """The experts' weights, fused: rows of gate, then of up."""

    def __init__(self, experts: int, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden_size, inner_size))


class SparseMoeBlock(nn.Module):
    """Experts, of which each token takes K.

    Args:
        hidden_size: H.
        inner_size: I, of one expert.
        experts: E.
        experts_per_token: K.
        normalise: whether the weights of the chosen are made to sum to 1.
        activation: a value of ``layers.HIDDEN_ACT``.
        router: what checkpoints call the router.
    """

    def __init__(
        self,
        hidden_size: int,
        inner_size: int,
        experts: int,
        experts_per_token: int,
        *,
        normalise: bool,
        activation: str,
        router: str = "gate",
    ) -> None:
        super().__init__()
        self.experts_per_token, self.normalise = experts_per_token, normalise
        self.activation, self.router_name = activation, router
        self.add_module(router, nn.Linear(hidden_size, experts, bias=False))
        self.experts = Experts(experts, hidden_size, inner_size)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``[B, T, H]`` -> ``[B, T, H]`` and router logits ``[B*T, E]`` float32."""
        tokens = x.flatten(0, 1)
        logits = wide_logits(getattr(self, self.router_name)(tokens))
        y = moe_dispatch(
            tokens,
            logits,
            self.experts.gate_up_proj,
            self.experts.down_proj,
            self.experts_per_token,
            self.normalise,
            self.activation,
        )
        return y.view_as(x), logits


def router_gain(name: str, _config: dict[str, Any]) -> float:
    """``Family.preset_gain``: router logits spread over several units, so top-k has margins."""
    return 2.0 if name.endswith("gate.weight") else 1.0


def expert_parts(
    name: str,
    shape: tuple[int, ...],
    gate_up: tuple[str, str] = ("gate_proj", "up_proj"),
    down: str = "down_proj",
) -> tuple[Part, ...]:
    """The per-expert spelling of a fused expert parameter; empty for every other parameter.

    Both spellings are on the hub: ``mlp.experts.{e}.gate_proj.weight`` and so on from
    transformers 4, and the fused ``mlp.experts.gate_up_proj`` that transformers 5 can write.

    Args:
        name: of a parameter.
        shape: of it.
        gate_up: what the layers of one expert are called whose rows are fused, in their order.
        down: what its last layer is called.
    """
    owner, _, leaf = name.rpartition(".")
    if not owner.endswith("experts"):
        return ()
    if leaf == "gate_up_proj":
        half = (shape[1] // 2, shape[2])
        return tuple(
            Part(f"{owner}.{expert}.{which}.weight", half)
            for expert in range(shape[0])
            for which in gate_up
        )
    if leaf == "down_proj":
        return tuple(Part(f"{owner}.{e}.{down}.weight", shape[1:]) for e in range(shape[0]))
    return ()


# What Granite's checkpoints on the hub call them.
_ON_HUB = {
    "experts.gate_up_proj": "input_linear.weight",
    "experts.down_proj": "output_linear.weight",
    "router.weight": "router.layer.weight",
}


def granite_parts(name: str, shape: tuple[int, ...]) -> tuple[Part, ...]:
    """The hub's spelling of a parameter of a ``block_sparse_moe``; empty for every other one.

    Both spellings are those of whole stacks; transformers 5 has this architecture's names in
    memory.
    """
    for ours, theirs in _ON_HUB.items():
        if name.endswith(f".block_sparse_moe.{ours}"):
            return (Part(name.removesuffix(ours) + theirs, shape),)
    return ()


class FusedMLP(nn.Module):
    """A gated MLP that every token takes; gate and up are one matrix, gate's rows first."""

    def __init__(self, hidden_size: int, inner_size: int, activation: str) -> None:
        super().__init__()
        self.act = partial(activate, activation)
        self.input_linear = nn.Linear(hidden_size, 2 * inner_size, bias=False)
        self.output_linear = nn.Linear(inner_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., H]`` -> the same shape."""
        gate, up = self.input_linear(x).chunk(2, dim=-1)
        y: torch.Tensor = self.output_linear(self.act(gate) * up)
        return y
