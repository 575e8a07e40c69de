"""A decode step with a fixed room against the growing cache, and what is made of near-ties."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kinds import every_family

from benchmarks.on_gpu.decoding import (
    CapturedDecoder,
    Decoder,
    agreement,
    drawn,
    in_dtype,
    read_bytes,
)
from benchmarks.on_gpu.devices import Host
from ingot.graphs.family import find_family
from ingot.graphs.preset import preset_config
from ingot.plugins.check import relative_rms


def made(name: str, **changes: Any) -> Any:
    family = find_family(name)
    return drawn(family, {**preset_config(family, "tiny"), **changes}, torch.float32, "cpu")


def prompt(tokens: int) -> torch.Tensor:
    return torch.randint(0, 512, (1, tokens), generator=torch.Generator().manual_seed(tokens))


@pytest.mark.parametrize("name", every_family())
def test_a_fixed_room_decodes_as_a_growing_cache(name: str) -> None:
    """Logits and tokens, also after going back to the prompt."""
    model = made(name)
    tokens, logits = Decoder(model, torch.float32, "cpu").greedy(prompt(7), 9)
    prefilled = Decoder(model, torch.float32, "cpu")
    first = prefilled.step(prompt(7))[-1]
    captured = CapturedDecoder(prefilled, 20, Host())
    for _ in range(2):
        assert captured.greedy(int(first.argmax()), 9) == tokens
        forced = torch.cat((first[None], captured.forced(tokens[:-1])))
        assert relative_rms(forced, logits) < 2e-6


@pytest.mark.parametrize("name", every_family())
def test_a_prefill_equals_its_tokens_one_by_one(name: str) -> None:
    model = made(name)
    ids = prompt(6)
    whole = Decoder(model, torch.float32, "cpu").step(ids)
    decoder = Decoder(model, torch.float32, "cpu")
    single = torch.cat([decoder.step(ids[:, i : i + 1]) for i in range(6)])
    assert relative_rms(single, whole) < 2e-6


def test_a_wider_type_has_the_same_weights() -> None:
    family = find_family("mamba2")
    config = preset_config(family, "tiny")
    narrow = drawn(family, config, torch.bfloat16, "cpu")
    wide = dict(in_dtype(narrow, family, config, torch.float64).named_parameters())
    for name, parameter in narrow.named_parameters():
        assert wide[name].dtype == torch.float64
        assert torch.equal(wide[name], parameter.double())


def test_tokens_must_agree_up_to_the_first_near_tie() -> None:
    truth = torch.tensor([[0.0, 9.0, 1.0], [5.0, 4.0, 0.0], [3.0, 2.95, 0.0]])
    eager = truth + torch.tensor([0.1, -0.1, 0.0])
    # At the last step 0.05 + 0.2 lie between the best two, and each may be off by 0.1.
    eager[2] = truth[2] + torch.tensor([-0.02, 0.02, 0.1])
    assert agreement([1, 0, 0], [1, 0, 0], eager, truth) == (2, None)
    assert agreement([1, 0, 1], [1, 0, 0], eager, truth) == (2, 2)
    assert agreement([1, 2, 1], [1, 0, 0], eager, truth) == (2, 1)


def test_counts_what_one_token_reads() -> None:
    model = made("olmoe")
    c = model.config
    keys = c.hidden_size * c.num_key_value_heads // c.num_attention_heads
    layer = 2 * c.hidden_size * (c.hidden_size + keys) + c.num_experts * c.hidden_size
    layer += 3 * c.hidden_size * c.intermediate_size * c.num_experts_per_tok
    layer += 2 * c.hidden_size + c.hidden_size + keys  # norms of the block, of queries and keys
    rest = c.vocab_size * c.hidden_size + c.hidden_size + c.hidden_size
    expected = 4.0 * (c.num_hidden_layers * layer + rest)
    cache = (torch.zeros(3, dtype=torch.float64),)
    found = read_bytes(model, c.num_experts_per_tok, cache, tied=c.tie_word_embeddings)
    assert found == expected + 24
