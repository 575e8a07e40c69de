"""The token ids that end and pad a sequence, from the two files that may name them."""

from __future__ import annotations

from typing import Any

from ingot.graphs.checkpoint import Checkpoint
from ingot.graphs.config import ModelConfig
from ingot.plugins.errors import IngotError, shown
from ingot.plugins.json_file import JsonError, read_object

FILE = "generation_config.json"


class GenerationError(IngotError):
    """A ``generation_config.json`` that cannot be read, or a token id that is none."""


def read_generation(checkpoint: Checkpoint, config: ModelConfig) -> dict[str, Any]:
    """What ``ingot.json`` says of a sequence's ends and padding.

    As in transformers, a field of ``generation_config.json`` that is not null wins over
    ``config.json``'s.

    Raises:
        GenerationError: that file is no JSON object, or ``eos_token_id``, ``bos_token_id`` or
            ``pad_token_id`` of either file is no id of the vocabulary.
    """
    vocab = config.vocab_size
    eos, pad = list(config.facts.eos_token_ids), config.facts.pad_token_id
    _check_each(
        "config.json", {**checkpoint.config, "eos_token_id": eos, "pad_token_id": pad}, vocab
    )
    given = {name: value for name, value in _file(checkpoint).items() if value is not None}
    _check_each(FILE, given, vocab)
    if "eos_token_id" in given:
        end = given["eos_token_id"]
        eos = end if isinstance(end, list) else [end]
    pad = given.get("pad_token_id", pad)
    switch = config.facts.switch_length
    return {
        # Each once: some files repeat one, and a manifest is read with limits.
        "eos_token_ids": list(dict.fromkeys(eos)),
        # Padding is masked, so any id of the vocabulary serves where the model has none.
        "pad_token_id": max(pad, 0),
        "context_length": config.facts.context_length,
        # Pieces of a longer prompt do not compute what the whole does; most models have none.
        **({} if switch is None else {"switch_length": switch}),
    }


def _file(checkpoint: Checkpoint) -> dict[str, Any]:
    path = checkpoint.path / FILE
    if not path.is_file():
        return {}
    try:
        return read_object(path)
    except JsonError as error:
        raise GenerationError(f"{error}; mend the file or remove it.") from error


def _check_each(file: str, fields: dict[str, Any], vocab: int) -> None:
    end = fields.get("eos_token_id")
    ends = end if isinstance(end, list) else [] if end is None else [end]
    if not all(_is_id(id_, vocab) for id_ in ends):
        raise _no_id(file, "eos_token_id", end, "a token id or a list of them", vocab)
    for name in ("bos_token_id", "pad_token_id"):
        value = fields.get(name)
        # LLaMA's first conversions, and what was tuned from them, say so that nothing pads.
        unpadded = name == "pad_token_id" and type(value) is int and value == -1
        if not (value is None or unpadded or _is_id(value, vocab)):
            raise _no_id(file, name, value, "a token id", vocab)


def _is_id(value: object, vocab: int) -> bool:
    return type(value) is int and 0 <= value < vocab


def _no_id(file: str, name: str, value: object, expected: str, vocab: int) -> GenerationError:
    return GenerationError(
        f"{file}: {name} is {shown(value)}; it must be {expected} of the model's vocabulary, "
        f"integers from 0 to {vocab - 1}. Set it to what the model's tokenizer has, or to null."
    )
