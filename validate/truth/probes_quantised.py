"""Synthetic experts in whole numbers: probes of ``com.microsoft::QMoE``.

The kernel that chooses is asked itself: a probe has the attributes of its node, its logits and its
router weights, and experts of one block each. Whole numbers of a few bits have a one exactly, by a
scale of what it stands for.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

MICROSOFT = "com.microsoft"
PREFIX = "ingot.validate.probe"
# Gate and up of a synthetic expert: every activation is its argument there, to 1e-6, and so the
# product is 1.
GATE, UP = 16.0, 1.0 / 16.0
# Of QMoE's inputs: first and second product, numbers, scales and zero points of each, and what the
# experts' outputs are mixed by.
LOGITS, FC1, FC2, ZEROS = 1, (2, 3, 11), (5, 6, 12), (11, 12)
ROUTER_WEIGHTS = 14
DEFAULT_BITS = 4


def is_quantised(node: onnx.NodeProto) -> bool:
    """Whether its experts are in whole numbers."""
    return (node.domain, node.op_type) == (MICROSOFT, "QMoE")


class Format(NamedTuple):
    """What a node's experts are stored in.

    Attributes:
        bits: of both products.
        block: numbers that share a scale.
        zero_points: whether each product has some.
        interleaved: whether rows of gate and up come in turn.
    """

    bits: tuple[int, int]
    block: int
    zero_points: tuple[bool, bool]
    interleaved: bool

    @classmethod
    def of(cls, node: onnx.NodeProto) -> Format | None:
        """Of a QMoE; None where no synthetic experts are known for it."""
        given = {each.name: each.i for each in node.attribute}
        both = given.get("expert_weight_bits", DEFAULT_BITS)
        first, second = (given.get(f"fc{n}_expert_weight_bits", both) for n in (1, 2))
        block, fusion = given.get("block_size", 0), given.get("swiglu_fusion", 0)
        if not {first, second} <= {4, 8} or block < 16 or fusion not in (1, 2):
            return None
        zeros = [place < len(node.input) and bool(node.input[place]) for place in ZEROS]
        return cls((first, second), block, (zeros[0], zeros[1]), fusion == 1)


class QuantisedExperts:
    """The experts of probes, shared by all of one format that have as many.

    Args:
        model: to which they are added.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self._initializers = model.graph.initializer
        self._inputs: dict[tuple[Format, int], dict[int, str]] = {}

    def probe(
        self, node: onnx.NodeProto, logits: str, experts: int, output: str, kept: list[str]
    ) -> list[onnx.NodeProto]:
        """The nodes of a probe, to be put behind the node that chooses.

        Args:
            node: the one that chooses, of a known format.
            logits: that it is given.
            experts: E.
            output: the name of what the probe gives, ``[N, E]`` float32 with zeros behind.
            kept: takes values that have to be outputs of the graph.
        """
        form = Format.of(node)
        assert form is not None, node.name
        nodes = []
        if (form, experts) not in self._inputs:
            nodes = self._add(form, logits, experts)
            kept.append(self._inputs[form, experts][0])
        names = list(node.input)
        for place in range(len(names)):
            if place not in (LOGITS, ROUTER_WEIGHTS):
                names[place] = self._inputs[form, experts].get(place, "")
        made = helper.make_node(node.op_type, names, [output], domain=node.domain)
        made.attribute.extend(node.attribute)
        return [*nodes, made]

    def _add(self, form: Format, logits: str, experts: int) -> list[onnx.NodeProto]:
        """Experts of one block, and their input, a one in the first place for each token."""
        prefix = f"{PREFIX}.quantised.{len(self._inputs)}"
        hidden, inner = -(-experts // form.block) * form.block, form.block
        gate_up = np.zeros((experts, 2 * inner), np.float32)
        gate_up[:, 0], gate_up[:, 1 if form.interleaved else inner] = GATE, UP
        down = np.eye(experts, hidden, dtype=np.float32)
        names = {0: f"{prefix}.x"}
        products = ((FC1, gate_up, hidden), (FC2, down, inner))
        for number, (places, firsts, columns) in enumerate(products):
            tensors = _in_blocks(firsts, columns, form.block, form.bits[number])
            for place, tensor in zip(places, tensors, strict=True):
                if place in ZEROS and not form.zero_points[number]:
                    continue
                names[place] = f"{prefix}.{place}"
                self._initializers.append(numpy_helper.from_array(tensor, names[place]))
        self._inputs[form, experts] = names
        first = np.zeros((1, hidden), np.float32)
        first[0, 0] = 1
        self._initializers.append(numpy_helper.from_array(first, f"{prefix}.first"))
        width = numpy_helper.from_array(np.array([1], np.int64), f"{prefix}.width")
        self._initializers.append(width)
        return [
            helper.make_node("Shape", [logits], [f"{prefix}.tokens"], start=0, end=1),
            helper.make_node(
                "Concat", [f"{prefix}.tokens", width.name], [f"{prefix}.shape"], axis=0
            ),
            helper.make_node("Expand", [f"{prefix}.first", f"{prefix}.shape"], [names[0]]),
        ]


def _in_blocks(
    firsts: npt.NDArray[np.float32], columns: int, block: int, bits: int
) -> tuple[npt.NDArray[np.generic], ...]:
    """Numbers, scales and zero points of matrices ``[E, rows, columns]``.

    Args:
        firsts: the first column of each, ``[E, rows]``; the others are zero.
        columns: how many there are, a multiple of the block.
        block: numbers that share a scale.
        bits: of a number.
    """
    middle = 1 << (bits - 1)
    blocks, in_byte = columns // block, 8 // bits
    zero = sum(middle << (bits * place) for place in range(in_byte))
    numbers = np.full((*firsts.shape, columns // in_byte), zero, np.uint8)
    # A scale of what the first stands for, and of one step more than zero.
    numbers[..., 0] += firsts != 0
    scales = np.zeros((*firsts.shape, blocks), np.float32)
    scales[..., 0] = firsts
    zeros = np.full((*firsts.shape, -(-blocks // in_byte)), zero, np.uint8)
    return numbers, scales, zeros
