"""Every stored weight of an ingot held against the checkpoint's tensors.

The comparison is to the bit. What a weight should be is the checkpoint's number in float32, rounded
to the nearest number of the dtype it is stored in; where the graph has a factor in its weights,
that times the factor in float32 and rounded again, once for each factor. (A float64 checkpoint is
so rounded twice in half precision, as PyTorch rounds it.) The layout follows from the operator that
reads the weight, the factors from ``config.json``.

Nothing here comes from the export, or from what the eager graph reads its weights with: a fault in
those shows as a difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ingot.export.ingot import Manifest
from ingot.export.progress import Advance, Stages
from ingot.graphs.checkpoint import Checkpoint
from ingot.graphs.names import ALIASES, RELEASED
from ingot.plugins.errors import named
from ingot.validate.identity.weights_compare import (
    BLOCK,
    Difference,
    Plain,
    Source,
    compare,
    shape_in,
)
from ingot.validate.identity.weights_factors import factors
from ingot.validate.identity.weights_files import (
    FileFormatError,
    Reader,
    Tensor,
    read_checkpoint,
    read_header,
    read_object,
)
from ingot.validate.identity.weights_graph import Graph, LayoutError, Weight
from ingot.validate.identity.weights_names import (
    EMBEDDINGS,
    HEAD,
    HEADS,
    bare,
    buffer,
    layer_of,
    make,
    spellings,
)
from ingot.validate.result import Check, Location

CHECK = "weights"
GRAPH = "model.onnx"
# What is float32 in every precision: the exponents of a scan's decay, and what is added beside it.
ALWAYS_FLOAT32 = (".A_log", ".D", ".dt_bias")
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# Half a unit in the last place of 1, by dtype: what one rounding may change.
HALF_UNIT = {"F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}
# Sentences that a report has room for.
MOST_PROBLEMS = 20


@dataclass
class _Found:
    """What one comparison found so far.

    Attributes:
        compared: how many weights.
        problems: in one sentence each.
        location: of the first.
        unknown: why some weights could not be compared.
        read: names of the checkpoint's tensors that some weight was compared with.
    """

    compared: int = 0
    problems: list[str] = field(default_factory=list)
    location: Location | None = None
    unknown: list[str] = field(default_factory=list)
    read: set[str] = field(default_factory=set)

    def wrong(self, name: str, operator: str, sentence: str, ratio: float = float("inf")) -> None:
        """A problem with a weight, and where it is."""
        layer = layer_of(name)
        where = f"layer {layer}, " if layer is not None else ""
        self.problems.append(f"{where}{named(name)}: {sentence}")
        if self.location is None:
            self.location = Location(layer, operator, name, ratio)

    def check(self) -> Check:
        """All of it."""
        problems = self.problems[:MOST_PROBLEMS]
        more = len(self.problems) - len(problems)
        if more:
            problems.append(f"{more} more of the kind")
        return Check(
            CHECK, self.compared, tuple(problems), self.location, "; ".join(self.unknown[:3])
        )


@dataclass
class Weights:
    """An ingot and the checkpoint that its weights should come from.

    Attributes:
        ingot: its folder.
        checkpoint: its folder.
        model_type: of both.
        task: of the ingot.
        precision: of the ingot, by PyTorch's name.
    """

    ingot: Path
    checkpoint: Path
    model_type: str
    task: str
    precision: str

    @cached_property
    def config(self) -> dict[str, Any]:
        """The checkpoint's ``config.json``."""
        return read_object(self.checkpoint / "config.json")

    @cached_property
    def stored(self) -> dict[str, Tensor]:
        """Tensors of the checkpoint, by name."""
        return read_checkpoint(self.checkpoint)

    @cached_property
    def graph(self) -> Graph:
        """The ingot's."""
        return Graph.read(self.ingot, GRAPH)

    @property
    def described(self) -> bool:
        """Whether the names and factors of its architecture are those that are known here."""
        return ALIASES.get(self.model_type, self.model_type) in RELEASED

    @cached_property
    def tied(self) -> bool:
        """Whether the head is the embedding, by the config or else by what is stored."""
        said = self._said_tied
        # Defaults differ by architecture. Where one is stored, it is both, or it would be missing.
        return HEAD not in self.stored or len(self._tables) == 0 if said is None else said

    @property
    def _said_tied(self) -> bool | None:
        # mamba_ssm has another name for it.
        said = [self.config.get(name) for name in ("tie_word_embeddings", "tie_embeddings")]
        return next((each for each in said if isinstance(each, bool)), None)

    @property
    def _tables(self) -> list[str]:
        """The names of the embedding in the checkpoint; at most one."""
        names = [each for table in EMBEDDINGS for each in spellings(table, tied=False)]
        return [name for name in dict.fromkeys(names) if name in self.stored]

    def compare(self, advance: Advance) -> Check:
        """Hold every weight against the checkpoint.

        Args:
            advance: told the bytes that were compared.
        """
        found = _Found()
        with Reader() as reader:
            try:
                found.problems += self._disagreements()
                self._weights(found, Plain(reader), reader, advance)
                self._unread(found, reader)
            except FileFormatError as error:
                found.problems.append(str(error).removesuffix("."))
        return found.check()

    @cached_property
    def _factors(self) -> dict[str, tuple[np.float32, ...]]:
        return factors(self.graph, self.config)

    def _weights(self, found: _Found, source: Source, reader: Reader, advance: Advance) -> None:
        for name, weight in self.graph.weights.items():
            made = make(name, self.stored, self.tied)
            readers = self.graph.readers(name)
            operator = readers[0].node.op_type if readers else "no operator"
            if made is None:
                # Numbers inside of the graph file are constants of its own.
                if weight.external is not None:
                    self._nameless(found, name, operator)
                continue
            found.compared += 1
            found.read |= {part.tensor.name for part in made.parts}
            tensor = weight.tensor
            try:
                layout = self.graph.layout(name)
            except LayoutError as error:
                found.wrong(name, operator, str(error))
                continue
            dtype = "F32" if name.endswith(ALWAYS_FLOAT32) else DTYPES.get(self.precision)
            shape = shape_in(layout, made)
            if tensor.dtype != dtype:
                found.wrong(name, operator, f"it is stored as {tensor.dtype} and should be {dtype}")
            if tensor.shape != shape:
                found.wrong(
                    name,
                    operator,
                    f"it is stored as {list(tensor.shape)} and should be {list(shape)}",
                )
                continue
            folded = self._factors.get(name, ())
            for each in compare(tensor, made, layout, folded, source, reader, advance):
                self._different(found, name, operator, tensor.dtype, each)

    def _nameless(self, found: _Found, name: str, operator: str) -> None:
        sentence = "the checkpoint has no tensors of this name"
        if self.described:
            found.wrong(name, operator, sentence)
        else:
            found.unknown.append(f"no rule says what {named(name)} of this architecture is made of")

    def _different(
        self, found: _Found, name: str, operator: str, dtype: str, difference: Difference
    ) -> None:
        ratio = difference.error / HALF_UNIT[dtype]
        factor = difference.factor
        whole = "" if factor is None else f"; all are {factor:.6g} times what they should be"
        if factor is not None and not self.described and factor != 1.0:
            found.unknown.append(
                f"{named(name)} is the checkpoint's times {factor:.6g}, and no rule says why"
            )
            return
        same = difference.tensor.name == name
        of = "" if same else f" (stored in {named(name)})"
        found.wrong(difference.tensor.name, operator, f"{difference}{whole}{of}", ratio)
        if found.location is not None and found.location.value == difference.tensor.name:
            layer = layer_of(name)
            found.location = Location(layer, operator, name, found.location.ratio)

    def _disagreements(self) -> Iterator[str]:
        """Where the graph and the file beside it say different things of the same bytes."""
        external = [each for each in self.graph.weights.values() if each.external is not None]
        headers = {}
        for location in sorted({each.external.location for each in external if each.external}):
            if Path(location).name != location or not (self.ingot / location).is_file():
                raise FileFormatError(f"{GRAPH} has weights in {named(location)}; export it again.")
            headers[location] = read_header(self.ingot / location)
        for weight in external:
            yield from _disagreement(weight, headers)
        for location, header in headers.items():
            used = {each.tensor.name for each in external}
            for name in header.keys() - used:
                yield f"{location} holds {named(name)}, which the graph does not use"
            end = last = None
            for tensor in sorted(header.values(), key=lambda each: each.begin):
                if end is not None and tensor.begin < end:
                    yield f"{location}: {named(tensor.name)} overlaps {named(last or '')}"
                end, last = tensor.begin + tensor.nbytes, tensor.name

    def _unread(self, found: _Found, reader: Reader) -> None:
        """Tensors of the checkpoint that no weight was compared with, and should have been."""
        for name, tensor in self.stored.items():
            if name in found.read or buffer(tensor) is not None:
                continue
            if HEADS.get(bare(name), self.task) != self.task:
                continue
            twin = self._twin(name)
            if twin is None or twin.name not in found.read:
                found.problems.append(
                    f"{named(name)} of the checkpoint is in no weight of the graph"
                )
            elif not _same(reader, tensor, twin):
                found.problems.append(
                    f"{named(name)} of the checkpoint is in no weight of the graph, and is not "
                    f"equal to {twin.name}, which the graph has in its place"
                )

    def _twin(self, name: str) -> Tensor | None:
        """The tensor that a tied one repeats."""
        if self._said_tied is False or name not in (HEAD, *self._tables):
            return None
        other = self._tables[:1] if name == HEAD else [HEAD]
        return next((self.stored[each] for each in other if each in self.stored), None)


