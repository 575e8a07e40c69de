"""The contract of Ingot's TensorRT plugins: what Python, C++ and tests agree on.

A dimension is a letter of docs/design.md, a number, or one of the two forms ``2I`` and ``W-1``.
One letter is one size across all tensors of a call.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from ctypes import Structure
from dataclasses import dataclass
from typing import Literal

from ingot.plugins import library
from ingot.plugins.errors import IngotError

NAMESPACE = "ingot"
VERSION = "1"

# "T" is one of these, the same for every tensor of a call that has it.
T = ("float32", "float16", "bfloat16")

# Written into an engine beside the fields: the interface version of the kernels whose workspace it
# reserved, 0 where there were none. With too little workspace the kernels would overwrite other
# tensors.
KERNELS_FIELD = "kernels"

_DIM = re.compile(r"(\d*)([A-Za-z]*)(-\d+)?")


class PluginError(IngotError):
    """A node, an engine or a call that a plugin refuses."""


@dataclass(frozen=True)
class Field:
    """An attribute of the ONNX node, as TensorRT hands it to the plugin."""

    name: str
    kind: Literal["int32", "float32", "char"]


@dataclass(frozen=True)
class Tensor:
    """An input or output.

    Attributes:
        name: as in the operator's ONNX schema.
        dtype: "T" or the one type it may have.
        shapes: the forms it may take, each the names of its dimensions.
    """

    name: str
    dtype: Literal["T", "float32", "int64"]
    shapes: tuple[tuple[str, ...], ...]

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(map(len, self.shapes))


@dataclass(frozen=True)
class Plugin:
    """One plugin.

    Attributes:
        structure: what the kernel library is called with. A pointer in it has the name of its
            tensor in lower case, and a field its own.
        sizes: members of the structure that are sizes -> the dimension.
    """

    name: str
    fields: tuple[Field, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    structure: type[Structure]
    sizes: Mapping[str, str]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Inputs, then outputs, in TensorRT's order."""
        return self.inputs + self.outputs

    def references(self, output: Tensor) -> tuple[tuple[str, int], ...]:
        """Where each dimension of an output comes from: an input and an axis of it."""
        # An input of several forms has no fixed axis for a dimension.
        axes = {
            dim: (tensor.name, axis)
            for tensor in reversed(self.inputs)
            if len(tensor.shapes) == 1
            for axis, dim in reversed(list(enumerate(tensor.shapes[0])))
        }
        return tuple(axes[dim] for dim in output.shapes[0])

    def bind(self, shapes: Sequence[Sequence[int]]) -> dict[str, int]:
        """The size of each dimension, from the inputs' shapes.

        Raises:
            PluginError: a wrong rank, or two tensors that disagree.
        """
        named = self._named(shapes)
        sizes: dict[str, int] = {}
        for *_, dim, size in named:
            sizes.setdefault(dim, size)
        for name, axis, dim, size in named:
            expected = _value(dim, sizes)
            if size != expected:
                raise PluginError(
                    f"{self.name} got {size} for dimension {axis} of {name}, which is {dim}; by "
                    f"its other inputs that is {expected}."
                )
        return sizes

    def bound(self, shapes: Sequence[Sequence[int]]) -> dict[str, int]:
        """Upper limits of the dimensions, from those of the inputs' shapes.

        TensorRT derives each tensor's limits apart, so that two may disagree.
        """
        sizes: dict[str, int] = {}
        for *_, dim, size in self._named(shapes):
            sizes[dim] = max(size, sizes.get(dim, size))
        return sizes

    def check_ranks(self, ranks: Sequence[int]) -> None:
        """Raise PluginError where an input has another rank than it may."""
        for tensor, rank in zip(self.inputs, ranks, strict=True):
            if rank not in tensor.ranks:
                forms = " or ".join(f"[{', '.join(form)}]" for form in tensor.shapes)
                raise PluginError(f"{self.name} got {tensor.name} of rank {rank}; it is {forms}.")

    def _named(self, shapes: Sequence[Sequence[int]]) -> list[tuple[str, int, str, int]]:
        """Input, axis, name and size of each dimension."""
        self.check_ranks([len(shape) for shape in shapes])
        return [
            (tensor.name, axis, dim, size)
            for tensor, shape in zip(self.inputs, shapes, strict=True)
            for axis, (dim, size) in enumerate(
                zip(tensor.shapes[tensor.ranks.index(len(shape))], shape, strict=True)
            )
        ]


