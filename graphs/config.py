"""Reading ``config.json`` strictly: a field that would change the result is used or refused."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from ingot.graphs.config_fields import NEUTRAL, NO_EFFECT, SYNONYMS
from ingot.plugins.errors import IngotError, named, shown

T = TypeVar("T")

# The largest sizes that are read, so far above any model that what is larger is damage or malice: a
# layer is made at a millisecond and an expert is listed by name before any weight is looked at.
MOST_LAYERS = 1 << 10
MOST_EXPERTS = 1 << 16
MOST_SIZE = 1 << 20
# Of heads, their sizes, states and groups, which are multiplied with one another.
MOST_FACTOR = 1 << 12
# Positions are counted in 32 bits by some kernels.
MOST_POSITIONS = (1 << 31) - 1
# Every number of a config is one of the graph's, in float32.
MOST_FLOAT = 3.4e38
LEAST_FLOAT = 1.2e-38
# Where a config says that weights are quantised, and the methods that are read.
QUANTISATION = "quantization_config"
READABLE = ("gptq", "awq", "compressed-tensors")


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
        switch_length: of a call whose last position is beyond so many tokens all positions are
            turned otherwise, so pieces of it do not compute what the whole does; None for most.
        num_labels: classes of a classifier.
        eos_token_ids: each of which ends a sequence.
        pad_token_id: fills up shorter rows.
    """

    routers: tuple[int, ...]
    experts_per_token: int = 0
    chunk_size: int = 0
    context_length: int | None = None
    switch_length: int | None = None
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
            # An integer may have more digits than a float has.
            value = float(value) if abs(value) < MOST_FLOAT else math.inf
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ConfigError(
                f"config.json: {name} is {shown(value)}; {self.model_type} expects "
                f"{'an' if kind is int else 'a'} {kind.__name__}."
            )
        # Python's JSON reader takes NaN and Infinity, which JSON itself does not have.
        if isinstance(value, float) and not abs(value) < MOST_FLOAT:
            given = shown(self.raw[name])
            raise ConfigError(f"config.json: {name} is {given}; it must be finite in float32.")
        self.taken[name] = value
        return value

    def size(self, name: str, default: int, most: int = MOST_SIZE, *, least: int = 1) -> int:
        """An integer of ``least`` to ``most``."""
        value = self.take(name, int, default)
        if value < least:
            raise ConfigError(
                f"config.json: {name} is {shown(value)}; it must be at least {least}."
            )
        if value > most:
            raise ConfigError(f"config.json: {name} is {shown(value)}; it must be at most {most}.")
        return value

    def layers(self, name: str = "num_hidden_layers", *, default: int) -> int:
        """How many layers a model has."""
        return self.size(name, default, MOST_LAYERS)

    def epsilon(self, name: str, default: float) -> float:
        """What a norm adds to a mean of squares; not negative."""
        value = self.take(name, float, default)
        if value < 0:
            raise ConfigError(f"config.json: {name} is {value}; it must not be negative.")
        return value

    def divisor(self, name: str, default: float) -> float:
        """A number that something is divided by; not zero, nor zero in float32."""
        value = self.take(name, float, default)
        if abs(value) < LEAST_FLOAT:
            raise ConfigError(f"config.json: {name} is {value}; the model divides by it.")
        return value

    def positive(self, name: str, default: float) -> float:
        """A number above zero, also in float32."""
        value = self.take(name, float, default)
        if value < LEAST_FLOAT:
            raise ConfigError(f"config.json: {name} is {value}; it must be greater than 0.")
        return value

    def all_layers(self, layers: int, **kinds: tuple[str, ...]) -> None:
        """Fields that list what each layer is, which must be what every layer is here.

        Args:
            layers: how many there are.
            kinds: by the field's name, what it may call a layer.
        """
        for name, known in kinds.items():
            given = self.take(name, list, [])
            if given and (len(given) != layers or any(kind not in known for kind in given)):
                raise ConfigError(
                    f"config.json: {name} is {shown(given)}; every one of the {layers} layers of "
                    f"Ingot's {self.model_type} is {known[0]!r}."
                )

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
                f"config.json: {name} is {shown(value)}; {self.model_type} expects a token id or a "
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
                f"config.json: {name} is {shown(value)}, which Ingot's {self.model_type} does not "
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
        if value is not None and not _same(value, expected):
            raise ConfigError(
                f"config.json: {name} is {shown(value)}; Ingot's {self.model_type} supports only "
                f"{expected!r} because {why}."
            )

    def finish(self) -> None:
        """Refuse every field nobody took, unless it cannot change the result.

        Raises:
            ConfigError: a field that says something else than the graph does, or one that nobody
                knows.
        """
        refuse_quantised(self.raw)
        for name, value in self.raw.items():
            # Absent, null, false and empty all mean "feature off" in Hugging Face configs; but what
            # every model here has, such as to look back only, must not be off.
            off = value is None or value in ({}, []) or (value is False and not _always(name))
            if name in self.taken or name in NO_EFFECT or name == QUANTISATION or off:
                continue
            if name in NEUTRAL and _same(value, NEUTRAL[name]):
                continue
            counts = next((known for known in SYNONYMS.get(name, ()) if known in self.taken), None)
            if counts is not None:
                self.must_be(name, self.taken[counts], f"it is another name of {counts}")
                continue
            raise ConfigError(
                f"config.json: {named(name)} is {shown(value)}, a field Ingot's "
                f"{self.model_type} does not implement; fields it reads: "
                f"{', '.join(sorted(self.taken))}. Remove the field if it does not change what the "
                "model computes."
            )


def refuse_quantised(raw: dict[str, Any], readable: Iterable[str] = READABLE) -> None:
    """Refuse a checkpoint whose ``config.json`` says that its weights are quantised.

    Where the tensors are plain floats all the same, the config is that of another file, or asks the
    loader to quantise them; either way it is not known what the model should compute.

    Args:
        raw: the parsed ``config.json``.
        readable: methods that are not refused.

    Raises:
        ConfigError: naming the method.
    """
    for name in (QUANTISATION, "compression_config", "quantization"):
        given = raw.get(name)
        method = method_of(given)
        if not given or (name == QUANTISATION and method is not None and method in readable):
            continue
        raise ConfigError(
            f"config.json: {name} (quant_method {_method(given)}): of quantised checkpoints those "
            f"of {', '.join(READABLE)} are read; export the float32, float16 or bfloat16 original. "
            f"If the tensors here are that original, remove {name} from config.json."
        )


def method_of(given: Any) -> str | None:
    """``quant_method`` of a ``quantization_config``; None where it names none."""
    method = given.get("quant_method") if isinstance(given, dict) else None
    return method if isinstance(method, str) else None


def _method(given: Any) -> str:
    if not isinstance(given, dict):
        return shown(given)
    method = given.get("quant_method")
    if method is None and (given.get("load_in_4bit") or given.get("load_in_8bit")):
        method = "bitsandbytes"
    # compressed-tensors writes no method where it has a format.
    return shown(method or given.get("format") or "unknown")


def _always(name: str) -> bool:
    return NEUTRAL.get(name) is True


def _same(value: Any, expected: Any) -> bool:
    """Whether JSON says the same: 1 is 1.0, and neither is true."""
    return isinstance(value, bool) == isinstance(expected, bool) and bool(value == expected)
