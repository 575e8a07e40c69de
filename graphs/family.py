"""What an architecture file declares, and finding the file a checkpoint needs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from ingot.graphs.checkpoint import (
    Checkpoint,
    Entry,
    Part,
    WeightMap,
    check_sizes,
    check_weights,
    stack_height,
)
from ingot.graphs.config import ModelConfig
from ingot.graphs.folder import family_name, model_type_of
from ingot.graphs.layers import Model
from ingot.plugins.errors import IngotError


def one_spelling(_name: str, _shape: tuple[int, ...]) -> tuple[Part, ...]:
    """``Family.other_spelling`` of an architecture whose tensors have one spelling only."""
    return ()


def no_draw(_name: str, _normal: torch.Tensor, _generator: torch.Generator) -> torch.Tensor | None:
    """``Family.draw`` of an architecture with weights of the usual kinds only."""
    return None


def no_gain(_name: str, _config: dict[str, Any]) -> float:
    """``Family.preset_gain`` of an architecture without multipliers."""
    return 1.0


def as_read(config: ModelConfig, _stored: Mapping[str, Entry]) -> ModelConfig:
    """``Family.as_stored`` of an architecture whose config says all."""
    return config


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        model_type: Hugging Face's name, and the module's.
        read_config: parsed ``config.json`` -> the architecture's config.
        tasks: task name -> module class, each taking that config.
        other_spelling: parameter name and shape -> the parts it may be split into on disk, or ().
        as_stored: config and stored tensors -> the config, where the tensors decide a part of it.
        tied: tensors that repeat another where ``tie_word_embeddings`` is true.
        prefix: what the names of the bare model's tensors begin with in a whole model.
        head_tensors: tensors of the heads, which the bare model leaves aside.
        tokenizer_class: the tokenizer that transformers takes where a folder names none.
        presets: config fields of the seeded checkpoints ``tiny``, ``small`` and ``full``.
        extra_outputs: what its graph returns a layer beside the main output and the states.
        keep_in_fp32: how the names of parameters end that are float32 whatever the precision.
        draw: tensor name, normal numbers of its shape and their generator -> that seeded weight, or
            None for one of the usual kinds: a norm, a bias, an embedding, a linear layer.
        preset_gain: tensor name and config -> factor on that seeded weight, for an architecture
            whose multipliers would otherwise take its activations away from 1.
    """

    model_type: str
    read_config: Callable[[dict[str, Any]], ModelConfig]
    tasks: Mapping[str, type[Model]]
    other_spelling: Callable[[str, tuple[int, ...]], tuple[Part, ...]] = one_spelling
    as_stored: Callable[[ModelConfig, Mapping[str, Entry]], ModelConfig] = as_read
    prefix: str = "model."
    tied: Mapping[str, str] = field(default_factory=dict)
    head_tensors: tuple[str, ...] = ()
    tokenizer_class: str = "GPT2Tokenizer"
    presets: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    extra_outputs: tuple[str, ...] = ("hidden_states",)
    keep_in_fp32: tuple[str, ...] = ()
    draw: Callable[[str, torch.Tensor, torch.Generator], torch.Tensor | None] = no_draw
    preset_gain: Callable[[str, dict[str, Any]], float] = no_gain

    def config(self, raw_config: dict[str, Any], task: str) -> ModelConfig:
        """The config of a model of one task.

        Raises:
            IngotError: a task the family lacks, or a config it does not implement.
        """
        if task not in self.tasks:
            raise IngotError(
                f"{self.model_type} has no task {task!r}; it has: {', '.join(self.tasks)}."
            )
        return self.read_config(raw_config)

    def build(
        self,
        raw_config: dict[str, Any],
        task: str,
        dtype: torch.dtype = torch.float32,
        stored: Mapping[str, Entry] | None = None,
    ) -> Model:
        """The eager graph on the meta device: shapes and dtypes, but no weights yet.

        Args:
            raw_config: parsed ``config.json``.
            task: one of ``tasks``.
            dtype: of the parameters, but for ``keep_in_fp32``.
            stored: a checkpoint's tensors, which bound the sizes before a module is made, and may
                decide a part of the config.

        Raises:
            IngotError: a task the family lacks, a config it does not implement, or one that asks
                for more than is stored.
        """
        config = self.config(raw_config, task)
        if stored is not None:
            check_sizes(config, stored)
            config = self.as_stored(config, stored)
        with torch.device("meta"):
            model = self.tasks[task](config).eval()
        if dtype != torch.float32:
            for name, parameter in model.named_parameters():
                if not name.endswith(self.keep_in_fp32):
                    parameter.data = parameter.data.to(dtype)
        return model

    def weight_map(self, model: Model, checkpoint: Checkpoint, task: str) -> WeightMap:
        """Which tensors of the checkpoint make each parameter, checked to be all of them.

        A bare model saved on its own has names without the prefix, and a bare graph may be
        exported from a whole checkpoint; both spellings are found.

        Raises:
            CheckpointError: a missing, extra or misshapen tensor.
        """
        stored = checkpoint.entries
        on_disk = self.prefix if any(name.startswith(self.prefix) for name in stored) else ""
        whole_model = self.prefix.rstrip(".") in dict(model.named_children())
        in_graph = self.prefix if whole_model else ""

        def spelled(name: str) -> str:
            if name.startswith(in_graph) and name not in self.head_tensors:
                return on_disk + name.removeprefix(in_graph)
            return name

        # Of two tied tensors some programs keep one name, and not always the same.
        twins = {on_disk + of.removeprefix(self.prefix): name for name, of in self.tied.items()}
        tie = model.config.tie_word_embeddings
        result: dict[str, tuple[Part, ...]] = {}
        for name, parameter in model.named_parameters():
            shape = tuple(parameter.shape)
            found_as = spelled(name)
            if tie and found_as not in stored and twins.get(found_as) in stored:
                found_as = twins[found_as]
            whole = (Part(found_as, shape),)
            split = self.other_spelling(spelled(name), shape)
            found = split and any(part.name in stored for part in split)
            result[name] = split if found else whole
        heads = {head: embedding for embedding, head in twins.items()}
        unused = self.head_tensors if task == "features" else ()
        check_weights(
            checkpoint,
            result,
            tied=heads if tie else {},
            untied={} if tie else {**heads, **twins},
            unused=unused,
        )
        return result


def find_family(model_type: str) -> Family:
    """The family that computes one ``model_type``.

    Raises:
        CheckpointError: an architecture Ingot does not have.
    """
    name = family_name(model_type)
    return cast(Family, importlib.import_module(f"ingot.graphs.{name}").FAMILY)


def family_of(checkpoint: Checkpoint) -> Family:
    """The family that ``config.json`` names.

    Raises:
        CheckpointError: no ``model_type``, or one Ingot does not have.
    """
    return find_family(model_type_of(checkpoint.config))


def active_parameters(model: Model) -> tuple[int, int]:
    """Parameters of a model in all, and those one token uses (K of E experts)."""
    total = active = 0
    chosen = model.config.facts.experts_per_token
    for parameter in model.parameters():
        total += parameter.numel()
        experts = stack_height(tuple(parameter.shape))
        share = chosen / experts if experts > 1 else 1.0
        active += round(parameter.numel() * share)
    return total, active


def parameter_bytes(model: Model) -> int:
    """Bytes of a model's parameters, each in its own dtype."""
    return sum(p.numel() * p.element_size() for p in model.parameters())
