"""Whole models on a device: weights drawn there, a prefill, and decode as one graph.

A cache that grows cannot be captured. Here it has a fixed room: the new key and value are written
to their place after the step that made them, and a mask keeps empty places out. The order of keys
does not matter, since their positions were applied before, so ``graphs/`` stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.on_gpu.devices import Device
from ingot.graphs.checkpoint import set_parameter, stack_height
from ingot.graphs.family import Family
from ingot.graphs.layers import ModelOutput
from ingot.graphs.preset import random_weight
from ingot.graphs.state import State

Tensors = tuple[torch.Tensor, ...]


def drawn(
    family: Family, config: dict[str, Any], dtype: torch.dtype, device: str, seed: int = 0
) -> nn.Module:
    """An eager graph with seeded weights drawn on the device, scaled as a preset's are."""
    model = family.build(config, "generate", dtype)
    for name, parameter in list(model.named_parameters()):
        weight = random_weight(family, name, tuple(parameter.shape), seed, device)
        gain = family.preset_gain(name, config)
        set_parameter(model, name, weight.mul_(gain).to(parameter.dtype))
    return model


def in_dtype(model: nn.Module, family: Family, config: dict[str, Any], dtype: torch.dtype) -> Any:
    """The same weights in a wider type, as the eager graph of that type has them."""
    wide = family.build(config, "generate", dtype)
    found = dict(model.named_parameters())
    for name, parameter in list(wide.named_parameters()):
        value = found[name].to(torch.promote_types(parameter.dtype, dtype))
        set_parameter(wide, name, value)
    return wide


class Decoder:
    """Prefill and decode of one sequence after another step, with the states it carries.

    Args:
        model: an eager graph on the device.
        dtype: of the graph.
        device: where it is.
    """

    def __init__(self, model: Any, dtype: torch.dtype, device: str) -> None:
        self.model, self.dtype, self.device = model, dtype, device
        name = str(dtype).removeprefix("torch.")
        self.states: Sequence[State] = [state.cast(name) for state in model.states]
        self.grows = any(state.axis is not None for state in self.states)
        self.past: Tensors = self.empty(0)
        self.seen = 0

    def empty(self, room: int) -> Tensors:
        """States of one sequence, zero, with room for so many tokens where they grow."""
        return tuple(
            torch.zeros(state.shape(1, room), dtype=getattr(torch, state.dtype), device=self.device)
            for state in self.states
        )

    @torch.no_grad()
    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """The next tokens ``[1, T]`` -> their logits ``[T, V]``; states grow with each call."""
        tokens = ids.shape[1]
        positions = torch.arange(self.seen, self.seen + tokens, device=self.device)[None]
        # A state of fixed size needs no mask of what came before.
        masked = self.seen + tokens if self.grows else tokens
        mask = torch.ones(1, masked, dtype=torch.int64, device=self.device)
        out: ModelOutput = self.model(ids, mask, positions, self.past)
        self.past = out.present
        self.seen += tokens
        return out.main[0]

    def greedy(self, ids: torch.Tensor, count: int) -> tuple[list[int], torch.Tensor]:
        """So many greedy tokens after a prompt, and the logits ``[count, V]`` that chose them."""
        rows = [self.step(ids)[-1]]
        tokens = [int(rows[-1].argmax())]
        while len(tokens) < count:
            rows.append(self.step(torch.tensor([[tokens[-1]]], device=self.device))[-1])
            tokens.append(int(rows[-1].argmax()))
        return tokens, torch.stack(rows)


