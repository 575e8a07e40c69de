"""Tiny graphs as a capture makes them, with drawn weights, and what ONNX Runtime makes of them."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from traces import Traces

from ingot.graphs.family import find_family
from ingot.graphs.preset import preset_config
from ingot.runtime.onnxruntime_session import open_session

Arrays = dict[str, np.ndarray]
VOCABULARY = 512


def canonical(traces: Traces, family: str, **changes: Any) -> ir.Model:
    """A graph of its own, whose activations stay near 1."""
    found = find_family(family)
    config = {**preset_config(found, "tiny"), **changes}
    model = found.build(config, "generate", torch.float32)
    shapes = {name: each.shape for name, each in model.named_parameters()}

    def read(name: str, block: int) -> torch.Tensor:
        shape = shapes[name]
        # Of a stack a block is one expert; a convolution is no stack.
        of_block = shape[1:] if len(shape) == 3 and shape[1] > 1 else shape
        random = torch.Generator().manual_seed(zlib.crc32(f"{name} {block}".encode()))
        drawn = torch.randn(of_block, generator=random)
        if len(of_block) == 1:
            return 0.5 * drawn + (1 if "norm" in name else 0)
        return drawn / math.sqrt(of_block[-1])

    return traces(model, read).model


def first_feeds(model: ir.Model, ids: np.ndarray, mask: np.ndarray) -> Arrays:
    """What a first call is given: empty caches, and states of zeros."""
    sizes = {"batch": len(ids), "past_sequence": 0}
    fed = {"input_ids": ids, "attention_mask": mask}
    for value in model.graph.inputs:
        if value.name not in fed and value.name in _states(model):
            assert value.shape is not None
            shape = [d if isinstance(d, int) else sizes[str(d.value)] for d in value.shape]
            fed[str(value.name)] = np.zeros(shape, np.float32)
    return {**fed, **_positions(mask, ids.shape[1])}


def next_feeds(model: ir.Model, done: Arrays, ids: np.ndarray, mask: np.ndarray) -> Arrays:
    """What a call is given after another, whose outputs are ``done``; the mask is of all tokens."""
    states = {past: done[present] for past, present in _states(model).items()}
    counts = any(each.shape[-2] == mask.shape[1] - ids.shape[1] for each in states.values())
    caches = counts and any("key" in name for name in states)
    of_call = mask if caches else mask[:, -ids.shape[1] :]
    fed = {"input_ids": ids, "attention_mask": of_call, **states}
    return {**fed, **_positions(mask, ids.shape[1])}


def _positions(mask: np.ndarray, tokens: int) -> Arrays:
    return {"position_ids": np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -tokens:]}


def _states(model: ir.Model) -> dict[str, str]:
    """The inputs of states, and the outputs that replace them."""
    names = [value.name or "" for value in model.graph.inputs]
    renamed = {
        name: name.replace("past_key_values.", "present.").replace("past_states", "present_states")
        for name in names
    }
    return {name: to for name, to in renamed.items() if to != name}


class Runs:
    """A graph under ONNX Runtime; the graph stays as it is."""

    def __init__(self, model: ir.Model, libraries: Sequence[Path] = ()) -> None:
        data = ir.serde.serialize_model(model).SerializeToString()
        self._model = model
        self._session = open_session(data, threads=1, libraries=libraries)

    def __call__(self, fed: Arrays) -> Arrays:
        """Every output by name."""
        names = [each.name for each in self._session.get_outputs()]
        wanted = {each.name: fed[each.name] for each in self._session.get_inputs()}
        return dict(zip(names, map(np.asarray, self._session.run(names, wanted)), strict=True))

    def prefill_and_decode(self, tokens: int) -> list[Arrays]:
        """Two rows, the second padded on the left: some tokens, then one, then three."""
        ids = np.random.default_rng(3).integers(0, VOCABULARY, (2, tokens + 4))
        mask = np.ones_like(ids)
        mask[1, :3] = 0
        done = self(first_feeds(self._model, ids[:, :tokens], mask[:, :tokens]))
        results = [done]
        for begin, end in ((tokens, tokens + 1), (tokens + 1, tokens + 4)):
            done = self(next_feeds(self._model, done, ids[:, begin:end], mask[:, :end]))
            results.append(done)
        return results


def assert_same(found: list[Arrays], expected: list[Arrays], padded: int = 3) -> None:
    """Equal outputs of all real tokens, and of all states; row 1 begins with padding."""
    for at, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours.keys() == theirs.keys()
        for name, right in theirs.items():
            mine = ours[name]
            assert mine.shape == right.shape, name
            size = np.abs(right).max()
            assert size > 0.01, name
            if name == "logits" and not at:
                mine, right = mine.copy(), right.copy()
                mine[1, :padded] = right[1, :padded] = 0
            elif "key" in name or "value" in name:
                mine, right = mine.copy(), right.copy()
                mine[1, :, :padded] = right[1, :, :padded] = 0
            np.testing.assert_allclose(mine, right, rtol=0, atol=3e-6 * max(size, 1), err_msg=name)
