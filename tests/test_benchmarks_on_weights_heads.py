"""An OLMoE with its heads of keys repeated computes what it computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, OlmoeConfig, OlmoeForCausalLM

from benchmarks.on_weights.heads import needs_repeated_heads, repeat_heads


def test_repeated_heads_give_the_same_logits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=32,
        hidden_size=48,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=1,
    )
    model: Any = OlmoeForCausalLM(config)
    for name, weight in model.named_parameters():
        # As trained ones are: no two numbers of a norm alike.
        if "norm" in name:
            torch.nn.init.normal_(weight, 1.0, 0.2)
    model.save_pretrained(tmp_path / "before")
    (tmp_path / "before" / "tokenizer.json").write_text("{}")
    assert needs_repeated_heads(tmp_path / "before")
    repeat_heads(tmp_path / "before", tmp_path / "after")
    assert not needs_repeated_heads(tmp_path / "after")
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "after", dtype=torch.float32)
    assert again.config.num_key_value_heads == 6
    ids = torch.randint(32, (2, 9))
    with torch.no_grad():
        expected, found = model(ids).logits, again(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
