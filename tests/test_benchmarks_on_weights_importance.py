"""The mean square of each product's inputs, against a layer that is computed by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

from benchmarks.on_weights import importance

HIDDEN, INNER, EXPERTS, CHOSEN = 16, 8, 5, 2


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[OlmoeForCausalLM, np.ndarray, Path]:
    """A random OLMoE of one layer, what it was fed, and what was recorded of it."""
    folder = tmp_path_factory.mktemp("importance")
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=32,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=1,
    )
    model = OlmoeForCausalLM(config)
    # One number of every token is above zero and attention adds nothing: nobody chooses the last
    # expert.
    gate = next(p for name, p in model.named_parameters() if name.endswith("mlp.gate.weight"))
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.weight")[:, 0] = 0.6
        model.get_parameter("model.layers.0.self_attn.o_proj.weight").zero_()
        gate[-1] = 0.0
        gate[-1, 0] = -9.0
    model.save_pretrained(folder / "checkpoint")
    windows = np.random.default_rng(0).integers(0, 32, (2, 7))
    importance.record(folder / "checkpoint", windows, folder / "importance.npz")
    return model, windows, folder / "importance.npz"


def test_is_the_mean_square_of_what_each_product_is_given(
    recorded: tuple[OlmoeForCausalLM, np.ndarray, Path],
) -> None:
    model, windows, path = recorded
    weight = {name: value.detach() for name, value in model.named_parameters()}
    layer = "model.layers.0"
    seen: dict[str, list[torch.Tensor]] = {}
    inside = model.get_submodule(f"{layer}.mlp")
    inside.register_forward_pre_hook(
        lambda _module, given: seen.setdefault("mlp", []).append(given[0].reshape(-1, HIDDEN))
    )
    with torch.no_grad():
        for ids in windows:
            model(torch.from_numpy(ids)[None])
    x = torch.cat(seen["mlp"])
    scores = x @ weight[f"{layer}.mlp.gate.weight"].T
    chosen = scores.topk(CHOSEN).indices
    expected_in: list[torch.Tensor] = []
    expected_inner: list[torch.Tensor] = []
    for expert in range(EXPERTS):
        its = [t for t in range(len(x)) if expert in chosen[t].tolist()]
        gate_up = weight[f"{layer}.mlp.experts.gate_up_proj"][expert]
        products = x[its] @ gate_up.T
        inner = torch.nn.functional.silu(products[:, :INNER]) * products[:, INNER:]
        expected_in.append((x[its] ** 2).sum(0))
        expected_inner.append((inner**2).sum(0))
    tokens = torch.bincount(chosen.flatten(), minlength=EXPERTS)
    assert tokens[-1] == 0 and (tokens > 0).sum() > CHOSEN
    with np.load(path) as found:
        for kind, expected in (
            ("gate_proj", expected_in),
            ("up_proj", expected_in),
            ("down_proj", expected_inner),
        ):
            by_expert = found[f"{layer}.mlp.experts.{kind}"].reshape(EXPERTS, -1)
            for expert, count in enumerate(tokens):
                alone = expected[expert] / count if count else sum(expected) / tokens.sum()
                np.testing.assert_allclose(by_expert[expert], alone.numpy(), rtol=1e-4)
        embedded = weight["model.embed_tokens.weight"][torch.from_numpy(windows.flatten())]
        normed = embedded * torch.rsqrt((embedded**2).mean(-1, keepdim=True) + 1e-5)
        for kind in "qkv":
            np.testing.assert_allclose(
                found[f"{layer}.self_attn.{kind}_proj"], (normed**2).mean(0).numpy(), rtol=1e-4
            )
        assert "lm_head" not in found
