"""The eager PyTorch graph as a session: the reference every target is compared with."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ingot.export.request import EXTRA_OUTPUTS
from ingot.graphs.checkpoint import Checkpoint, WeightMap, assemble, load_parameters, set_parameter
from ingot.graphs.family import family_of, parameter_bytes
from ingot.graphs.layers import Decoder, ModelOutput
from ingot.runtime.session import Floats, Ids

# Bytes of weights that stay in memory from call to call.
RESIDENT = 2**30


class EagerSession:
    """Runs a checkpoint on the eager graph.

    A model that would take more than ``RESIDENT``, or half of the free memory, is streamed: each
    layer's weights are read from the checkpoint when it runs and dropped after.

    Args:
        checkpoint: the weights.
        task: a task of the family.
        precision: of weights and activations.
        streamed: whether to stream; decided by the size where absent.
        advance: told the bytes of each weight that is loaded up front.

    Attributes:
        tapped: of the last call, ``router_logits.{i} [B*T, E]`` and
            ``hidden_states.{i} [B, T, H]``.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        task: str,
        *,
        precision: torch.dtype = torch.float32,
        streamed: bool | None = None,
        advance: Callable[[int], None] = lambda _bytes: None,
    ) -> None:
        family = family_of(checkpoint)
        self.model = family.build(checkpoint.config, task, precision, checkpoint.entries)
        self.precision = precision
        weight_map = family.weight_map(self.model, checkpoint, task)
        size = parameter_bytes(self.model)
        if streamed if streamed is not None else size > min(RESIDENT, free_memory() / 2):
            _stream_weights(self.model, checkpoint, weight_map)
        else:
            load_parameters(self.model, checkpoint, weight_map, advance=advance)
        self.states = tuple(state.cast(dtype_name(precision)) for state in self.model.states)
        self._cached = any(state.axis is not None for state in self.states)
        self.tapped: dict[str, Floats] = {}
        self.reset(1, 0)

    def reset(self, batch: int, capacity: int) -> None:
        """See ``runtime.session.Session.reset``."""
        self._mask: Ids = np.zeros((batch, 0), dtype=np.int64)
        self._past = tuple(
            torch.zeros(state.shape(batch, 0), dtype=getattr(torch, state.dtype))
            for state in self.states
        )

    @torch.inference_mode()
    def step(self, input_ids: Ids, attention_mask: Ids, logits_to_keep: int = 0) -> Floats:
        """See ``runtime.session.Session.step``."""
        feeds = self._feeds(input_ids, attention_mask)
        tensors = {name: torch.from_numpy(array.copy()) for name, array in feeds.items()}
        # Models without a head do not know it.
        asked = {"logits_to_keep": logits_to_keep} if logits_to_keep else {}
        out: ModelOutput = self.model(**tensors, past=self._past, **asked)
        self._past = out.present
        self.tapped = {
            f"{name}.{index}": as_array(tensor)
            for name in EXTRA_OUTPUTS
            for index, tensor in enumerate(getattr(out, name))
        }
        return as_array(out.main)

    def _feeds(self, input_ids: Ids, attention_mask: Ids) -> dict[str, Ids]:
        """The graph's token inputs."""
        before = self._mask if self.states else None
        given, positions, self._mask = fed_by_definition(attention_mask, before, self._cached)
        return {"input_ids": input_ids, "attention_mask": given, "position_ids": positions}

    def state(self) -> dict[str, Floats]:
        """See ``runtime.session.Session.state``."""
        return {
            spec.output: np.ascontiguousarray(as_array(tensor))
            for spec, tensor in zip(self.states, self._past, strict=True)
        }


def fed_by_definition(mask: Ids, before: Ids | None, cached: bool) -> tuple[Ids, Ids, Ids]:
    """What the eager graph is told of a call's tokens; a session has its own way to that.

    Args:
        mask: ``[B, T]``, 1 for the tokens of the call and 0 for its padding.
        before: ``[B, P]``, of the calls before; None where each call stands alone.
        cached: whether the graph keeps old tokens in a cache, whose mask it takes too.

    Returns:
        The mask that the graph takes, ``[B, P + T]`` or ``[B, T]``; the positions ``[B, T]``; and
        the mask of the calls so far, ``[B, P + T]``.
    """
    so_far = mask if before is None else np.concatenate((before, mask), axis=1)
    tokens = mask.shape[1]
    positions = np.maximum(np.cumsum(so_far, axis=1) - 1, 0)[:, -tokens:]
    return so_far if cached else so_far[:, -tokens:], positions, so_far


def as_array(tensor: torch.Tensor) -> Floats:
    """As float32, or as the float64 it is."""
    result: Floats = tensor.to(torch.promote_types(tensor.dtype, torch.float32)).numpy()
    return result


def dtype_name(dtype: torch.dtype) -> str:
    """Such as ``float32``."""
    return str(dtype).removeprefix("torch.")


def free_memory() -> int:
    """Bytes this process could still take; file caches count as free where Linux says so."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _stream_weights(model: nn.Module, checkpoint: Checkpoint, weight_map: WeightMap) -> None:
    """Give each layer, and each module outside the layers, its weights only while it runs."""
    # A layer may have lists of modules of its own, which come and go with it.
    blocks = [layer for m in model.modules() if isinstance(m, Decoder) for layer in m.layers]
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    names = {id(module): name for name, module in model.named_modules()}
    for block in blocks:
        prefix = names[id(block)] + "."
        own = {
            name.removeprefix(prefix): parts
            for name, parts in weight_map.items()
            if name.startswith(prefix)
        }
        block.register_forward_pre_hook(_loader(checkpoint, own))
        block.register_forward_hook(_dropper)
    # What is left (embedding, final norm, head) is small beside the layers and stays.
    for name, parameter in list(model.named_parameters()):
        if id(parameter) in inside:
            continue
        value = assemble(checkpoint, weight_map[name], tuple(parameter.shape), parameter.dtype)
        set_parameter(model, name, value)


def _loader(checkpoint: Checkpoint, weight_map: WeightMap) -> Callable[..., None]:
    def load(module: nn.Module, _arguments: Any) -> None:
        load_parameters(module, checkpoint, weight_map)

    return load


def _dropper(module: nn.Module, _arguments: Any, _output: Any) -> None:
    module.to("meta")
