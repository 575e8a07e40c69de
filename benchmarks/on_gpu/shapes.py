"""Sizes of released models, as the graphs' own presets have them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ingot.graphs.family import find_family
from ingot.graphs.mamba2 import Mamba2Config
from ingot.graphs.preset import preset_config


@dataclass(frozen=True)
class Moe:
    """A mixture of MLP experts: H, I, E, K, and whether the K weights are normalised."""

    model: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    normalize: bool

    @property
    def sizes(self) -> dict[str, int]:
        """By the names that the kernels' interface has."""
        names = ("hidden", "intermediate", "experts", "top_k")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Linear:
    """A mixture of linear layers: Kin, O, E, K, and whether each choice has a row of its own."""

    model: str
    in_features: int
    out_features: int
    experts: int
    top_k: int
    per_choice: bool

    @property
    def sizes(self) -> dict[str, int]:
        """By the names that the kernels' interface has."""
        names = ("in_features", "out_features", "experts", "top_k", "per_choice")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Scan:
    """A Mamba2 layer: Hm, Pm, G, Ns, and W of its convolution."""

    model: str
    heads: int
    head_size: int
    groups: int
    states: int
    width: int

    @property
    def sizes(self) -> dict[str, int]:
        """Of the scan, by the names that the kernels' interface has."""
        names = ("heads", "head_size", "groups", "states")
        return {name: getattr(self, name) for name in names}

    @property
    def channels(self) -> int:
        return self.heads * self.head_size + 2 * self.groups * self.states


def moe(preset: str) -> tuple[Moe, Moe]:
    """OLMoE-1B-7B's and JetMoE-8B's, or those of a smaller preset."""
    olmoe, jetmoe = _config("olmoe", preset), _config("jetmoe", preset)
    return (
        Moe(
            "OLMoE-1B-7B",
            olmoe["hidden_size"],
            olmoe["intermediate_size"],
            olmoe["num_experts"],
            olmoe["num_experts_per_tok"],
            normalize=False,
        ),
        Moe(
            "JetMoE-8B",
            jetmoe["hidden_size"],
            jetmoe["intermediate_size"],
            jetmoe["num_local_experts"],
            jetmoe["num_experts_per_tok"],
            normalize=True,
        ),
    )


def linear(preset: str) -> tuple[Linear, Linear]:
    """JetMoE-8B's attention: the queries of the chosen experts, and the way back."""
    config = _config("jetmoe", preset)
    hidden = config["hidden_size"]
    heads = config["num_key_value_heads"] * config["kv_channels"]
    of_experts = (config["num_local_experts"], config["num_experts_per_tok"])
    return (
        Linear("JetMoE-8B", hidden, heads, *of_experts, per_choice=False),
        Linear("JetMoE-8B", heads, hidden, *of_experts, per_choice=True),
    )


def scans(preset: str) -> tuple[Scan, Scan]:
    """Mamba2-2.7B's and Codestral's."""
    released = Mamba2Config.read(_config("mamba2", preset))
    # Codestral's config.json has the fields' defaults.
    tiny = {} if preset == "full" else _config("mamba2", preset)
    codestral = Mamba2Config.read({"model_type": "mamba2", **tiny})
    return _scan("Mamba2-2.7B", released), _scan("Codestral-7B", codestral)


def _scan(model: str, c: Mamba2Config) -> Scan:
    return Scan(model, c.num_heads, c.head_dim, c.n_groups, c.state_size, c.conv_kernel)


def _config(family: str, preset: str) -> dict[str, Any]:
    return preset_config(find_family(family), preset)
