"""The recipe of tests/data/trained: it makes the same each time, and made what is committed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, GraniteConfig, OlmoeConfig

from benchmarks.training.loop import nats_per_token, train, unigram_nats_per_token
from benchmarks.training.models import Recipe, recipes
from benchmarks.training.tokenizer import (
    END_ID,
    PADDING_ID,
    VOCABULARY,
    token_stream,
    train_tokenizer,
)

FAMILIES = tuple(recipes())
MOST_BYTES = 20_000_000

# Fields that a save adds, or that a training alone reads.
SAVED = {"architectures", "dtype", "transformers_version", "_name_or_path"}


def _small(kind: type[GraniteConfig] | type[OlmoeConfig] = OlmoeConfig) -> Recipe:
    fields: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "vocab_size": 64,
        "num_hidden_layers": 1,
        "pad_token_id": 1,
    }
    if kind is OlmoeConfig:
        fields |= {"num_experts": 4, "num_experts_per_tok": 2}
    return Recipe(kind(**fields), steps=30, rate=1e-2, length=16, warm_up=5)


def _trained(recipe: Recipe, tokens: torch.Tensor) -> Any:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(recipe.config)  # type: ignore[no-untyped-call]
    train(model, recipe, tokens)
    return model


@pytest.fixture(scope="module")
def stream() -> torch.Tensor:
    """Tokens each of which follows from the one before."""
    return torch.tensor([(7 * at) % 62 + 2 for at in range(2000)])


@pytest.mark.parametrize("kind", [OlmoeConfig, GraniteConfig])
def test_learns_the_same_each_time(kind: Any, stream: torch.Tensor) -> None:
    first, second = (_trained(_small(kind), stream) for _ in range(2))
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    assert nats_per_token(first, stream[:300]) < 0.7 * unigram_nats_per_token(stream, stream, 64)


def test_counts_nats_as_a_loss_of_transformers_does(stream: torch.Tensor) -> None:
    model = _trained(replace(_small(GraniteConfig), steps=2), stream)
    with torch.no_grad():
        pieces = [
            model(piece[None], labels=piece[None]).loss for piece in stream[:32].reshape(4, 8)
        ]
    expected = float(torch.stack(pieces).mean())
    # A last piece of one token has nothing to predict.
    assert nats_per_token(model, stream[:33], window=8) == pytest.approx(expected, rel=1e-5)


def test_takes_the_frequencies_of_what_was_learned() -> None:
    learned = torch.tensor([0, 0, 1])
    # Three, two and one of six, counting one more of each.
    expected = float(-torch.tensor([1 / 2, 1 / 6]).double().log().mean())
    assert unigram_nats_per_token(learned, torch.tensor([0, 2]), 3) == pytest.approx(expected)


def test_keeps_every_byte_of_a_text() -> None:
    documents = ["to be, or not to be\n", "“Straße” — 中文\t\x07"]
    tokenizer = train_tokenizer(documents)
    stream = token_stream(tokenizer, documents)
    assert stream.count(END_ID) == len(documents)
    assert tokenizer.decode(stream) == "".join(documents)


@pytest.mark.parametrize("family", FAMILIES)
def test_commits_what_the_recipe_makes(family: str, trained: Callable[[str], Path]) -> None:
    folder = trained(family)
    found, wanted = AutoConfig.from_pretrained(folder).to_dict(), recipes()[family].config.to_dict()
    assert {k: v for k, v in found.items() if k not in SAVED} == {
        k: v for k, v in wanted.items() if k not in SAVED
    }
    weights = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    embedding = next(w for name, w in weights.items() if "embed" in name)
    assert len(embedding) == VOCABULARY
    if family == "olmoe":
        # Where no head is tied to it, the row of the padding is never trained.
        assert not embedding[PADDING_ID].any() and embedding[END_ID].any()


def test_commits_one_tokenizer_and_few_bytes(trained: Callable[[str], Path]) -> None:
    folders = [trained(family) for family in FAMILIES]
    assert len({(folder / "tokenizer.json").read_bytes() for folder in folders}) == 1
    files = [file for folder in folders for file in folder.iterdir()]
    assert sum(file.stat().st_size for file in files) < MOST_BYTES
