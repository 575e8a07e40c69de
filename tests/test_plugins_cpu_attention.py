"""Attention over a cache, on every instruction set, against float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingot.plugins.cpu.library import CpuLibrary, LibraryError
from ingot.plugins.cpu.panels import Floats

Doubles = npt.NDArray[np.float64]
# Of a cache, behind what it holds: read, it would be seen.
SPARE = 3


@dataclass
class Case:
    query: Floats
    key: Floats
    value: Floats
    caches: tuple[Floats, Floats]
    visible: npt.NDArray[np.bool_]
    rotation: tuple[Floats, Floats] | None
    scale: float

    @property
    def total(self) -> int:
        return int(self.visible.shape[2])

    def run(self, library: CpuLibrary, *, in_place: bool = False) -> tuple[Floats, Floats, Floats]:
        room = self.total + 1
        caches = self.caches
        if in_place:
            grown = [np.full((*c.shape[:2], room, c.shape[3]), np.nan, np.float32) for c in caches]
            for new, old in zip(grown, caches, strict=True):
                new[:, :, : old.shape[2]][:, :, :room] = old[:, :, :room]
            caches = (grown[0], grown[1])
        return library.attention(
            self.query,
            self.key,
            self.value,
            caches,
            self.visible,
            rotation=self.rotation,
            scale=self.scale,
            capacity=None if in_place else room,
        )


def drawn(
    batch: int,
    tokens: int,
    past: int,
    heads: int,
    shared: int = 1,
    size: int = 16,
    *,
    rotated: int = 0,
    mask: str = "causal",
    seed: int = 0,
) -> Case:
    """Heads of keys are ``heads``, each of which ``shared`` heads of queries share."""
    random = np.random.default_rng(seed)
    total = past + tokens

    def normal(*shape: int) -> Floats:
        return random.normal(size=shape).astype(np.float32)

    caches = normal(2, batch, heads, past + SPARE, size)
    caches[:, :, :, past:] = np.nan
    places = np.arange(past, total)[:, None], np.arange(total)[None]
    causal = np.broadcast_to(places[0] >= places[1], (batch, tokens, total))
    visible = causal & (random.random((batch, 1, total)) < 0.8)
    if mask == "causal":
        visible = causal
    elif mask == "left":
        lengths = random.integers(0, total + 1, (batch, 1, 1))
        visible = causal & (np.arange(total) >= lengths)
    elif mask == "window":
        visible = causal & (places[0] - places[1] < 5)
    # A token sees itself, whatever else.
    visible = visible | (places[0] == places[1])
    angles = random.uniform(0, 7, (batch, tokens, rotated // 2))
    rotation = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    return Case(
        normal(batch, tokens, heads * shared, size),
        normal(batch, tokens, heads, size),
        normal(batch, tokens, heads, size),
        (np.ascontiguousarray(caches[0]), np.ascontiguousarray(caches[1])),
        np.ascontiguousarray(visible),
        rotation if rotated else None,
        float(random.uniform(0.1, 0.5)),
    )


def rotate(x: Floats, rotation: tuple[Floats, Floats] | None) -> Doubles:
    result = x.astype(np.float64)
    if rotation is not None:
        cos, sin = (each[:, :, None].astype(np.float64) for each in rotation)
        half = cos.shape[3]
        one, other = result[..., :half].copy(), result[..., half : 2 * half].copy()
        result[..., :half] = one * cos - other * sin
        result[..., half : 2 * half] = other * cos + one * sin
    return result


def assert_right(found: tuple[Floats, Floats, Floats], case: Case) -> None:
    y, *present = found
    past = case.total - case.query.shape[1]
    new = rotate(case.key, case.rotation), case.value.astype(np.float64)
    keys, values = (
        np.concatenate([cache[:, :, :past], each.swapaxes(1, 2)], axis=2)
        for cache, each in zip(case.caches, new, strict=True)
    )
    for cache, expected in zip(present, (keys, values), strict=True):
        np.testing.assert_allclose(cache[:, :, : case.total], expected, rtol=0, atol=2e-6)
    shared = case.query.shape[2] // keys.shape[1]
    # Of the keys as they are kept, so that their rounding is none of the rest.
    keys, values = (
        np.repeat(cache[:, :, : case.total].astype(np.float64), shared, axis=1) for cache in present
    )
    scores = np.einsum("bthd,bhkd->bhtk", rotate(case.query, case.rotation), keys) * case.scale
    # What a sum of so many parts is off in float32.
    parts = np.einsum("bthd,bhkd->bhtk", np.abs(case.query), np.abs(keys)) * case.scale
    scores = np.where(case.visible[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    expected = np.einsum("bhtk,bhkd->bthd", weights, values)
    off = (1 + parts.max(axis=-1)) * np.abs(values).max() * 2.0**-23
    assert (np.abs(y - expected) <= off.swapaxes(1, 2)[..., None]).all()


# About the rows that are few, those of a tile, the keys of a block and of a span.
SIZES = [
    (1, 1, 0, 1, 1, 16),
    (2, 1, 1, 3, 1, 8),
    (1, 1, 5, 2, 3, 64),
    (1, 2, 511, 2, 2, 24),
    (1, 1, 1200, 1, 4, 16),
    (2, 3, 0, 2, 2, 40),
    (1, 5, 60, 1, 1, 128),
    (1, 70, 0, 2, 3, 64),
    (2, 64, 64, 1, 2, 32),
    (1, 65, 130, 1, 6, 80),
    (3, 13, 7, 2, 1, 1),
    (1, 200, 0, 1, 1, 96),
    (0, 3, 2, 1, 1, 8),
    (2, 0, 3, 2, 1, 8),
]


@pytest.mark.parametrize("mask", ["causal", "left", "any", "window"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gives_the_attention_of_float64(
    cpu_kernels: CpuLibrary, sizes: tuple[int, int, int, int, int, int], mask: str
) -> None:
    case = drawn(*sizes, mask=mask, seed=sum(sizes))
    found = case.run(cpu_kernels)
    if 0 not in sizes[:2]:
        assert_right(found, case)
        assert_right(case.run(cpu_kernels, in_place=True), case)
    elif sizes[0]:
        # A call without tokens hands the caches on.
        np.testing.assert_array_equal(found[1][:, :, : sizes[2]], case.caches[0][:, :, : sizes[2]])


@settings(deadline=None, max_examples=80)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 90),
    past=st.integers(0, 90),
    heads=st.integers(1, 3),
    shared=st.integers(1, 5),
    size=st.integers(1, 140),
    share=st.floats(0, 1),
    mask=st.sampled_from(["causal", "left", "any", "window"]),
    in_place=st.booleans(),
)
def test_any_sizes_on_any_instruction_set(
    cpu_library: CpuLibrary,
    batch: int,
    tokens: int,
    past: int,
    heads: int,
    shared: int,
    size: int,
    share: float,
    mask: str,
    in_place: bool,
) -> None:
    rotated = int(share * size) // 2 * 2
    case = drawn(batch, tokens, past, heads, shared, size, rotated=rotated, mask=mask, seed=size)
    before = cpu_library.target
    try:
        for target in cpu_library.targets:
            cpu_library.use(target)
            assert_right(case.run(cpu_library, in_place=in_place), case)
    finally:
        cpu_library.use(before)


def test_large_scores_overflow_nothing(cpu_kernels: CpuLibrary) -> None:
    for tokens in (1, 40):
        case = drawn(1, tokens, 50, 1, size=32)
        case.query *= 300
        case.scale = 1.0
        y = case.run(cpu_kernels)[0]
        assert np.isfinite(y).all()
        # The largest score takes all, but where the next is near.
        total = case.total
        keys = np.concatenate([case.caches[0][:, :, : total - tokens], case.key.swapaxes(1, 2)], 2)
        scores = np.einsum("bthd,bhkd->bhtk", case.query.astype(float), keys.astype(float))[0, 0]
        scores = np.where(case.visible[0], scores, -np.inf)
        ranked = np.sort(scores, axis=-1)
        values = np.concatenate(
            [case.caches[1][:, :, : total - tokens], case.value.swapaxes(1, 2)], 2
        )
        for row in np.flatnonzero(ranked[:, -1] - ranked[:, -2] > 30):
            np.testing.assert_allclose(y[0, row, 0], values[0, 0, scores[row].argmax()], rtol=1e-5)


def test_a_token_that_sees_nothing_is_no_number(cpu_kernels: CpuLibrary) -> None:
    for tokens in (1, 30):
        case = drawn(1, tokens, 4, 1)
        case.visible[0, 0] = False
        y = case.run(cpu_kernels)[0]
        assert np.isnan(y[0, 0]).all() and np.isfinite(y[0, 1:]).all()


def test_threads_and_where_the_caches_are_change_no_bit(cpu_library: CpuLibrary) -> None:
    many = CpuLibrary(cpu_library.path, threads=3)
    for tokens, past in ((1, 2000), (2, 40), (150, 30)):
        case = drawn(2, tokens, past, 3, 2, 64, rotated=64, mask="any")
        results = [case.run(cpu_library), case.run(many), case.run(many, in_place=True)]
        for other in results[1:]:
            for ours, theirs in zip(results[0], other, strict=True):
                kept = slice(None) if ours.shape == case.query.shape else slice(case.total)
                np.testing.assert_array_equal(ours[:, :, kept], theirs[:, :, kept])


def test_refuses_sizes_that_do_not_fit(cpu_library: CpuLibrary) -> None:
    case = drawn(1, 2, 3, 2, 1)
    three = np.ascontiguousarray(np.repeat(case.query, 3, axis=2)[:, :, :3])
    with pytest.raises(LibraryError, match="multiple of key_heads"):
        cpu_library.attention(three, case.key, case.value, case.caches, case.visible, capacity=9)
    visible = np.ones((1, 2, 40), np.bool_)
    with pytest.raises(LibraryError, match="too little room"):
        cpu_library.attention(case.query, case.key, case.value, case.caches, visible, capacity=9)
    with pytest.raises(LibraryError, match="too little room"):
        cpu_library.attention(
            case.query, case.key, case.value, case.caches, case.visible, capacity=4
        )
