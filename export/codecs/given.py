"""The whole numbers that a quantised checkpoint has, in blocks as kernels read them.

Nothing is rounded: a group of columns is one block or several with the same scale, and a number of
four bits is one of eight bits under another zero point. What cannot be said so is refused:

- groups of columns out of order, as ``desc_act`` of GPTQ makes them. The kernels have no order of
  columns. It could be made of their activations instead, but not for experts, which all read the
  same ones and each have an order of their own; so one matrix of a layer would be as the checkpoint
  has it and the next would not;
- groups that no block divides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ingot.export.codecs.blocks import Blocks, Bytes, Encoded, Floats
from ingot.export.quantization import BITS, BLOCKS, UNCHANGED, Quantization
from ingot.export.request import ExportError
from ingot.graphs.coded import Coded, Form

# Gives the numbers of one matrix by its parameter and its place in a stack, part by part.
ReadCoded = Callable[[str, int], Sequence[Coded]]


@dataclass(frozen=True)
class Given:
    """Hands out the numbers of a checkpoint.

    Attributes:
        formats: of parameters, by name; None of one that is stored as it is.
        read: gives the numbers.
    """

    formats: Callable[[str], Blocks | None]
    read: ReadCoded

    def format(self, name: str) -> Blocks | None:
        """See ``Coder.format``."""
        return self.formats(name)

    def encode(self, name: str, expert: int, rows: Floats) -> Encoded:
        """See ``Coder.encode``; rows are told apart by what they are worth."""
        blocks = self.format(name)
        assert blocks is not None, f"{name} is stored as it is"
        parts = self.read(name, expert)
        whole = np.concatenate([part.weights().numpy() for part in parts])
        numbers, scales, zeros = (
            np.concatenate(each)
            for each in zip(*(_in_blocks(part, blocks) for part in parts), strict=True)
        )
        order = _places(rows, whole, name)
        encoded = blocks.pack(numbers[order], scales[order], zeros[order])
        if not np.array_equal(encoded.scales, scales[order]):
            raise ExportError(
                f"{name} has scales that float16 does not hold, which is what --kernels ingot "
                "reads; give --kernels ort."
            )
        return encoded


def _in_blocks(part: Coded, blocks: Blocks) -> tuple[Bytes, Floats, Bytes]:
    """Numbers ``[N, blocks, size]``, scales and zero points ``[N, blocks]``."""
    rows, columns = part.codes.shape
    # As many numbers on either side of the middle, and the same distance from it.
    moved = np.uint8(blocks.middle - (1 << (part.bits - 1)))
    count = -(-columns // blocks.size)
    of_block = np.arange(count) * blocks.size // part.group
    scales = part.scales.numpy()[:, of_block]
    if part.zero_points is None:
        zeros = np.full(scales.shape, blocks.middle, np.uint8)
    else:
        zeros = part.zero_points.numpy()[:, of_block] + moved
    # A row is filled up with what is worth nothing.
    numbers = np.repeat(zeros, blocks.size, axis=1)
    numbers[:, :columns] = part.codes.numpy() + moved
    return numbers.reshape(rows, count, blocks.size), scales, zeros


def _places(rows: Floats, whole: Floats, name: str) -> np.ndarray:
    """Which row of a matrix each of some rows is; any of several that are the same."""
    if np.array_equal(rows, whole):
        return np.arange(len(rows))
    places = {row.tobytes(): place for place, row in enumerate(whole)}
    found = [places.get(row.tobytes()) for row in np.ascontiguousarray(rows)]
    assert None not in found, f"{name} is not what the checkpoint has"
    return np.array(found, np.int64)


def quantization_of(
    forms: Mapping[str, Sequence[Form]], plain: Sequence[str], accuracy: str | None
) -> tuple[str, Quantization]:
    """In what format the numbers of a checkpoint are stored.

    Args:
        forms: of the parts of each parameter that is in whole numbers.
        plain: matrices that are not.
        accuracy: of the kernels; None for the usual one.

    Returns:
        ``weights`` of ``ingot.json``, and how.

    Raises:
        ExportError: numbers that no format of ONNX Runtime's kernels has.
    """
    every = [(name, form) for name, parts in forms.items() for form in parts]
    for name, form in every:
        if not form.in_order:
            raise ExportError(
                f"{name}: the groups of its columns are out of order (desc_act, g_idx), which no "
                "kernel of ONNX Runtime reads; give --weights fp32 or bf16, which have the same "
                "numbers, or int4 or int8, which round them again."
            )
    block = _block(every)
    # QMoE on the CPU wants as many bits of one of its stacks as of the other (1.31.1).
    together: dict[str, int] = {}
    for name, form in every:
        owner = _owner(name)
        together[owner] = max(together.get(owner, 0), form.bits)
    bits = {name: together[_owner(name)] for name in forms}
    usual = min(bits.values())
    weights = next(name for name, of in BITS.items() if of == usual)
    others = {name: of for name, of in bits.items() if of != usual}
    return weights, Quantization(
        block=block,
        symmetric=all(form.symmetric for _, form in every),
        accuracy=accuracy or Quantization.accuracy,
        method="given",
        bits={**others, **dict.fromkeys(plain, UNCHANGED)},
    )


def _owner(name: str) -> str:
    """The module that a parameter is of: that of all experts, or of one layer."""
    return name.rpartition(".")[0]


def _block(every: Sequence[tuple[str, Form]]) -> int:
    """The largest block that all groups are whole numbers of."""
    for ragged in (False, True):
        for size in sorted(BLOCKS, reverse=True):
            # A group that is a whole row may end in a block that is filled in part.
            if all(
                form.group % size == 0 or (ragged and form.group >= form.columns)
                for _, form in every
            ):
                return size
    name, form = min(every, key=lambda each: each[1].group)
    raise ExportError(
        f"{name}: its scales are of {form.group} columns each, and kernels of ONNX Runtime read "
        f"blocks of {', '.join(map(str, BLOCKS))}; give --weights fp32 or bf16, which have the "
        "same numbers, or int4 or int8, which round them again."
    )