def _value(dim: str, sizes: Mapping[str, int]) -> int:
    parts = _DIM.fullmatch(dim)
    assert parts is not None, dim
    factor, letter, less = parts.groups()
    return int(factor or 1) * (sizes[letter] if letter else 1) + int(less or 0)


def _tensor(name: str, dtype: Literal["T", "float32", "int64"], *shapes: str) -> Tensor:
    return Tensor(name, dtype, tuple(tuple(shape.split()) for shape in shapes))


PLUGINS = {
    plugin.name: plugin
    for plugin in (
        Plugin(
            "MoeDispatch",
            fields=(
                Field("top_k", "int32"),
                Field("normalize", "int32"),
                Field("activation", "char"),
            ),
            inputs=(
                _tensor("x", "T", "N H"),
                _tensor("router_logits", "float32", "N E"),
                _tensor("gate_up", "T", "E 2I H"),
                _tensor("down", "T", "E H I"),
            ),
            outputs=(_tensor("y", "T", "N H"),),
            structure=library.MoeDispatch,
            sizes={"experts": "E", "tokens": "N", "hidden": "H", "intermediate": "I"},
        ),
        Plugin(
            "MoeLinear",
            fields=(),
            inputs=(
                _tensor("x", "T", "N Kin", "N K Kin"),
                _tensor("expert_ids", "int64", "N K"),
                _tensor("weight", "T", "E O Kin"),
            ),
            outputs=(_tensor("y", "T", "N K O"),),
            structure=library.MoeLinear,
            sizes={
                "top_k": "K",
                "experts": "E",
                "tokens": "N",
                "in_features": "Kin",
                "out_features": "O",
            },
        ),
        Plugin(
            "Mamba2Scan",
            fields=(
                Field("chunk_size", "int32"),
                Field("dt_min", "float32"),
                Field("dt_max", "float32"),
            ),
            inputs=(
                _tensor("x", "T", "B T Hm Pm"),
                _tensor("dt", "T", "B T Hm"),
                _tensor("A", "float32", "Hm"),
                _tensor("B", "T", "B T G Ns"),
                _tensor("C", "T", "B T G Ns"),
                _tensor("D", "float32", "Hm"),
                _tensor("dt_bias", "float32", "Hm"),
                _tensor("state", "float32", "B Hm Pm Ns"),
                _tensor("mask", "T", "B T"),
            ),
            outputs=(
                _tensor("y", "T", "B T Hm Pm"),
                _tensor("new_state", "float32", "B Hm Pm Ns"),
            ),
            structure=library.Mamba2Scan,
            sizes={
                "batch": "B",
                "tokens": "T",
                "heads": "Hm",
                "head_size": "Pm",
                "groups": "G",
                "states": "Ns",
            },
        ),
        Plugin(
            "CausalConv",
            fields=(Field("activation", "char"),),
            inputs=(
                _tensor("x", "T", "B T C"),
                _tensor("state", "T", "B C W-1"),
                _tensor("weight", "T", "C 1 W"),
                _tensor("bias", "T", "C"),
            ),
            outputs=(_tensor("y", "T", "B T C"), _tensor("new_state", "T", "B C W-1")),
            structure=library.CausalConv,
            sizes={"batch": "B", "tokens": "T", "channels": "C", "width": "W"},
        ),
    )
}
