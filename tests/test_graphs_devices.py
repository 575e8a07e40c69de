"""Every graph runs on another device than the CPU, as far as that shows without one.

On the meta device a tensor that the graph makes elsewhere meets one that is not there, and PyTorch
refuses; a GPU would refuse it likewise.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ingot.graphs.family import find_family
from ingot.graphs.names import FAMILIES
from ingot.graphs.preset import preset_config

DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
CASES: list[tuple[str, dict[str, Any]]] = [(family, {}) for family in FAMILIES]
CASES += [("granite", {"rope_parameters": DYNAMIC}), ("olmoe", {"rope_parameters": DYNAMIC})]


@pytest.mark.parametrize(("name", "changes"), CASES)
def test_makes_no_tensor_on_the_cpu(name: str, changes: dict[str, Any]) -> None:
    family = find_family(name)
    config = {**preset_config(family, "tiny"), **changes}
    model = family.build(config, "generate", torch.bfloat16)
    states: Any = model.states
    batch, past, tokens = 2, 3, 5

    def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device="meta")

    dtypes = [getattr(torch, state.cast("bfloat16").dtype) for state in states]
    caches = tuple(
        zeros(*state.shape(batch, past), dtype=dtype)
        for state, dtype in zip(states, dtypes, strict=True)
    )
    seen = past + tokens if any(s.axis is not None for s in states) else tokens
    with torch.no_grad():
        out = model(zeros(batch, tokens), zeros(batch, seen), zeros(batch, tokens), caches)
    assert out.main.shape == (batch, tokens, config["vocab_size"])
    assert {each.device.type for each in (out.main, *out.present)} == {"meta"}
    assert len(out.present) == len(states)
    assert len(out.router_logits) == sum(model.config.facts.routers)
    assert len(model.config.facts.routers) == model.config.num_hidden_layers
