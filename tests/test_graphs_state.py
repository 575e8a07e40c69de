"""What a state says of itself, by layer, precision and sizes."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from ingot.graphs.state import State, key_value_states, recurrent_states

KEY, VALUE = key_value_states(3, 2, 16)
CONV, SSM = recurrent_states(4, (24, 3), (2, 8, 5))


def test_names_the_states_of_one_layer() -> None:
    assert [(state.input, state.output) for state in (KEY, VALUE, CONV, SSM)] == [
        ("past_key_values.3.key", "present.3.key"),
        ("past_key_values.3.value", "present.3.value"),
        ("past_states.4.conv", "present_states.4.conv"),
        ("past_states.4.ssm", "present_states.4.ssm"),
    ]


def test_gives_the_shape_for_so_many_sequences_and_tokens() -> None:
    assert KEY.shape(5, 7) == VALUE.shape(5, 7) == (5, 2, 7, 16)
    assert KEY.shape(5, 0) == (5, 2, 0, 16)
    assert CONV.shape(5, 7) == (5, 24, 3)
    assert SSM.shape(5, 7) == (5, 2, 8, 5)


@pytest.mark.parametrize("precision", ["float64", "float32", "float16", "bfloat16"])
def test_keeps_the_state_of_a_scan_in_float32_at_least(precision: str) -> None:
    assert {state.cast(precision).dtype for state in (KEY, VALUE, CONV)} == {precision}
    wide = "float64" if precision == "float64" else "float32"
    assert SSM.cast(precision).dtype == wide
    # From any precision to any other.
    assert SSM.cast("float64").cast(precision) == SSM.cast(precision)


def test_is_written_as_every_manifest_has_it() -> None:
    assert json.dumps(asdict(KEY)) == (
        '{"kind": "key", "input": "past_key_values.3.key", "output": "present.3.key", '
        '"dtype": "float32", "input_shape": ["batch", 2, "past_sequence", 16], '
        '"output_shape": ["batch", 2, "total_sequence", 16], "axis": 2, "shared": false}'
    )
    assert State(**asdict(SSM)) == SSM
