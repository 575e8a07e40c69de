"""Every number of ``trtexec.txt`` that is not a user's to choose is held to the graph."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest

from ingot.export.engine import profiles, trtexec_options
from ingot.export.ingot import Manifest, TensorInfo
from ingot.export.request import Limits
from ingot.graphs.state import State, key_value_states
from ingot.validate.identity.options import options_problem

TOKENS = (
    TensorInfo("input_ids", "int64", ("batch", "sequence")),
    TensorInfo("attention_mask", "int64", ("batch", "total_sequence")),
)
CACHES = key_value_states(0, 2, 16)
ALONE = (TOKENS[0], TensorInfo("attention_mask", "int64", ("batch", "sequence")))


@dataclass
class _Said:
    """As much of a manifest as is read."""

    inputs: tuple[TensorInfo, ...]
    states: tuple[State, ...]


def _inputs(states: tuple[State, ...]) -> tuple[TensorInfo, ...]:
    return tuple(TensorInfo(each.input, each.dtype, each.input_shape) for each in states)


CACHED = _Said((*TOKENS, *_inputs(CACHES)), CACHES)
CLASSIFIER = _Said(ALONE, ())


def written(said: _Said, limits: Limits) -> str:
    return trtexec_options(profiles(said.inputs, said.states, limits))


def problem(text: str, said: _Said) -> str:
    manifest: Manifest = said  # type: ignore[assignment]
    return options_problem(text, manifest)


@pytest.mark.parametrize("said", [CACHED, CLASSIFIER])
@pytest.mark.parametrize("sizes", [(4, 4096, 512), (1, 2, 1), (64, 7, 7), (3, 100, 512)])
def test_what_an_export_writes_has_no_problem(said: _Said, sizes: tuple[int, int, int]) -> None:
    rows, longest, usual = sizes
    limits = Limits(max_batch=rows, max_seq=longest, opt_seq=usual)
    assert problem(written(said, limits), said) == ""


@pytest.mark.parametrize("said", [CACHED, CLASSIFIER])
def test_any_other_number_or_name_is_a_problem(said: _Said) -> None:
    text = written(said, Limits(max_batch=4, max_seq=4096, opt_seq=512))
    found = []
    for number in re.finditer(r"(?<=[:x=])\d+", text):
        for other in (int(number[0]) + 1, int(number[0]) + 10_000):
            wrong = f"{text[: number.start()]}{other}{text[number.end() :]}"
            found.append((wrong, problem(wrong, said)))
    assert len(found) > 20 and all(why for _, why in found)
    for line in text.splitlines():
        assert problem(text.replace(f"{line}\n", "", 1), said)
    for tensor in said.inputs:
        assert problem(text.replace(tensor.name, f"{tensor.name}2"), said)
    assert problem("", said) and problem(text.replace("x", "-"), said)


def test_says_what_is_wrong() -> None:
    text = written(CACHED, Limits(max_batch=4, max_seq=4096, opt_seq=512))
    assert "has the options --stronglyTyped --profile=0" in problem(
        text.replace("--noTF32\n", ""), CACHED
    )
    assert problem(text.replace("2x4095x16", "2x4096x16"), CACHED) == (
        "has a profile 0 whose longest past, call and sequence are not of one length"
    )
    assert problem(text.replace("x2x", "x3x"), CACHED).startswith("has a profile 0 that has past_")
