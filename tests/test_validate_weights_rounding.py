"""Weights in blocks against numbers: good rounding passes, and whatever else was done is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest

from ingot.export.codecs.blocks import Blocks, Encoded
from ingot.validate.identity.weights_blocks import Blocked
from ingot.validate.identity.weights_files import Floats, Reader, Tensor
from ingot.validate.identity.weights_graph import Layout
from ingot.validate.identity.weights_names import Made, Part
from ingot.validate.identity.weights_rounding import Format, Rounding, compare_blocks

EXPERTS, ROWS, COLUMNS = 3, 12, 160
BOTH = Layout(interleaved=True, backwards=True)
Parts = dict[str, np.ndarray]


def weights(seed: int = 0, tail: float = 0.0) -> Floats:
    """``[E, 2I, H]``: normal, with some numbers far out."""
    rng = np.random.default_rng(seed)
    found = rng.normal(0, 0.05, (EXPERTS, ROWS, COLUMNS))
    far = rng.random(found.shape) < tail
    return np.asarray(np.where(far, found * 12, found), np.float32)


def stored(values: Floats, blocks: Blocks, layout: Layout = BOTH) -> Parts:
    """As an export stores it: encoded expert by expert, by the product's codec."""
    rows = values[::-1] if layout.backwards else values
    if layout.interleaved:
        rows = rows.reshape(EXPERTS, 2, ROWS // 2, -1).swapaxes(1, 2).reshape(values.shape)
    encoded = [blocks.encode(np.ascontiguousarray(each)) for each in rows]
    return _stacked(encoded)


def _stacked(encoded: list[Encoded]) -> Parts:
    parts: Parts = {
        "codes": np.stack([each.data.reshape(len(each.data), -1) for each in encoded]),
        "scales": np.stack([each.scales for each in encoded]),
    }
    zeros = [each.zero_points for each in encoded]
    if zeros[0] is not None:
        parts["zeros"] = np.stack([each for each in zeros if each is not None])
    return parts


def compared(
    parts: Parts, values: Floats, blocks: Blocks, method: str = "nearest", layout: Layout = BOTH
) -> list[Rounding]:
    def tensor(name: str, dtype: str) -> Tensor:
        array = np.ascontiguousarray(parts[name])
        return Tensor(name, dtype, array.shape, None, data=array.tobytes())

    zeros = tensor("zeros", "U8") if "zeros" in parts else None
    weight = Blocked(
        tensor("codes", "U8"),
        tensor("scales", "F32"),
        zeros,
        blocks.bits,
        blocks.size,
        values.shape[-1],
    )
    source = Tensor("w", "F32", values.shape, None, data=values.tobytes())
    rows, columns = values.shape[1:]
    made = Made(
        "w",
        values.shape,
        tuple(Part(source, e * rows * columns, e, 0, rows) for e in range(len(values))),
    )
    given = Format(blocks.bits, blocks.size, blocks.symmetric, method)
    with Reader() as reader:
        return compare_blocks(weight, made, layout, given, _Plain(reader), reader, lambda _: None)


class _Plain:
    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def rows(
        self, _made: Made, part: Part, first: int, count: int, columns: int
    ) -> tuple[Floats, Floats]:
        at = part.first + first * columns
        found = self.reader.elements(part.tensor, at, count * columns).view(np.float32)
        return found.reshape(count, columns), found.reshape(count, columns)


FORMATS = [
    Blocks(bits, size, symmetric)
    for bits in (4, 8)
    for size in (32, 64, 128)
    for symmetric in (True, False)
]


@pytest.mark.parametrize("blocks", FORMATS, ids=str)
@pytest.mark.parametrize("tail", [0.0, 0.03])
def test_passes_what_is_rounded_to_nearest(blocks: Blocks, tail: float) -> None:
    for layout in (BOTH, Layout()):
        values = weights(tail=tail)
        assert compared(stored(values, blocks, layout), values, blocks, layout=layout) == []


@pytest.mark.parametrize("blocks", FORMATS[:4], ids=str)
def test_passes_zeros_signs_few_values_and_extreme_sizes(blocks: Blocks) -> None:
    values = weights()
    for other in (
        values * 0,
        np.sign(values),
        np.abs(values),
        np.round(values * 30) / 8,
        values * np.float32(1e-30),
        values * np.float32(1e30),
        values * (np.arange(COLUMNS) % 40 == 3),
    ):
        wide = np.ascontiguousarray(other, np.float32)
        assert compared(stored(wide, blocks), wide, blocks) == [], wide[0, 0, :4]


def test_a_search_of_plain_rounding_alone_passes_too() -> None:
    values = weights(tail=0.02)
    steps = np.abs(values.reshape(EXPERTS, ROWS, -1, 32)).max(-1) / 7
    numbers = np.clip(np.rint(values.reshape(*steps.shape, 32) / steps[..., None]) + 8, 0, 15)
    pairs = numbers.astype(np.uint8).reshape(EXPERTS, ROWS, -1, 2)
    parts = {"codes": pairs[..., 0] | pairs[..., 1] << 4, "scales": steps.astype(np.float32)}
    assert compared(parts, values, Blocks(4, 32), layout=Layout()) == []


Change = Callable[[Parts, Blocks], None]


def swapped_nibbles(parts: Parts, _blocks: Blocks) -> None:
    parts["codes"][1] = parts["codes"][1] >> 4 | parts["codes"][1] << 4


def zero_points(by: int) -> Change:
    def change(parts: Parts, blocks: Blocks) -> None:
        both = 0x11 if blocks.bits == 4 else 1
        parts["zeros"][1] += np.uint8(both * by % 256)

    return change


def swapped_zero_points(parts: Parts, _blocks: Blocks) -> None:
    parts["zeros"][1] = parts["zeros"][1] >> 4 | parts["zeros"][1] << 4


def rolled(part: str, axis: int, by: int) -> Change:
    def change(parts: Parts, _blocks: Blocks) -> None:
        parts[part] = np.roll(parts[part], by, axis)

    return change


def exchanged_scales(parts: Parts, _blocks: Blocks) -> None:
    parts["scales"] = parts["scales"][[1, 0, 2]]


def exchanged(parts: Parts, _blocks: Blocks) -> None:
    for name, array in parts.items():
        parts[name] = array[[1, 0, 2]]


def gate_for_up(parts: Parts, _blocks: Blocks) -> None:
    for name, array in parts.items():
        pairs = array.reshape(EXPERTS, ROWS // 2, 2, -1)
        parts[name] = pairs[:, :, ::-1].reshape(array.shape)


def doubled(parts: Parts, _blocks: Blocks) -> None:
    parts["scales"] *= 2


def signed(parts: Parts, blocks: Blocks) -> None:
    parts["codes"] ^= np.uint8(0x88 if blocks.bits == 4 else 0x80)


INT4, INT4_ZEROS, INT8 = Blocks(4, 32), Blocks(4, 32, False), Blocks(8, 32)


@pytest.mark.parametrize(
    ("blocks", "change", "said"),
    [
        (INT4, swapped_nibbles, "its nibbles are swapped"),
        (INT4_ZEROS, swapped_nibbles, "its nibbles are swapped"),
        (INT4_ZEROS, zero_points(1), "its zero points are one too high"),
        (INT4_ZEROS, zero_points(-1), "its zero points are one too low"),
        (Blocks(8, 64, False), zero_points(1), "its zero points are one too high"),
        (INT4_ZEROS, rolled("scales", 2, 1), "its scales are of the block before"),
        (INT4, rolled("scales", 2, -1), "its scales are of the block behind"),
        (INT8, rolled("scales", 2, 1), "its scales are of the block before"),
        (INT4, exchanged_scales, "its scales are where those of expert 2 should be"),
        (INT8, exchanged_scales, "its scales are where those of expert 2 should be"),
        (INT4, exchanged, "its rows are where those of expert 2 should be"),
        (INT8, gate_for_up, "gate and up are exchanged"),
        (INT4, doubled, "all of it is 2 times what it should be"),
        (INT4, signed, "its numbers are signed"),
        (INT8, signed, "its numbers are signed"),
    ],
    ids=lambda each: getattr(each, "__name__", None) or str(each),
)
@pytest.mark.parametrize("method", ["nearest", "importance", "gptq"])
def test_names_what_was_done(blocks: Blocks, change: Change, said: str, method: str) -> None:
    values = weights()
    parts = stored(values, blocks)
    change(parts, blocks)
    (found,) = compared(parts, values, blocks, method)
    assert said in str(found), str(found)


def test_the_nibbles_of_zero_points_are_told_from_those_of_numbers() -> None:
    values = weights()[..., :128]
    parts = stored(values, INT4_ZEROS)
    swapped_zero_points(parts, INT4_ZEROS)
    (found,) = compared(parts, values, INT4_ZEROS)
    assert "the nibbles of its zero points are swapped" in str(found)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [32, 128])
def test_names_the_block_of_one_number_that_is_off_by_two(
    bits: Literal[4, 8], size: Literal[32, 128]
) -> None:
    blocks, values = Blocks(bits, size), weights()[..., :128]
    for expert, row, column in ((0, 3, 70), (2, 11, 5)):
        parts = stored(values, blocks, Layout())
        held = parts["codes"][expert, row]
        byte, low = (column // 2, column % 2 == 0) if bits == 4 else (column, True)
        number = held[byte] & 15 if bits == 4 and low else held[byte] >> (0 if bits == 8 else 4)
        by = 2 if number < blocks.middle else -2
        held[byte] = (int(held[byte]) + by * (1 if low else 16)) % 256
        (found,) = compared(parts, values, blocks, layout=Layout())
        assert (found.wrong, found.far) == (1, 1)
        assert found.index == (expert, row, column // size * size)


@pytest.mark.parametrize("blocks", FORMATS, ids=str)
def test_names_the_block_of_one_scale_that_is_an_eighth_too_large(blocks: Blocks) -> None:
    values = weights()[..., :128]
    parts = stored(values, blocks, Layout())
    parts["scales"][1, 4, -1] *= np.float32(1.125)
    (found,) = compared(parts, values, blocks, layout=Layout())
    assert (found.wrong, found.index) == (1, (1, 4, 128 - blocks.size))


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_names_a_scale_that_is_none(value: float) -> None:
    values = weights()
    parts = stored(values, INT4, Layout())
    parts["scales"][1, 4, 2] = value
    (found,) = compared(parts, values, INT4, layout=Layout())
    assert found.wrong == 1 and found.index == (1, 4, 64)
    assert ("a scale is not finite" in str(found)) == (value != 0)


def test_names_the_filling_of_a_row_that_is_not_zero() -> None:
    values = np.ascontiguousarray(weights()[..., :150])
    parts = stored(values, INT8, Layout())
    assert compared(parts, values, INT8, layout=Layout()) == []
    parts["codes"][2, 3, -1] += 1
    (found,) = compared(parts, values, INT8, layout=Layout())
    assert str(found) == "what its rows are filled up with is not zero"


def test_nearest_is_held_to_each_block_and_other_methods_to_matrices() -> None:
    values = weights()
    rng = np.random.default_rng(3)
    # As feedback of errors does: most numbers are the nearest of something else.
    moved = values + rng.normal(0, 0.006, values.shape).astype(np.float32)
    parts = stored(moved, INT4)
    assert [each.problem for each in compared(parts, values, INT4)] == [True]
    assert compared(parts, values, INT4, "gptq") == []
    far = values + rng.normal(0, 0.04, values.shape).astype(np.float32)
    (found,) = compared(stored(far, INT4), values, INT4, "gptq")
    assert found.wrong == found.blocks and not found.reason
