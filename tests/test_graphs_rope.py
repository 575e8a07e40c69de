"""Frequencies, tables and rotation against transformers, and the rope fields of ``config.json``."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeRotaryEmbedding, apply_rotary_pos_emb

from ingot.graphs.config import ConfigError, ConfigReader
from ingot.graphs.rope import RopeParameters, RotaryEmbedding, rotate

HEADS = 4
CONTEXT = 128

# name -> (rope_parameters, head size, max_position_embeddings)
TABLE: dict[str, tuple[dict[str, Any], int, int]] = {
    "default": ({"rope_type": "default", "rope_theta": 10000.0}, 16, CONTEXT),
    "default, theta 500000": ({"rope_type": "default", "rope_theta": 500000.0}, 128, 4096),
    "default, smallest head": ({"rope_type": "default", "rope_theta": 10000.0}, 2, CONTEXT),
    "default, integer theta": ({"rope_type": "default", "rope_theta": 1000000}, 64, CONTEXT),
    "linear": ({"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}, 16, CONTEXT),
    "linear, odd factor": ({"rope_type": "linear", "rope_theta": 7e5, "factor": 2.7}, 64, CONTEXT),
    "dynamic": ({"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}, 16, CONTEXT),
    "dynamic, odd factor": ({"rope_type": "dynamic", "rope_theta": 5e5, "factor": 3.7}, 64, 100),
    "yarn": ({"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}, 64, 4096),
    "yarn, integer factor": ({"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4}, 64, 4096),
    "yarn, factor 1": ({"rope_type": "yarn", "rope_theta": 10000.0, "factor": 1.0}, 64, 4096),
    "yarn, attention_factor": (
        {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "attention_factor": 0.7},
        64,
        4096,
    ),
    "yarn, mscale": (
        {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 40.0,
            "mscale": 0.707,
            "mscale_all_dim": 1.1,
        },
        64,
        4096,
    ),
    # One of the two alone is ignored by transformers, and must be here.
    "yarn, mscale alone": (
        {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "mscale": 0.707},
        64,
        4096,
    ),
    "yarn, not truncated": (
        {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "truncate": False},
        64,
        4096,
    ),
    # transformers takes null for false, where an absent field is true.
    "yarn, truncate null": (
        {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "truncate": None},
        64,
        4096,
    ),
    "yarn, betas": (
        {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "beta_fast": 16,
            "beta_slow": 2.5,
        },
        128,
        4096,
    ),
    # Both ends of the ramp fall on one dimension.
    "yarn, equal betas": (
        {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "beta_fast": 4,
            "beta_slow": 4,
            "truncate": False,
        },
        128,
        4096,
    ),
    "yarn, original context": (
        {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 512,
        },
        64,
        4096,
    ),
    # The ramp ends past the last frequency.
    "yarn, long context": ({"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}, 64, 131072),
    # The ramp starts below dimension 0.
    "yarn, short context": ({"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}, 16, CONTEXT),
    "yarn, factor from the lengths": (
        {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": None,
            "original_max_position_embeddings": 1024,
        },
        64,
        4096,
    ),
    "longrope": (
        {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.75, 2.0, 2.5],
            "long_factor": [1.0, 2, 4.5, 8, 16.0, 25.0, 40.0, 64.0],
            "original_max_position_embeddings": 48,
        },
        16,
        CONTEXT,
    ),
    "longrope, factor": (
        {
            "rope_type": "longrope",
            "rope_theta": 5e5,
            "short_factor": [1.05] * 4,
            "long_factor": [8.0, 7.0, 6.0, 5.0],
            "factor": 16.0,
            "original_max_position_embeddings": 100,
        },
        8,
        CONTEXT,
    ),
    "longrope, attention_factor": (
        {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8,
            "attention_factor": 1.19,
        },
        16,
        CONTEXT,
    ),
    "llama3": (
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        128,
        131072,
    ),
    "llama3, no original context": (
        {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 32,
            "low_freq_factor": 1,
            "high_freq_factor": 3.5,
        },
        64,
        2048,
    ),
}


def theirs(context: int, dim: int, **rope: Any) -> OlmoeRotaryEmbedding:
    # transformers fills in the dict it is given, so it gets a copy.
    config = OlmoeConfig(
        hidden_size=HEADS * dim,
        num_attention_heads=HEADS,
        max_position_embeddings=context,
        **copy.deepcopy(rope),
    )
    return OlmoeRotaryEmbedding(config)


def ours(context: int, dim: int, **raw: Any) -> RopeParameters:
    return RopeParameters.read(ConfigReader(raw, "olmoe"), dim, context)


def assert_same_frequencies(mine: RopeParameters, reference: OlmoeRotaryEmbedding) -> None:
    frequencies, factor = mine.frequencies()
    assert frequencies.dtype == torch.float32
    torch.testing.assert_close(frequencies, reference.inv_freq, rtol=1e-7, atol=0)
    assert factor == pytest.approx(reference.attention_scaling, rel=1e-15)


@pytest.mark.parametrize("name", TABLE)
def test_frequencies_are_those_of_transformers(name: str) -> None:
    rope, dim, context = TABLE[name]
    assert_same_frequencies(
        ours(context, dim, rope_parameters=rope), theirs(context, dim, rope_parameters=rope)
    )


@pytest.mark.parametrize("type_key", ["rope_type", "type"])
@pytest.mark.parametrize("name", TABLE)
def test_old_spelling_has_the_frequencies_of_transformers(name: str, type_key: str) -> None:
    rope, dim, context = TABLE[name]
    old = dict(rope)
    old[type_key] = old.pop("rope_type")
    theta = old.pop("rope_theta")
    assert_same_frequencies(
        ours(context, dim, rope_scaling=old, rope_theta=theta),
        theirs(context, dim, rope_scaling=old, rope_theta=theta),
    )


def test_default_spelling_without_rope_scaling_reads_rope_theta() -> None:
    mine = ours(CONTEXT, 16, rope_theta=500000.0, rope_scaling=None)
    assert_same_frequencies(mine, theirs(CONTEXT, 16, rope_theta=500000.0, rope_scaling=None))
    # Not 10000, the default that a lost field would leave.
    assert mine.frequencies()[0][-1] == pytest.approx(500000.0 ** (-14 / 16), rel=1e-6)


def test_absent_fields_are_the_default_of_transformers() -> None:
    assert_same_frequencies(ours(CONTEXT, 16), theirs(CONTEXT, 16))


def test_rope_theta_outside_counts_where_rope_parameters_has_none() -> None:
    rope = {"rope_type": "linear", "factor": 2.0}
    assert_same_frequencies(
        ours(CONTEXT, 16, rope_parameters=rope, rope_theta=5e5),
        theirs(CONTEXT, 16, rope_parameters=rope, rope_theta=5e5),
    )


def test_rope_theta_inside_rope_parameters_goes_first() -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    assert_same_frequencies(
        ours(CONTEXT, 16, rope_parameters=rope, rope_theta=1e4),
        theirs(CONTEXT, 16, rope_parameters=rope, rope_theta=1e4),
    )


def test_two_spellings_that_agree_are_accepted() -> None:
    rope = {"rope_type": "linear", "factor": 2.0}
    both = {
        "rope_scaling": rope,
        "rope_theta": 5e5,
        "rope_parameters": {**rope, "rope_theta": 5e5},
    }
    assert_same_frequencies(ours(CONTEXT, 16, **both), theirs(CONTEXT, 16, **both))


@pytest.mark.parametrize("name", [name for name in TABLE if name.startswith(("linear", "llama3"))])
def test_scaling_moves_the_frequencies(name: str) -> None:
    """Without this, a table whose values change nothing would pass every comparison above."""
    rope, dim, context = TABLE[name]
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2) / dim)
    scaled, _ = ours(context, dim, rope_parameters=rope).frequencies()
    assert (scaled < 0.99 * plain).any()


@pytest.mark.parametrize(
    "option",
    [
        {"factor": 8.0},
        {"attention_factor": 0.5},
        {"mscale": 0.5, "mscale_all_dim": 1.0},
        {"truncate": False},
        {"beta_fast": 8},
        {"beta_slow": 4},
        {"original_max_position_embeddings": 1024},
    ],
)
def test_every_yarn_option_counts(option: dict[str, Any]) -> None:
    base = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
    frequencies, factor = ours(4096, 64, rope_parameters=base).frequencies()
    other, other_factor = ours(4096, 64, rope_parameters={**base, **option}).frequencies()
    assert factor != other_factor or not torch.equal(frequencies, other)


def test_llama3_has_all_three_bands() -> None:
    rope, dim, context = TABLE["llama3"]
    plain, _ = ours(context, dim, rope_theta=rope["rope_theta"]).frequencies()
    ratio = plain / ours(context, dim, rope_parameters=rope).frequencies()[0]
    assert ratio[0] == 1
    assert ratio[-1] == rope["factor"]
    assert ((ratio > 1.1) & (ratio < rope["factor"] - 0.1)).any()


numbers = st.floats(1, 64, allow_nan=False)


@settings(deadline=None, max_examples=60)
@given(
    rope=st.one_of(
        st.fixed_dictionaries({"rope_type": st.just("linear"), "factor": numbers}),
        st.fixed_dictionaries({"rope_type": st.just("dynamic"), "factor": numbers}),
        st.fixed_dictionaries(
            {
                "rope_type": st.just("llama3"),
                "factor": numbers,
                "low_freq_factor": st.floats(0.5, 2),
                "high_freq_factor": st.floats(3, 8),
            },
            optional={"original_max_position_embeddings": st.integers(64, 9000)},
        ),
        st.fixed_dictionaries(
            {"rope_type": st.just("yarn"), "factor": numbers},
            optional={
                "original_max_position_embeddings": st.integers(64, 9000),
                "attention_factor": st.floats(0.1, 2),
                "beta_fast": st.floats(8, 64),
                "beta_slow": st.floats(0.5, 4),
                "mscale": st.floats(0.1, 2),
                "mscale_all_dim": st.floats(0.1, 2),
                "truncate": st.booleans(),
            },
        ),
    ),
    theta=st.floats(100, 1e7),
    half=st.integers(2, 64),
    context=st.integers(64, 9000),
)
def test_any_parameters_give_the_frequencies_of_transformers(
    rope: dict[str, Any], theta: float, half: int, context: int
) -> None:
    assert_same_frequencies(
        ours(context, 2 * half, rope_parameters={**rope, "rope_theta": theta}),
        theirs(context, 2 * half, rope_parameters={**rope, "rope_theta": theta}),
    )


def assert_same_tables(
    mine: RotaryEmbedding, reference: OlmoeRotaryEmbedding, positions: torch.Tensor
) -> None:
    cos, sin = mine(positions)
    expected = reference(torch.zeros(1), positions)
    for table, other in zip((cos, sin), expected, strict=True):
        assert table.dtype == torch.float32
        assert table.shape == (*positions.shape, 1, 2 * mine.inverse.shape[0])
        # Absolute, as both lie in -1..1: an angle of 10^5 has lost its last bits in float32.
        torch.testing.assert_close(table[:, :, 0], other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", TABLE)
def test_tables_are_those_of_transformers(name: str) -> None:
    rope, dim, context = TABLE[name]
    mine = RotaryEmbedding(ours(context, dim, rope_parameters=rope))
    reference = theirs(context, dim, rope_parameters=rope)
    # Two rows: one left-padded, one from the middle of a decode.
    positions = torch.tensor([[1, 1, 0, 1, 2, 3], [40, 41, 42, 43, 44, context - 1]])
    assert_same_tables(mine, reference, positions)


@pytest.mark.parametrize("name", TABLE)
def test_tables_past_the_longest_context_are_those_of_transformers(name: str) -> None:
    rope, dim, context = TABLE[name]
    mine = RotaryEmbedding(ours(context, dim, rope_parameters=rope))
    reference = theirs(context, dim, rope_parameters=rope)
    assert_same_tables(mine, reference, torch.arange(context - 3, context + 40)[None])


@pytest.mark.parametrize("name", ["dynamic", "dynamic, odd factor"])
def test_dynamic_tables_grow_from_call_to_call_as_in_transformers(name: str) -> None:
    rope, dim, context = TABLE[name]
    mine = RotaryEmbedding(ours(context, dim, rope_parameters=rope))
    # One module for all calls, since transformers keeps the stretched frequencies between them.
    reference = theirs(context, dim, rope_parameters=rope)
    for length in (5, context - 1, context, context + 1, context + 2, 3 * context, 1000):
        assert_same_tables(mine, reference, torch.arange(length)[None])
    # Decoding: one token, whose position alone says how long the sequence is.
    assert_same_tables(mine, reference, torch.tensor([[1000], [1200]]))
    # Back in the original context, transformers resets its frequencies.
    assert_same_tables(mine, reference, torch.arange(context - 1)[None])


@pytest.mark.parametrize("name", [name for name in TABLE if name.startswith("longrope")])
def test_longrope_tables_switch_with_the_length_of_the_call_as_in_transformers(name: str) -> None:
    rope, dim, context = TABLE[name]
    mine = RotaryEmbedding(ours(context, dim, rope_parameters=rope))
    # One module for all calls, since transformers writes the frequencies into its buffer.
    reference = theirs(context, dim, rope_parameters=rope)
    original = rope.get("original_max_position_embeddings", context)
    for length in (1, original - 1, original, original + 1, 3 * original, original, 2):
        assert_same_tables(mine, reference, torch.arange(length)[None])
    # Decoding over the switch, of two rows: the longer one decides for both.
    for last in (original - 2, original - 1, original, original + 5):
        assert_same_tables(mine, reference, torch.tensor([[last], [3]]))
    within, past = (torch.tensor([[5, original - 1 + more]]) for more in (0, 1))
    assert not torch.allclose(mine(within)[1][:, :1], mine(past)[1][:, :1], atol=1e-3)


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("key", ["rope_type", "type"])
@pytest.mark.parametrize("rope_type", ["longrope", "su"])
def test_reads_longrope_in_every_spelling(spelling: str, key: str, rope_type: str) -> None:
    rope, dim, context = TABLE["longrope"]
    fields = {name: value for name, value in rope.items() if name not in ("rope_type",)}
    expected = ours(context, dim, rope_parameters=rope)
    assert ours(context, dim, **{spelling: {**fields, key: rope_type}}) == expected


@pytest.mark.parametrize("name", ["yarn, original context", "longrope", "llama3"])
def test_a_pretraining_length_outside_the_object_goes_first(name: str) -> None:
    rope, dim, context = TABLE[name]
    outside = {"rope_parameters": rope, "original_max_position_embeddings": 77}
    mine = ours(context, dim, **outside)
    assert mine.original_max_position_embeddings == 77
    assert_same_frequencies(mine, theirs(context, dim, **outside))
    tables = RotaryEmbedding(mine), theirs(context, dim, **outside)
    for length in (77, 78):
        assert_same_tables(*tables, torch.arange(length)[None])


def test_a_pretraining_length_outside_is_nothing_to_other_types() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0}
    mine = ours(CONTEXT, 16, rope_parameters=rope, original_max_position_embeddings=16)
    assert mine == ours(CONTEXT, 16, rope_parameters=rope)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("short_factor", None),
        ("short_factor", 2.0),
        ("long_factor", [1.0] * 7),
        ("long_factor", [1.0] * 7 + ["1"]),
        ("long_factor", [1.0] * 7 + [0]),
        ("short_factor", [1.0] * 7 + [True]),
        ("short_factor", [1.0] * 7 + [float("inf")]),
        ("short_factor", [10**400] * 8),
        ("original_max_position_embeddings", 1),
        ("original_max_position_embeddings", "48"),
        ("attention_factor", -1.0),
        ("factor", 0),
    ],
)
def test_refuses_a_malformed_longrope(name: str, value: Any) -> None:
    rope, dim, _ = TABLE["longrope"]
    refused(name, dim=dim, rope_parameters={**rope, name: value})


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1.0},
        {"rope_type": "linear", "factor": 1e-30, "rope_theta": 1e-30},
        {"rope_type": "default", "rope_theta": 1e-320},
        {"rope_type": "linear", "factor": 10**400},
        {"rope_type": "dynamic", "factor": 1e-320},
        {"rope_type": "yarn", "factor": 2.0, "beta_slow": 1e-320},
    ],
    ids=lambda rope: f"{rope['rope_type']} {len(str(rope))}",
)
def test_refuses_numbers_that_leave_no_frequencies(rope: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"config\.json") as caught:
        RotaryEmbedding(ours(CONTEXT, 16, rope_parameters=rope))
    assert len(str(caught.value)) < 400


def test_dynamic_tables_depend_on_the_call_alone() -> None:
    """A graph has no memory between calls, so a longer call before must leave no trace."""
    rope, dim, context = TABLE["dynamic"]
    mine = RotaryEmbedding(ours(context, dim, rope_parameters=rope))
    mine(torch.arange(5 * context)[None])
    fresh = theirs(context, dim, rope_parameters=rope)
    assert_same_tables(mine, fresh, torch.arange(2 * context)[None])


def test_dynamic_frequencies_stretch_past_the_context_only() -> None:
    rope, dim, context = TABLE["dynamic"]
    mine = RotaryEmbedding(ours(context, dim, rope_parameters=rope))
    plain = RotaryEmbedding(ours(context, dim))
    inside = torch.tensor([[3, context - 1]])
    assert torch.allclose(mine(inside)[1], plain(inside)[1], rtol=0, atol=1e-6)
    outside = torch.tensor([[3, 2 * context]])
    assert not torch.allclose(mine(outside)[1][:, :1], plain(outside)[1][:, :1], rtol=0, atol=1e-3)


LLAMA3 = {"type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LISTS = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


@pytest.mark.parametrize(
    ("rope", "length"),
    [
        (None, 128),
        ({"type": "linear", "factor": 2.5}, 320),
        ({"type": "linear", "factor": 0.5}, 128),
        ({"type": "dynamic", "factor": 2.5}, 320),
        ({"type": "yarn", "factor": 4.0}, 512),
        # The length of the pretraining is that of the config, which was left as it was.
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        # The config has the stretched length.
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        ({"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}, 128),
        ({"type": "yarn", "factor": 1e30}, 2**31 - 1),
        ({**LLAMA3, "factor": 8.0, "original_max_position_embeddings": 16}, 128),
        ({**LLAMA3, "factor": 8.0}, 1024),
        ({"type": "longrope", **LISTS, "original_max_position_embeddings": 32}, 128),
        ({"type": "su", **LISTS, "factor": 4.0}, 512),
    ],
)
def test_context_length_is_what_the_scaling_is_for(
    rope: dict[str, Any] | None, length: int
) -> None:
    assert ours(128, 16, rope_scaling=rope).context_length == length


def test_rotation_is_that_of_transformers() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 5, HEADS, 16), torch.randn(2, 5, 2, 16)
    positions = torch.tensor([[1, 1, 0, 1, 2], [7, 8, 9, 10, 11]])
    cos, sin = theirs(CONTEXT, 16)(query, positions)
    expected = apply_rotary_pos_emb(query, key, cos, sin, unsqueeze_dim=2)
    for x, other in zip((query, key), expected, strict=True):
        torch.testing.assert_close(
            rotate(x, cos[:, :, None], sin[:, :, None]), other, rtol=0, atol=1e-6
        )


def test_scores_of_rotated_heads_depend_on_their_distance_alone() -> None:
    """What rotary embeddings are for, stated without any implementation of them."""
    torch.manual_seed(0)
    query, key = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)
    tables = RotaryEmbedding(ours(CONTEXT, 16))

    def score(at: int, other: int) -> torch.Tensor:
        turned = rotate(query, *tables(torch.tensor([[at]])))
        return (turned * rotate(key, *tables(torch.tensor([[other]])))).sum()

    torch.testing.assert_close(score(9, 4), score(65, 60), rtol=0, atol=1e-4)
    assert abs(score(9, 4) - score(9, 5)) > 1e-2


def refused(*named: str, dim: int = 16, **raw: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        ours(CONTEXT, dim, **raw)
    for part in ("config.json", *named):
        assert part in str(caught.value)


@pytest.mark.parametrize("value", ["proportional", "Linear", "", 5, 0, False, [], {}, ["linear"]])
def test_refuses_an_unknown_rope_type(value: Any) -> None:
    supported = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
    refused(repr(value), *supported, rope_parameters={"rope_type": value, "factor": 2.0})
    refused(repr(value), *supported, rope_scaling={"type": value, "factor": 2.0})


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "yarn", "llama3"])
def test_refuses_a_missing_factor(rope_type: str) -> None:
    rope: dict[str, Any] = {"rope_type": rope_type}
    if rope_type == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    refused(rope_type, "factor", rope_parameters=rope)
    if rope_type != "yarn":
        refused(rope_type, "factor", rope_parameters={**rope, "factor": None})


@pytest.mark.parametrize("name", ["low_freq_factor", "high_freq_factor"])
def test_refuses_a_missing_llama3_band(name: str) -> None:
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    del rope[name]
    refused("llama3", name, rope_parameters=rope)


@pytest.mark.parametrize(
    ("rope_type", "more"),
    [
        ("default", {"factor": 8.0}),
        ("default", {"factor": "all", "low_freq_factor": None, "original": [1]}),
        ("linear", {"beta_fast": 32, "beta_slow": 1, "attention_factor": 3.0}),
        ("linear", {"original_max_position_embeddings": 64}),
        ("dynamic", {"mscale": 0.7, "original_max_position_embeddings": 16}),
        ("yarn", {"finetuned": True, "short_factor": [1.0]}),
        ("yarn", {"low_freq_factor": 1.0, "mrope_section": [1, 2], "comment": "8x"}),
        ("llama3", {"attention_factor": 2.0, "mscale": 0.5, "truncate": False}),
        ("longrope", {"beta_fast": 4, "long_mscale": 1.2, "short_mscale": 1.1}),
    ],
)
def test_ignores_what_belongs_to_another_type_as_transformers_does(
    rope_type: str, more: dict[str, Any]
) -> None:
    rope = next(rope for rope, dim, _ in TABLE.values() if rope["rope_type"] == rope_type)
    _, dim, context = next(entry for entry in TABLE.values() if entry[0] is rope)
    mine = ours(context, dim, rope_parameters={**rope, **more})
    assert mine == ours(context, dim, rope_parameters=rope)
    assert_same_frequencies(mine, theirs(context, dim, rope_parameters={**rope, **more}))


@pytest.mark.parametrize("name", ["full_attention", "sliding_attention", "main"])
def test_refuses_parameters_for_each_kind_of_layer(name: str) -> None:
    rope = {name: {"rope_type": "linear", "factor": 2.0}}
    refused(name, "every layer", rope_parameters=rope)


@pytest.mark.parametrize("value", ["4", True, [4.0], -4.0, 0, float("nan"), float("inf")])
def test_refuses_a_malformed_factor(value: Any) -> None:
    refused("factor", repr(value), rope_parameters={"rope_type": "linear", "factor": value})


def test_refuses_a_truncate_that_is_a_number() -> None:
    refused("truncate", rope_scaling={"type": "yarn", "factor": 2.0, "truncate": 1})


@pytest.mark.parametrize("value", ["10000", True, [], -1.0, 0, float("nan")])
def test_refuses_a_malformed_rope_theta(value: Any) -> None:
    refused("rope_theta", rope_parameters={"rope_type": "default", "rope_theta": value})
    refused("rope_theta", rope_theta=value)


@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
def test_refuses_rope_fields_that_are_not_objects(name: str) -> None:
    raw: dict[str, Any] = {name: "linear"}
    refused(name, "linear", **raw)


def test_refuses_a_partial_rotation() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    refused("partial_rotary_factor", rope_parameters=rope)


def test_accepts_a_whole_partial_rotary_factor() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
    assert_same_frequencies(ours(CONTEXT, 16, rope_parameters=rope), theirs(CONTEXT, 16))


def test_refuses_an_odd_head_size() -> None:
    refused("even", "15", dim=15)


@pytest.mark.parametrize(
    "old",
    [
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5},
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 5e5},
        # transformers lets rope_scaling alone decide, so a value that it lacks is a difference.
        {"rope_type": "linear", "factor": 2.0},
    ],
)
def test_refuses_spellings_that_disagree(old: dict[str, Any]) -> None:
    new = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    refused("rope_scaling", "rope_parameters", "keep one", rope_parameters=new, rope_scaling=old)


@pytest.mark.parametrize("more", [{}, {"rope_theta": 5e5}, {"beta_fast": None}])
def test_takes_both_spellings_where_they_say_the_same(more: dict[str, Any]) -> None:
    old = {"type": "linear", "factor": 2}
    new = {"rope_type": "linear", "factor": 2.0, **more}
    mine = ours(CONTEXT, 16, rope_parameters=new, rope_scaling=old, rope_theta=5e5)
    alone = theirs(CONTEXT, 16, rope_scaling=copy.deepcopy(old), rope_theta=5e5)
    assert_same_frequencies(mine, alone)


@pytest.mark.parametrize("nothing", [{}, [], False, None])
@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
def test_an_empty_scaling_is_none(name: str, nothing: Any) -> None:
    fields = {name: nothing, "rope_theta": 5e5}
    assert_same_frequencies(ours(CONTEXT, 16, **fields), theirs(CONTEXT, 16, rope_theta=5e5))


def test_refuses_dynamic_frequencies_for_a_head_of_two() -> None:
    # The exponent of the grown base is D / (D - 2).
    raw = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}
    with pytest.raises(ConfigError, match="head size above 2"):
        RopeParameters.read(ConfigReader(raw, "olmoe"), 2, 64)
