"""Reading ``config.json`` strictly: a field that would change the result is used or refused."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeVar

from ingot.plugins.errors import IngotError

T = TypeVar("T")

# Fields transformers writes that cannot change what the forward pass computes.
NO_EFFECT = frozenset(
    {
        "_commit_hash",
        "_name_or_path",
        "architectures",
        "aux_loss_coef",
        "attention_dropout",
        "bos_token_id",
        "decoder_start_token_id",
        "dtype",
        "eos_token_id",
        "finetuning_task",
        "id2label",
        "initializer_range",
        "label2id",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "prefix",
        "problem_type",
        "return_dict",
        "router_aux_loss_coef",
        "sep_token_id",
        "task_specific_params",
        "tokenizer_class",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        # Generation defaults that transformers 4 wrote into config.json; they steer sampling only.
        "bad_words_ids",
        "begin_suppress_tokens",
        "chunk_size_feed_forward",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "length_penalty",
        "max_length",
        "min_length",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_scores",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict_in_generate",
        "suppress_tokens",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
    }
)


class ConfigError(IngotError):
    """``config.json`` asks for something this architecture's graph does not compute."""


@dataclass(frozen=True)
class Facts:
    """What the export and the validation must know of a model, beside its graph.

    Attributes:
        routers: how many each layer has.
        experts_per_token: K of every router; 0 where there is none.
        chunk_size: of a scan, whose state must be seen to carry over a boundary; 0 without one.
        context_length: longest sequence the positions are meant for; None where nothing limits it.
        num_labels: classes of a classifier.
        eos_token_ids: each of which ends a sequence.
        pad_token_id: fills up shorter rows.
    """

    routers: tuple[int, ...]
    experts_per_token: int = 0
    chunk_size: int = 0
    context_length: int | None = None
    num_labels: int = 0
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int = 0


@dataclass(frozen=True)
class ModelConfig:
    """The fields that every architecture's config has; each adds its own, by their own names."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    tie_word_embeddings: bool
    facts: Facts


class ConfigReader:
    """Takes fields out of a parsed ``config.json`` and refuses what is left over.

    Args:
        raw: the parsed JSON object.
        model_type: the architecture reading it, named in messages.

    Attributes:
        taken: by the name of each field read so far, its value or its default.
    """

    def __init__(self, raw: dict[str, Any], model_type: str) -> None:
        self.raw = raw
        self.model_type = model_type
        self.taken: dict[str, Any] = {}

    def take(self, name: str, kind: type[T], default: T) -> T:
        """A field of one type, or its default where the field is absent or null."""
        value = self.raw.get(name)
        if value is None:
            self.taken[name] = default
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ConfigError(
                f"config.json: {name} is {value!r}; {self.model_type} expects "
                f"{'an' if kind is int else 'a'} {kind.__name__}."
            )
        # Python's JSON reader takes NaN and Infinity, which JSON itself does not have.
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"config.json: {name} is {value}; it must be finite.")
        self.taken[name] = value
        return value

    def size(self, name: str, default: int) -> int:
        """A positive integer."""
        value = self.take(name, int, default)
        if value < 1:
            raise ConfigError(f"config.json: {name} is {value}; it must be at least 1.")
        return value

    def multiple(self, name: str, of: str) -> None:
        """One field taken before must be a multiple of another."""
        value, divisor = self.taken[name], self.taken[of]
        if value % divisor:
            raise ConfigError(f"config.json: {name} {value} is not a multiple of {of} {divisor}.")

    def at_most(self, name: str, most: str) -> None:
        """One field taken before must not be more than another."""
        value, limit = self.taken[name], self.taken[most]
        if value > limit:
            raise ConfigError(f"config.json: {name} {value} is more than {most} {limit}.")

    def token_ids(self, name: str) -> tuple[int, ...]:
        """Token ids: one, a list of them, or none where the field is absent or null."""
        value = self.taken[name] = self.raw.get(name)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(type(token) is int for token in ids):
            raise ConfigError(
                f"config.json: {name} is {value!r}; {self.model_type} expects a token id or a "
                "list of them."
            )
        return tuple(ids)

    def optional_float(self, name: str) -> float | None:
        """A float, or None where the field is absent or null."""
        value = self.take(name, float, float("nan"))
        return None if math.isnan(value) else value

    def choice(self, name: str, supported: dict[str, T], default: str) -> T:
        """A string field mapped through a table; a value outside it is refused with the table."""
        value = self.take(name, str, default)
        if value not in supported:
            raise ConfigError(
                f"config.json: {name} is {value!r}, which Ingot's {self.model_type} does not "
                f"implement; supported: {', '.join(supported)}."
            )
        return supported[value]

    def labels(self) -> int:
        """How many classes a classifier has: those ``id2label`` names, or ``num_labels``."""
        named = self.take("id2label", dict, {})
        if named:
            self.must_be("num_labels", len(named), f"id2label names {len(named)} classes")
        return len(named) or self.size("num_labels", 2)

    def ignore(self, *names: str) -> None:
        """Fields that change nothing of what this architecture computes, whatever they hold."""
        self.taken.update((name, self.raw.get(name)) for name in names)

    def must_be(self, name: str, expected: Any, why: str) -> None:
        """A field that is accepted with one value only (or absent)."""
        self.taken.setdefault(name, expected)
        value = self.raw.get(name)
        if value is not None and value != expected:
            raise ConfigError(
                f"config.json: {name} is {value!r}; Ingot's {self.model_type} supports only "
                f"{expected!r} because {why}."
            )

    def finish(self) -> None:
        """Refuse every field nobody took, unless it cannot change the result."""
        if self.raw.get("quantization_config"):
            method = self.raw["quantization_config"]
            if isinstance(method, dict):
                method = method.get("quant_method", "unknown")
            raise ConfigError(
                f"config.json: quantization_config (quant_method {method!r}): quantised "
                "checkpoints are not supported; export the float32, float16 or bfloat16 original."
            )
        for name, value in self.raw.items():
            # Absent, null, false and empty all mean "feature off" in Hugging Face configs.
            off = value is None or value is False or value in ({}, [])
            if name in self.taken or name in NO_EFFECT or off:
                continue
            raise ConfigError(
                f"config.json: {name} is {value!r}, a field Ingot's {self.model_type} does not "
                f"implement; fields it reads: {', '.join(sorted(self.taken))}. Remove the field if "
                "it does not change what the model computes."
            )
