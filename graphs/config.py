"""Reading ``config.json`` strictly: a field that would change the result is used or refused."""

from __future__ import annotations

import math
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


class ConfigReader:
    """Takes fields out of a parsed ``config.json`` and refuses what is left over.

    Args:
        raw: the parsed JSON object.
        model_type: the architecture reading it, named in messages.
    """

    def __init__(self, raw: dict[str, Any], model_type: str) -> None:
        self.raw = raw
        self.model_type = model_type
        self.taken: set[str] = set()

    def take(self, name: str, kind: type[T], default: T) -> T:
        """A field of one type, or its default where the field is absent or null."""
        self.taken.add(name)
        value = self.raw.get(name)
        if value is None:
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
        return value

    def size(self, name: str, default: int) -> int:
        """A positive integer."""
        value = self.take(name, int, default)
        if value < 1:
            raise ConfigError(f"config.json: {name} is {value}; it must be at least 1.")
        return value

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

    def must_be(self, name: str, expected: Any, why: str) -> None:
        """A field that is accepted with one value only (or absent)."""
        self.taken.add(name)
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
