"""Every stored weight of an ingot held against the checkpoint's tensors.

The comparison is to the bit, but for what is stored in blocks of whole numbers, which is held to
what rounding explains (``weights_rounding``). What another weight should be is the checkpoint's
number in float32, rounded to the nearest number of the dtype it is stored in, which is that of the
precision, and of matrices what ``weights`` of ``ingot.json`` says; where the graph has a factor in
its weights, that times the factor in float32 and rounded again, once for each factor. (A float64
checkpoint is so rounded twice in half precision, as PyTorch rounds it.) The layout follows from the
operator that reads the weight, the factors from ``config.json``.

Nothing here comes from the export, or from what the eager graph reads its weights with: a fault in
those shows as a difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from ingot.export.progress import Advance
from ingot.graphs.names import ALIASES, RELEASED
from ingot.plugins.cpu.operators import DOMAIN as PANELS
from ingot.plugins.errors import named
from ingot.validate.identity.subject import Subject
from ingot.validate.identity.weights_blocks import PLACES, blocked, is_side
from ingot.validate.identity.weights_checkpoint import Tensors
from ingot.validate.identity.weights_compare import BLOCK, Source, compare, shape_in
from ingot.validate.identity.weights_factors import factors
from ingot.validate.identity.weights_files import FileFormatError, Reader, Tensor
from ingot.validate.identity.weights_found import Found
from ingot.validate.identity.weights_graph import Graph, Layout, LayoutError, Weight
from ingot.validate.identity.weights_header import disagreements
from ingot.validate.identity.weights_names import (
    HEAD,
    HEADS,
    OF_ONE_EXPERT,
    Made,
    bare,
    buffer,
    is_embedding,
)
from ingot.validate.identity.weights_panels import panels
from ingot.validate.identity.weights_piece import Numbers
from ingot.validate.identity.weights_rounding import Format, compare_blocks, filling_is_zero
from ingot.validate.result import Check

GRAPH = "model.onnx"
# What is float32 in every precision: the exponents of a scan's decay, and what is added beside it.
ALWAYS_FLOAT32 = (".A_log", ".D", ".dt_bias")
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
CHECKPOINT = "checkpoint"
GIVEN = "given"
# Bits of what is stored in blocks of whole numbers, and the operators whose matrices are.
INTEGERS = {"int4": 4, "int8": 8}
IN_BLOCKS = frozenset({"MatMul", "Gemm", "FusedMatMul", "MoE", "Gather", *PLACES})


class Quantization(Protocol):
    """What ``quantization`` of ``ingot.json`` says.

    Attributes:
        block: numbers of a block, where ``blocks`` has no other number.
        symmetric: whether it has no zero points.
        method: how numbers were chosen.
        bits: of the weights that have others than ``weights`` says, by name.
        blocks: numbers of a block, of the weights that have others, by name.
    """

    @property
    def block(self) -> int: ...
    @property
    def symmetric(self) -> bool: ...
    @property
    def method(self) -> str: ...
    @property
    def bits(self) -> Mapping[str, int]: ...
    @property
    def blocks(self) -> Mapping[str, int]: ...


@dataclass
class Weights:
    """An ingot and the checkpoint that its weights should come from.

    Attributes:
        graph: the ingot's.
        ingot: its folder.
        tensors: the checkpoint's.
        task: of the ingot.
        precision: of the ingot, by PyTorch's name.
        stored: what its matrices are stored in, as ``weights`` of ``ingot.json`` has it.
        quantization: of ``ingot.json``, where that is in blocks of whole numbers.
    """

    graph: Graph
    ingot: Path
    tensors: Tensors
    task: str
    precision: str
    stored: str = ""
    quantization: Quantization | None = None

    def compare(self, found: Found, advance: Advance) -> None:
        """Hold every weight against the checkpoint.

        Args:
            found: takes what is wrong.
            advance: told the bytes that were compared.
        """
        with Reader() as reader:
            try:
                found.problems += disagreements(self.graph, self.ingot)
                source = self.tensors.source(reader)
                for name, weight in self.graph.weights.items():
                    made = self.tensors.make(name)
                    if is_side(self.graph, name):
                        # Compared with the numbers that they belong to.
                        continue
                    if made is not None:
                        self._weight(found, weight, made, source, reader, advance)
                    # Numbers inside of the graph file are constants of its own.
                    elif weight.external is not None:
                        found.nameless(name, self._operator(name))
                self._unread(found, reader)
            except FileFormatError as error:
                found.problems.append(str(error).removesuffix("."))

    @cached_property
    def _factors(self) -> dict[str, tuple[np.float32, ...]]:
        return factors(self.graph, self.tensors.config)

    def _operator(self, name: str) -> str:
        readers = self.graph.readers(name)
        return readers[0].node.op_type if readers else "no operator"

    def _weight(
        self,
        found: Found,
        weight: Weight,
        made: Made,
        source: Source,
        reader: Reader,
        advance: Advance,
    ) -> None:
        """Hold one weight against what it is made of."""
        tensor = weight.tensor
        name, operator = tensor.name, self._operator(tensor.name)
        found.compared += 1
        found.read |= {part.tensor.name for part in made.parts}
        given = self._format(name, made)
        try:
            layout, in_blocks = self.graph.layout(name), blocked(self.graph, name)
            in_panels = panels(self.graph, name)
        except LayoutError as error:
            found.wrong(name, operator, str(error))
            return
        if is_embedding(made.parameter) and HEAD not in self.graph.weights:
            found.parameters.add(HEAD)
        if in_panels is not None and not in_panels.ends_in_zeros(reader):
            found.wrong(name, operator, "what its last panels are filled up with is not zero")
        if given is not None and in_blocks is not None:
            self._blocks(found, in_blocks, made, layout, given, source, reader, advance)
            return
        if in_blocks is not None or given is not None:
            packed = in_panels or in_blocks
            has = tensor.dtype if packed is None else packed.text
            wanted = self._dtype(name, made) if given is None else given.text
            found.wrong(name, operator, f"it is stored as {has} and should be {wanted}")
            return
        if in_panels is not None:
            tensor = in_panels.floats()
        dtype = self._dtype(name, made)
        if tensor.dtype != dtype:
            found.wrong(name, operator, f"it is stored as {tensor.dtype} and should be {dtype}")
        shape = shape_in(layout, made)
        if tensor.dtype not in SIZES:
            return
        if tensor.shape != shape:
            sizes = f"{list(tensor.shape)} and should be {list(shape)}"
            found.wrong(name, operator, f"it is stored as {sizes}")
            return
        folded = self._factors.get(name, ())
        for what in self._roles(made):
            found.parameters.add(what.parameter)
            for each in compare(tensor, what, layout, folded, source, reader, advance):
                found.different(name, operator, each)

    def _blocks(
        self,
        found: Found,
        weight: Numbers,
        made: Made,
        layout: Layout,
        given: Format,
        source: Source,
        reader: Reader,
        advance: Advance,
    ) -> None:
        """Hold one weight in blocks against what it is made of, within what rounding explains."""
        name, operator = weight.codes.name, self._operator(weight.codes.name)
        if (text := weight.text) != given.text:
            found.wrong(name, operator, f"it is stored as {text} and should be {given.text}")
            given = replace(given, bits=weight.bits, size=weight.size)
            given = replace(given, symmetric=not weight.has_zero_points)
        wanted, has = made.matrices, (weight.matrices, weight.rows, weight.columns)
        # What no whole blocks fill is filled up, where a node cannot say how much of it counts.
        most = wanted[0], wanted[1] + 2 * weight.size - 1, weight.blocks * weight.size
        blocks = -(-wanted[2] // weight.size)
        if blocks != weight.blocks or any(
            not low <= size <= high for low, size, high in zip(wanted, has, most, strict=True)
        ):
            sizes = f"{list(has)} and should be {list(wanted)}"
            found.wrong(name, operator, f"its matrices, rows and columns are {sizes}")
            return
        if not filling_is_zero(weight, made, reader):
            found.wrong(name, operator, "the rows that it is filled up with are not zero")
        for what in self._roles(made):
            found.parameters.add(what.parameter)
            for each in compare_blocks(weight, what, layout, given, source, reader, advance):
                found.wrong(name, operator, str(each), each.ratio, each.tensor.name)

    def _format(self, name: str, made: Made) -> Format | None:
        """How a weight should be stored in blocks; None where it should not be."""
        bits, how = INTEGERS.get(self.stored), self.quantization
        uses = self.graph.readers(name)
        reads = self._in_panels(name) or any(use.node.op_type in IN_BLOCKS for use in uses)
        if bits is None or how is None or not self._matrix(name, made) or not reads:
            return None
        one = OF_ONE_EXPERT.fullmatch(name)
        stack = one["stack"] if one else name
        own = how.bits.get(name, how.bits.get(stack, bits))
        block = how.blocks.get(name, how.blocks.get(stack, how.block))
        return Format(own, block, how.symmetric, how.method) if own in (4, 8) else None

    def _matrix(self, name: str, made: Made) -> bool:
        """Whether it is a matrix, a stack of them or a table, and no router's."""
        # The kernel of a convolution has an axis of 1; what is of a router decides by little.
        shaped = len(made.shape) >= 2 and 1 not in made.shape[1:]
        return shaped and not name.endswith(ALWAYS_FLOAT32) and not self.graph.routes(name)

    def _dtype(self, name: str, made: Made) -> str | None:
        """What a weight should be stored in, where that is one number by itself."""
        if name.endswith(ALWAYS_FLOAT32):
            return "F32"
        own = DTYPES.get(self.precision)
        # With a checkpoint's own whole numbers come its own floats.
        given = self.quantization is not None and self.quantization.method == GIVEN
        of_checkpoint = self.stored == CHECKPOINT or given
        in_numbers = self.stored in INTEGERS and not given
        if not self.stored or in_numbers or not self._matrix(name, made):
            return own
        if not of_checkpoint:
            return DTYPES.get(self.stored)
        if made.parameter in self.tensors.changes:
            # What an adapter makes of it is a sum in float32.
            return own
        widest = max((part.tensor.dtype for part in made.parts), key=SIZES.__getitem__)
        if widest == "F16" and self._in_panels(name):
            # Which have no half precision, and whose float32 has each of its numbers.
            return "F32"
        return widest if SIZES[widest] < SIZES["F32"] else own

    def _in_panels(self, name: str) -> bool:
        """Whether kernels of Ingot's own read a weight."""
        return any(use.node.domain == PANELS for use in self.graph.readers(name))

    def _roles(self, made: Made) -> Iterator[Made]:
        """A weight, and where it is a tied head as well, that head."""
        yield made
        changes = self.tensors.changes
        of_head = changes.get(HEAD)
        shared = self.task == "generate" and HEAD not in self.graph.weights
        other = of_head is not changes.get(made.parameter)
        if shared and of_head and other and is_embedding(made.parameter):
            yield replace(made, parameter=HEAD)

    def _unread(self, found: Found, reader: Reader) -> None:
        """Tensors that no weight was compared with, and should have been."""
        for name, tensor in self.tensors.stored.items():
            if tensor.name in found.read or buffer(tensor) is not None or self._needless(name):
                continue
            twin = self.tensors.twin(name)
            if twin is None or twin.name not in found.read:
                found.missing(name, "of the checkpoint")
            elif not _same(reader, tensor, twin):
                found.problems.append(
                    f"{named(name)} of the checkpoint is in no weight of the graph, and is not "
                    f"equal to {twin.name}, which the graph has in its place"
                )
        for parameter, changes in self.tensors.changes.items():
            if parameter not in found.parameters and not self._needless(parameter):
                for tensor in (each for change in changes for each in change.roles.values()):
                    found.missing(tensor.name, "of the adapter")
        for name in self.tensors.placeless:
            found.missing(name, "of the adapter")

    def _needless(self, name: str) -> bool:
        """Whether it is of a head that this task leaves aside."""
        return HEADS.get(bare(name), self.task) != self.task


def _same(reader: Reader, one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same, a block at a time."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    for first in range(0, one.size, BLOCK):
        count = min(BLOCK, one.size - first)
        mine, its = (reader.elements(tensor, first, count) for tensor in (one, other))
        if not np.array_equal(mine, its):
            return False
    return True


def check_weights(subject: Subject) -> Check:
    """Hold every stored weight of an ingot against its checkpoint.

    Args:
        subject: the ingot and its checkpoint; nothing of it is captured.

    Raises:
        IngotError: a checkpoint or an adapter that cannot be read.
    """
    manifest = subject.manifest
    base, *adapters = subject.checkpoint.folders
    graph = Graph.read(subject.folder, GRAPH)
    tensors = Tensors(base, adapters[0] if adapters else None, tuple(graph.weights))
    precision, stored = manifest.precision, manifest.weights
    how = manifest.quantization
    weights = Weights(graph, subject.folder, tensors, manifest.task, precision, stored, how)
    described = ALIASES.get(manifest.model_type, manifest.model_type) in RELEASED
    found = Found(described)
    total = sum(weight.tensor.nbytes for weight in graph.weights.values())
    with subject.stages.stage("compare the weights", total) as advance:
        weights.compare(found, advance)
    return found.check()