class CapturedDecoder:
    """One decode step as a graph that feeds its own greedy token to the next replay.

    Args:
        prefilled: what has read the prompt; its states are copied.
        room: tokens of the cache, prompt included.
        device: makes the graph.

    Attributes:
        token: ``[1, 1]``, what the next replay reads.
        logits: ``[V]`` of the last replay.
        replay: one step.
    """

    def __init__(self, prefilled: Decoder, room: int, device: Device) -> None:
        self.model, self.states = prefilled.model, prefilled.states
        self._prefilled = prefilled
        self.caches = prefilled.empty(room)
        name = prefilled.device
        self.token = torch.zeros(1, 1, dtype=torch.int64, device=name)
        self.at = torch.zeros(1, dtype=torch.int64, device=name)
        # The last column is the token of the step itself.
        columns = room + 1 if prefilled.grows else 1
        self.mask = torch.zeros(1, columns, dtype=torch.int64, device=name)
        vocabulary = self.model.config.vocab_size
        self.logits = torch.empty(vocabulary, dtype=prefilled.dtype, device=name)
        self.rewind()
        # Capturing runs the step, which moves the states on.
        self.replay: Callable[[], object] = device.capture(self._step)
        self.rewind()

    def rewind(self) -> None:
        """Back to the end of the prompt."""
        seen = self._prefilled.seen
        self.at.fill_(seen)
        self.mask.zero_()
        if self._prefilled.grows:
            self.mask[:, :seen] = 1
        self.mask[:, -1] = 1
        for state, cache, past in zip(self.states, self.caches, self._prefilled.past, strict=True):
            if state.axis is None:
                cache.copy_(past)
            else:
                cache.zero_()
                cache.narrow(state.axis, 0, seen).copy_(past)

    @torch.no_grad()
    def _step(self) -> None:
        out: ModelOutput = self.model(self.token, self.mask, self.at[None], self.caches)
        for state, cache, present in zip(self.states, self.caches, out.present, strict=True):
            if state.axis is None:
                cache.copy_(present)
            else:
                new = present.narrow(state.axis, present.shape[state.axis] - 1, 1)
                cache.index_copy_(state.axis, self.at, new)
        if self._prefilled.grows:
            self.mask.index_fill_(1, self.at, 1)
        self.at += 1
        self.logits.copy_(out.main[0, -1])
        self.token.copy_(self.logits.argmax()[None, None])

    def forced(self, tokens: Sequence[int]) -> torch.Tensor:
        """Logits ``[len(tokens), V]`` after each of these tokens, from the end of the prompt."""
        self.rewind()
        rows = []
        for token in tokens:
            self.token.fill_(token)
            self.replay()
            rows.append(self.logits.clone())
        return torch.stack(rows)

    def greedy(self, first: int, count: int) -> list[int]:
        """``first`` and the greedy tokens after it, ``count`` in all."""
        self.rewind()
        self.token.fill_(first)
        tokens = [first]
        while len(tokens) < count:
            self.replay()
            tokens.append(int(self.token))
        return tokens


def agreement(
    tokens: Sequence[int], eager: Sequence[int], logits: torch.Tensor, truth: torch.Tensor
) -> tuple[int, int | None]:
    """How far greedy tokens must equal eager's, and where they first do not.

    Two logits that are each off by up to ``error`` may change places where they are within twice
    that; from the first such step on, both continuations are right.

    Args:
        tokens: of the kernels.
        eager: of the eager graph.
        logits: ``[count, V]`` of the eager graph, which chose its tokens.
        truth: the same in a wider type, after the same tokens.

    Returns:
        Steps before the first near-tie, and the first step that differs, or None.
    """
    error = (logits.double() - truth.double()).abs().amax(dim=1)
    best = logits.double().topk(2, dim=1).values
    clear = (best[:, 0] - best[:, 1]) > 2 * error
    ties = (~clear).nonzero()
    first_tie = int(ties[0]) if len(ties) else len(eager)
    differs = next((i for i, (a, b) in enumerate(zip(tokens, eager, strict=True)) if a != b), None)
    return first_tie, differs


def read_bytes(model: nn.Module, top_k: int, cache: Tensors, tied: bool) -> float:
    """Least bytes that one token reads: its experts, all other matrices once, and its states."""
    total = 0.0
    for name, parameter in model.named_parameters():
        size = parameter.numel() * parameter.element_size()
        experts = stack_height(tuple(parameter.shape))
        if "embed" in name and not tied:
            size //= parameter.shape[0]
        elif experts > 1:
            size = size * top_k // experts
        total += size
    return total + math.fsum(each.numel() * each.element_size() for each in cache)
