"""What llama.cpp calls an importance matrix: how large the inputs of each product are on a text.

Its own tool for it needs a vocabulary of its own; here transformers runs, and what is gathered is
the same: of each weight the mean square of each of its columns' inputs, of an expert over those
tokens that chose it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks.on_weights.figures import Ids

HEAD = "lm_head"


class _Sum:
    """Squares of the inputs that were seen, ``[E, K]``, and how many tokens of each expert."""

    def __init__(self, experts: int, columns: int) -> None:
        self.squares = torch.zeros(experts, columns, dtype=torch.float64)
        self.tokens = torch.zeros(experts, 1, dtype=torch.float64)

    def add(self, expert: int, x: torch.Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).double()
        self.squares[expert] += rows.square().sum(0)
        self.tokens[expert] += len(rows)

    def mean(self) -> np.ndarray:
        """Of an expert that nobody chose it is the mean over all: a zero would spare no column."""
        whole = self.squares.sum(0) / self.tokens.sum().clamp(min=1)
        own = self.squares / self.tokens.clamp(min=1)
        return torch.where(self.tokens > 0, own, whole).reshape(-1).float().numpy()


def record(checkpoint: Path, windows: Ids, path: Path) -> None:
    """Write an ``.npz`` of ``[E * K]`` for each weight, by its Hugging Face name.

    The head has none, as by default in llama.cpp's tool. Experts that are one stack have the names
    ``gate_proj``, ``up_proj`` and ``down_proj`` of their module.

    Args:
        checkpoint: a Hugging Face folder.
        windows: ``[W, L]`` token ids that are fed.
        path: of the file.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    sums: dict[str, _Sum] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != HEAD:
            sums[name] = _Sum(1, module.in_features)
            module.register_forward_pre_hook(_of_linear(sums[name]))
        elif hasattr(module, "gate_up_proj") and hasattr(module, "num_experts"):
            experts, _rows, hidden = module.gate_up_proj.shape
            of_input, of_inner = _Sum(experts, hidden), _Sum(experts, module.down_proj.shape[-1])
            sums |= {f"{name}.{kind}_proj": of_input for kind in ("gate", "up")}
            sums[f"{name}.down_proj"] = of_inner
            module.register_forward_pre_hook(_of_experts(of_input, of_inner))
    with torch.inference_mode():
        for ids in windows:
            model(torch.from_numpy(ids)[None], use_cache=False)
    np.savez(path, **{name: found.mean() for name, found in sums.items()})


def _of_linear(into: _Sum) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(_module: nn.Module, given: tuple[Any, ...]) -> None:
        into.add(0, given[0])

    return hook


def _of_experts(of_input: _Sum, of_inner: _Sum) -> Callable[[Any, tuple[Any, ...]], None]:
    def hook(module: Any, given: tuple[Any, ...]) -> None:
        x, chosen = given[0].reshape(-1, given[0].shape[-1]), given[1]
        for expert in chosen.unique().tolist():
            rows = x[(chosen == expert).any(-1)]
            gate, up = nn.functional.linear(rows, module.gate_up_proj[expert]).chunk(2, dim=-1)
            of_input.add(expert, rows)
            of_inner.add(expert, module.act_fn(gate) * up)

    return hook