def _disagreement(weight: Weight, headers: Mapping[str, Mapping[str, Tensor]]) -> Iterator[str]:
    tensor, external = weight.tensor, weight.external
    assert external is not None
    entry = headers[external.location].get(tensor.name)
    if entry is None:
        yield f"{external.location} has no {named(tensor.name)}, which the graph has there"
        return
    length = tensor.nbytes if external.length is None else external.length
    for what, says, holds in (
        ("dtype", tensor.dtype, entry.dtype),
        ("shape", list(tensor.shape), list(entry.shape)),
        ("first byte", external.offset, entry.begin),
        ("length", length, entry.nbytes if entry.dtype == tensor.dtype else length),
    ):
        if says != holds:
            yield (
                f"{named(tensor.name)}: its {what} is {says} in the graph and {holds} in "
                f"{external.location}"
            )


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


class Subject(Protocol):
    """What is checked; see ``checks.Subject``, which is one."""

    folder: Path
    manifest: Manifest
    checkpoint: Checkpoint
    stages: Stages


def check_weights(subject: Subject) -> Check:
    """Hold every stored weight of an ingot against its checkpoint.

    Args:
        subject: the ingot and its checkpoint; nothing of it is captured.
    """
    manifest = subject.manifest
    base, *adapters = subject.checkpoint.folders
    if adapters:
        return Check(CHECK, 0, left_out="an adapter is merged into them")
    weights = Weights(subject.folder, base, manifest.model_type, manifest.task, manifest.precision)
    total = sum(weight.tensor.nbytes for weight in weights.graph.weights.values())
    with subject.stages.stage("compare the weights", total) as advance:
        return weights.compare(advance)
