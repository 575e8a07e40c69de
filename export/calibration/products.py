"""The products of an eager graph: what each of its matrices is multiplied with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from ingot.plugins.activations import activate
from ingot.plugins.experts import route
from ingot.plugins.moe_dispatch import moe_dispatch
from ingot.plugins.moe_linear import moe_linear

# Parameter, expert (0 of any that is no stack) and inputs ``[n, K]``.
See = Callable[[str, int, torch.Tensor], None]


class Products(TorchFunctionMode):
    """Shows the inputs of every linear layer and of every expert while it is entered.

    The inputs of an expert's second matrix come times the weight that the token gives the expert,
    as what comes of them does.

    Args:
        model: whose parameters are looked for; they are not to be replaced meanwhile.
        see: is shown them.

    Attributes:
        together: the names of the two stacks of each mixture of experts, which one kernel reads.
    """

    def __init__(self, model: nn.Module, see: See) -> None:
        super().__init__()
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._see = see
        self.together: set[tuple[str, ...]] = set()
        self._made: dict[int, tuple[torch.Tensor, str]] = {}
        self._experts: Mapping[Any, Callable[..., None]] = {
            moe_dispatch.overload: self._mixture,
            moe_linear.overload: self._choices,
        }

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.linear and id(args[1]) in self._names:
            name = self._names[id(args[1])]
            # Held, so that no other gets its number.
            self._made[id(result)] = result, name
            self._see(name, 0, args[0].flatten(0, -2))
        elif func in self._experts:
            self._experts[func](*args)
        return result

    def routers(self, logits: tuple[torch.Tensor, ...]) -> set[str]:
        """The linear layers that made these logits; forgets what all layers so far made."""
        names = {self._made[id(each)][1] for each in logits if id(each) in self._made}
        self._made.clear()
        return names

    def _mixture(
        self,
        x: torch.Tensor,
        router_logits: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        top_k: int,
        normalize: bool,
        activation: str,
    ) -> None:
        names = self._names[id(gate_up)], self._names[id(down)]
        self.together.add(names)
        ids, weights = route(router_logits, top_k, normalize)
        for expert in torch.unique(ids).tolist():
            token, slot = torch.nonzero(ids == expert, as_tuple=True)
            rows = x[token]
            self._see(names[0], expert, rows)
            gate, up = (rows @ gate_up[expert].T).chunk(2, dim=-1)
            inner = activate(activation, gate) * up * weights[token, slot, None]
            self._see(names[1], expert, inner)

    def _choices(self, x: torch.Tensor, expert_ids: torch.Tensor, weight: torch.Tensor) -> None:
        for expert in torch.unique(expert_ids).tolist():
            token, choice = torch.nonzero(expert_ids == expert, as_tuple=True)
            rows = x[token] if x.dim() == 2 else x[token, choice]
            self._see(self._names[id(weight)], expert, rows)
