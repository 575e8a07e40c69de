"""Weights in the graph: from graph inputs to initializers, and into the layout their use wants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
import torch

from ingot.export.passes.graph_pass import GraphPass
from ingot.graphs.checkpoint import stack_height

# Reads one block of a weight; see `Weight`.
ReadBlock = Callable[[int], np.ndarray]


class Origin(NamedTuple):
    """What a block of a weight is of.

    Attributes:
        parameter: of the eager model.
        expert: which of a stack; 0 of any other parameter.
    """

    parameter: str
    expert: int


class Weight(ir.LazyTensor):
    """A weight that is read when it is written, block by block, and never kept.

    The blocks follow one another in row-major order: a stack of experts ``[E, ...]`` has one
    block an expert, any other weight is one block. So memory is bounded by one expert.

    Attributes:
        blocks: how many there are.
        read_block: index -> the block.
        origins: of each block.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: ir.DataType,
        read_block: ReadBlock,
        origins: Sequence[Origin] | None = None,
    ) -> None:
        super().__init__(self._whole, dtype=dtype, shape=ir.Shape(shape), name=name)
        if origins is None:
            origins = [Origin(name, expert) for expert in range(stack_height(shape))]
        self.origins = tuple(origins)
        self.blocks = len(self.origins)
        self.read_block = read_block

    def _whole(self) -> ir.Tensor[np.ndarray]:
        blocks = [self.read_block(index).reshape(-1) for index in range(self.blocks)]
        return ir.Tensor(np.concatenate(blocks).reshape(self.shape.numpy()), name=self.name)


def rearrange(
    value: ir.Value,
    change: Callable[[ReadBlock], ReadBlock],
    shape: tuple[int, ...],
    *,
    backwards: bool = False,
) -> None:
    """Store a weight in another layout, of ``shape``; it stays unread.

    Args:
        value: the weight.
        change: how a block is read now -> how it is read from here on.
        shape: with as many blocks as before.
        backwards: whether the change puts the last block first.

    Precondition: the weight has one use, which knows of the change.
    """
    before = value.const_value
    assert isinstance(before, Weight), f"{value.name} is no weight of the checkpoint"
    assert len(value.uses()) == 1 and value.name is not None
    value.shape = ir.Shape(shape)
    origins = before.origins[::-1] if backwards else before.origins
    value.const_value = Weight(value.name, shape, before.dtype, change(before.read_block), origins)


def scale(value: ir.Value, factor: float) -> None:
    """Store a weight multiplied by a factor; every use of it must account for that."""
    before = value.const_value
    assert isinstance(before, Weight) and value.name is not None
    shape = tuple(before.shape.numpy())
    read = before.read_block

    def scaled(block: int) -> np.ndarray:
        array = read(block)
        # In float32, and rounded once, whatever the precision.
        return np.asarray(array.astype(np.float32) * np.float32(factor), dtype=array.dtype)

    value.const_value = Weight(value.name, shape, before.dtype, scaled, before.origins)


class WeightsToInitializers(GraphPass):
    """Turns the graph inputs that stand for weights into initializers read from the checkpoint.

    A weight that nothing reads is refused wherever the pass runs: the export would lack it.

    Args:
        prefix: of the names of the inputs that are weights.
        read: name and block -> that block of the weight.
    """

    keeps_interface = False

    def __init__(self, prefix: str, read: Callable[[str, int], torch.Tensor]) -> None:
        super().__init__()
        self.prefix = prefix
        self.read = read

    def requires(self, model: ir.Model) -> None:
        for value in model.graph.inputs:
            if (value.name or "").startswith(self.prefix):
                static = value.shape is not None and value.shape.is_static()
                self.require(static, value, f"is a weight of shape {value.shape}")
                name = (value.name or "").removeprefix(self.prefix)
                free = name not in model.graph.initializers
                self.require(free, value, "is a weight whose name an initializer has")

    def _read(self, name: str, block: int) -> np.ndarray:
        tensor = self.read(name, block)
        if tensor.dtype == torch.bfloat16:
            # numpy has no bfloat16 of its own; ml_dtypes gives it one.
            return tensor.view(torch.int16).numpy().view(ir.DataType.BFLOAT16.numpy())
        return tensor.numpy()

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        weights = [v for v in graph.inputs if (v.name or "").startswith(self.prefix)]
        for value in weights:
            name = (value.name or "").removeprefix(self.prefix)
            assert value.uses(), f"the graph never uses the weight {name}"
            assert value.shape is not None and value.dtype is not None
            graph.inputs.remove(value)
            value.name = name
            shape = tuple(value.shape.numpy())
            value.const_value = Weight(name, shape, value.dtype, partial(self._read, name))
            graph.register_initializer(value)
        return ir.passes.PassResult(model, modified=bool(weights))

    def ensures(self, model: ir.Model) -> None:
        for value in model.graph.inputs:
            is_weight = (value.name or "").startswith(self.prefix)
            self.ensure(not is_weight, value, "is still an input")
        for value in model.graph.initializers.values():
            stored = value.const_value
            same = not isinstance(stored, Weight) or stored.shape == value.shape
            self.ensure(same, value, f"is {value.shape} and stored in another shape")


class FoldWeightTransposes(GraphPass):
    """Stores a linear layer's weight transposed, as MatMul wants it, instead of at each load.

    A weight with other uses, such as a tied embedding, keeps its layout and its Transpose.
    """

    looks_for = ("Transpose",)

    def requires(self, model: ir.Model) -> None:
        for node in filter(_turns_own_weight, model.graph):
            weight = node.inputs[0]
            assert weight is not None
            unread = isinstance(weight.const_value, Weight)
            self.require(unread, weight, "is transposed and no weight of the checkpoint")
            perm = list(node.attributes.get_ints("perm", [1, 0]))
            matrix = perm == [1, 0] and len(weight.shape or ()) == 2
            self.require(matrix, node, f"does not turn a matrix but {weight.shape} by {perm}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if not _turns_own_weight(node):
                continue
            weight = node.inputs[0]
            assert weight is not None and weight.shape is not None
            rows, columns = weight.shape.numpy()
            rearrange(weight, _transposed, (columns, rows))
            ir.convenience.replace_all_uses_with(node.outputs[0], weight)
            model.graph.remove(node, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified=modified)

    def ensures(self, model: ir.Model) -> None:
        for node in model.graph:
            self.ensure(not _turns_own_weight(node), node, "turns a weight at each load")


def _turns_own_weight(node: ir.Node) -> bool:
    """Whether it transposes an initializer that nothing else reads."""
    weight = node.inputs[0] if node.op_type == "Transpose" else None
    return weight is not None and weight.is_initializer() and len(weight.uses()) == 1


def _transposed(read: ReadBlock) -> ReadBlock:
    def transposed(block: int) -> np.ndarray:
        array = read(block)
        # torch's copy of a transposed view is four times as fast as numpy's; it has numpy's
        # integers, and not ml_dtypes' bfloat16.
        bits = torch.from_numpy(array.view(f"i{array.itemsize}"))
        return bits.T.contiguous().numpy().view(array.dtype)

    return transposed
