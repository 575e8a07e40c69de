"""One recipe from a checkpoint to the graph of a target.

The export writes this graph, and a validation holds an ingot's graph against it. So both go through
here: what one of them did otherwise would look like a fault of the ingot.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import onnx_ir as ir
import torch
from onnx_ir.passes.common import NameFixPass

from ingot.export.capture import Captured
from ingot.export.capture import capture as trace
from ingot.export.codecs.blocks import Blocks
from ingot.export.codecs.coder import Coder, Nearest, blocks_of
from ingot.export.codecs.given import Given, quantization_of
from ingot.export.ingot_schema import CHECKPOINT, INGOT, ORT, PORTABLE
from ingot.export.lower_ort import lower_ingot, lower_ort, lower_portable
from ingot.export.lower_trt import lower_trt
from ingot.export.passes.fuse import FuseLinears, FuseMlps, FuseResiduals
from ingot.export.passes.graph_pass import Applied, run
from ingot.export.passes.moe_apart import ExpertsApart
from ingot.export.passes.pack import PackMatrices
from ingot.export.passes.quantise import QuantiseMatrices
from ingot.export.passes.quantise_experts import QuantiseExperts, has_no_kernel
from ingot.export.passes.store import StoreNarrow
from ingot.export.progress import Stages
from ingot.export.quantization import BITS, UNCHANGED, Quantization
from ingot.export.request import ExportError, scales_of
from ingot.graphs.checkpoint import (
    Checkpoint,
    WeightMap,
    block_reader,
    parts_of,
    stack_height,
)
from ingot.graphs.coded import Coded, Form
from ingot.graphs.family import Family, family_of
from ingot.graphs.layers import Model
from ingot.graphs.quantised import coded_reader, forms
from ingot.plugins.cpu.panels import EXACT, TO_BFLOAT16, TO_INT8

# Of the signature of ``ingot.export.capture.capture``.
Capture = Callable[..., Captured]


class Lowering(NamedTuple):
    """Passes for one target: the name of what runs the graph, and the change of it in place.

    That tells what each pass did.
    """

    runtime: str
    lower: Callable[[ir.Model], tuple[Applied, ...]]


ONNX_NAMES = {
    "float64": "DOUBLE",
    "float32": "FLOAT",
    "float16": "FLOAT16",
    "bfloat16": "BFLOAT16",
}
# By target, execution provider and whose kernels; None where the canonical graph is what is
# delivered.
LOWERINGS: dict[tuple[str, str, str], Lowering | None] = {
    ("onnx", "", ""): None,
    ("ort", "cpu", ORT): Lowering("ONNX Runtime", lower_ort),
    ("ort", "cpu", PORTABLE): Lowering("standard operators", lower_portable),
    ("ort", "cpu", INGOT): Lowering("Ingot's kernels", lower_ingot),
    ("trt", "", ""): Lowering("TensorRT", lower_trt),
    ("trt-rtx", "", ""): Lowering("TensorRT", lower_trt),
}


def check_outputs(family: Family, extra_outputs: Iterable[str]) -> None:
    """Refuse an output that a family does not have.

    Raises:
        ExportError: naming it, and those there are.
    """
    for name in extra_outputs:
        if name not in family.extra_outputs:
            raise ExportError(
                f"{family.model_type} has no {name}; it has: {', '.join(family.extra_outputs)}."
            )


class Opened(NamedTuple):
    """An opened checkpoint.

    Attributes:
        family: its family.
        model: on the meta device.
        read: its weights by name and block.
        stored: by the name of a weight of a graph, the widest dtype that the checkpoint has for it,
            by PyTorch's name.
        coded: by name and block, the whole numbers of a weight that is stored in them.
        forms: how those are stored, by name.
    """

    family: Family
    model: Model
    read: Callable[[str, int], torch.Tensor]
    stored: Callable[[str], str]
    coded: Callable[[str, int], Sequence[Coded]]
    forms: Callable[[], Mapping[str, Sequence[Form]]]


@dataclass(frozen=True)
class Recipe:
    """What decides a graph, beside the checkpoint.

    Attributes:
        target: of ``export.ingot.TARGETS``.
        task: of ``export.request.TASKS``.
        precision: of the weights and activations, by PyTorch's name.
        extra_outputs: of ``export.request.EXTRA_OUTPUTS``.
        weights: what matrices are stored in, of ``export.ingot_schema.STORED``; the precision where
            it is empty.
        quantization: where that is whole numbers.
        kernels: of the target ort, whose run it, of ``export.request.KERNELS`` but ``auto``.
        activations: ``bfloat16`` where products with weights of it may round their activations to
            it; else empty.
    """

    target: str
    task: str
    precision: str
    extra_outputs: tuple[str, ...] = ()
    weights: str = ""
    quantization: Quantization | None = None
    kernels: str = ORT
    activations: str = ""

    @property
    def provider(self) -> str:
        """ONNX Runtime's execution provider; empty for a target without a choice of them."""
        return "cpu" if self.target == "ort" else ""

    @property
    def dtype(self) -> torch.dtype:
        """The precision, for PyTorch."""
        dtype: torch.dtype = getattr(torch, self.precision)
        return dtype

    def as_given(self, opened: Opened, accuracy: str | None) -> Recipe:
        """This recipe for whole numbers that are the checkpoint's; itself where it has none.

        Args:
            opened: the checkpoint.
            accuracy: of the kernels; None for the usual one.

        Raises:
            ExportError: numbers that no format of the runtime's has.
        """
        found = opened.forms()
        if not found:
            return self
        plain = [
            name
            for name, parameter in opened.model.named_parameters()
            if _is_matrix(tuple(parameter.shape)) and name not in found
        ]
        weights, chosen = quantization_of(found, plain, accuracy)
        chosen = replace(chosen, scales=scales_of(self.kernels))
        return replace(self, weights=weights, quantization=chosen)

    def coder(self, opened: Opened) -> Coder | None:
        """What chooses the numbers of the format; None of weights in floats.

        It rounds weights to the nearest of them, or has the checkpoint's own.
        """
        chosen = self.quantization
        if chosen is None:
            return None

        usual, others = BITS[self.weights], dict[str, Blocks | None]()
        for name in {**chosen.bits, **chosen.blocks}:
            bits, size = chosen.bits.get(name, usual), chosen.blocks.get(name)
            others[name] = None if bits == UNCHANGED else blocks_of(chosen, bits, size)
        nearest = Nearest(blocks_of(chosen, usual), others)
        return Given(nearest.format, opened.coded) if chosen.method == "given" else nearest

    def open(self, checkpoint: Checkpoint) -> Opened:
        """The model that is captured, and where its weights are; none is read.

        Raises:
            IngotError: a config or a task that the family does not implement, an output that it
                does not have, or tensors that are missing, extra or misshapen.
        """
        family = family_of(checkpoint)
        check_outputs(family, self.extra_outputs)
        model = family.build(checkpoint.config, self.task, self.dtype, checkpoint.entries)
        weight_map = family.weight_map(model, checkpoint, self.task)
        return Opened(
            family,
            model,
            block_reader(checkpoint, weight_map, model),
            partial(_stored, checkpoint, weight_map),
            coded_reader(checkpoint, weight_map, model),
            partial(forms, checkpoint, weight_map, model),
        )

    def stored_bytes(self, opened: Opened) -> int:
        """What the weights take on a disk, to a few per cent."""
        coder = self.coder(opened)
        return round(
            sum(
                parameter.numel() * self._stored_bits(opened, coder, name, parameter) / 8
                for name, parameter in opened.model.named_parameters()
            )
        )

    def _stored_bits(
        self, opened: Opened, coder: Coder | None, name: str, parameter: torch.nn.Parameter
    ) -> float:
        """Bits of one number of a parameter."""
        if self.weights and parameter.dim() > 1:
            blocks = None if coder is None else coder.format(name)
            if blocks is not None:
                return blocks.bits_per_weight
            if coder is None:
                dtype = opened.stored(name) if self.weights == CHECKPOINT else self.weights
                if self.kernels == INGOT and dtype == "float16":
                    dtype = "float32"
                narrow: torch.dtype = getattr(torch, dtype)
                return 8 * min(narrow.itemsize, parameter.element_size())
        return 8 * parameter.element_size()

    def graph(
        self,
        opened: Opened,
        stages: Stages | None = None,
        capture: Capture | None = None,
        *,
        coder: Coder | None = None,
        again: bool = False,
    ) -> Captured:
        """The graph, lowered for the target, its weights unread.

        Args:
            opened: the checkpoint, by ``open``.
            stages: shows the steps.
            capture: traces the model, ``export.capture.capture`` by default.
            coder: chooses the whole numbers of weights, ``self.coder(opened)`` by default.
            again: whether it is made to hold an ingot's graph against it.
        """
        stages, suffix = stages or Stages(), " again" * again
        coder = coder or self.coder(opened)
        with stages.stage(f"capture graph{suffix}"):
            captured = (capture or trace)(
                opened.model,
                opened.read,
                precision=self.dtype,
                extra_outputs=self.extra_outputs,
                exact_matrices=bool(self.weights),
            )
        lowering = LOWERINGS[self.target, self.provider, self.kernels if self.provider else ""]
        if lowering is None:
            stored = self._store(captured.model, opened, coder)
            return replace(captured, passes=(*captured.passes, *stored))
        canonical = operators(captured.model)
        with stages.stage(f"lower to {lowering.runtime}{suffix}"):
            applied = self._taken_apart(captured.model, coder)
            applied += lowering.lower(captured.model)
            stored = self._store(captured.model, opened, coder)
        return replace(captured, canonical=canonical, lowering=(*applied, *stored))

    def _taken_apart(self, model: ir.Model, coder: Coder | None) -> tuple[Applied, ...]:
        """Experts in whole numbers for which ONNX Runtime has no kernel that is asked for."""
        if self.quantization is None or coder is None or self.kernels == INGOT:
            return ()
        exact = self.quantization.accuracy == "exact"
        return run(model, [ExpertsApart(partial(has_no_kernel, coder, exact))])

    def _store(self, model: ir.Model, opened: Opened, coder: Coder | None) -> tuple[Applied, ...]:
        """Store the matrices in what is asked for, in whatever layout they have by then."""
        if self.kernels == INGOT:
            return self._pack(model, opened, coder)
        if not self.weights:
            return ()
        if self.quantization is not None and coder is not None:
            accuracy = self.quantization.accuracy
            passes = [QuantiseExperts(coder, accuracy), QuantiseMatrices(coder, accuracy)]
            # With the checkpoint's own numbers come its own floats.
            given = self.quantization.method == "given"
            others = [StoreNarrow(_dtype_of(opened.stored))] * given
            return run(model, [*passes, *others, NameFixPass()])
        of_checkpoint = self.weights == CHECKPOINT
        dtype_of = _dtype_of(opened.stored if of_checkpoint else lambda _name: self.weights)
        return run(model, [StoreNarrow(dtype_of), NameFixPass()])

    def _pack(self, model: ir.Model, opened: Opened, coder: Coder | None) -> tuple[Applied, ...]:
        """Store the matrices in panels, whose kernels read each format that they are asked for."""
        how = self.quantization
        given = self.weights == CHECKPOINT or (how is not None and how.method == "given")
        other = self.precision if how is not None or not self.weights else self.weights
        dtype_of = _dtype_of(opened.stored if given else lambda _name: other)
        rounding = TO_BFLOAT16 if self.activations else EXACT
        if how is not None:
            rounding = TO_INT8 if how.accuracy == "fast" else EXACT
        passes = [
            PackMatrices(dtype_of, coder, round_activations=rounding),
            FuseMlps(),
            FuseResiduals(),
            FuseLinears(),
            NameFixPass(),
        ]
        return run(model, passes)


def _dtype_of(stored: Callable[[str], str]) -> Callable[[str], ir.DataType]:
    """PyTorch's name of what a weight is stored in, as ONNX's."""
    return lambda name: ir.DataType[ONNX_NAMES[stored(name)]]


def _is_matrix(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 or stack_height(shape) > 1


def _stored(checkpoint: Checkpoint, weight_map: WeightMap, name: str) -> str:
    dtypes = (checkpoint.dtype(part.name) for part in parts_of(weight_map, name))
    widest = max(dtypes, key=lambda each: each.itemsize)
    return str(widest).removeprefix("torch.")


def operators(model: ir.Model) -> dict[str, int]:
    """How many nodes of each op type a graph has, in the order in which they come first.

    Those inside of branches and loops count too: a kernel may be nowhere else. The function body of
    an operator is part of that operator.
    """
    return dict(Counter(node.op_type for node in model.graph.all_nodes()))
