"""Reading ``config.json``: what is accepted, what is refused, and that a refusal names the field.

The strict reader is tested through OLMoE's config, the one that every export reads.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import OlmoeConfig as TheirConfig

from ingot.graphs.config import ConfigError, ConfigReader
from ingot.graphs.config_fields import NO_EFFECT
from ingot.graphs.olmoe import OlmoeConfig
from ingot.plugins.errors import named

# allenai/OLMoE-1B-7B-0924, config.json as released, written by transformers 4.
RELEASED: dict[str, Any] = {
    "architectures": ["OlmoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "clip_qkv": None,
    "eos_token_id": 50279,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 1024,
    "max_position_embeddings": 4096,
    "model_type": "olmoe",
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "output_router_logits": False,
    "pad_token_id": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.01,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "vocab_size": 50304,
}

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "max_position_embeddings",
)
FLOATS = ("rms_norm_eps", "clip_qkv", "rope_theta")
BOOLS = ("attention_bias", "norm_topk_prob", "tie_word_embeddings")

# Every field away from its default, so that a field read under another's name shows.
UNUSUAL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "hidden_act": "gelu",
    "rms_norm_eps": 1e-4,
    "attention_bias": True,
    "clip_qkv": 7.5,
    "num_experts": 10,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "tie_word_embeddings": True,
    "max_position_embeddings": 77,
}


def refused(raw: dict[str, Any], *named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        OlmoeConfig.read(raw)
    for part in ("config.json", *named):
        assert part in str(caught.value)


@pytest.mark.parametrize("value", ["64", 64.0, True, [64], {"a": 1}])
@pytest.mark.parametrize("name", SIZES)
def test_refuses_a_size_that_is_not_an_integer(name: str, value: Any) -> None:
    refused({name: value}, f"{name} is {value!r}", "int")


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("name", SIZES)
def test_refuses_a_size_below_one(name: str, value: int) -> None:
    refused({name: value}, f"{name} is {value}", "at least 1")


@pytest.mark.parametrize("value", ["1e-5", True, [1.0], {"a": 1.0}])
@pytest.mark.parametrize("name", FLOATS)
def test_refuses_a_number_that_is_not_one(name: str, value: Any) -> None:
    refused({name: value}, f"{name} is {value!r}", "float")


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("name", FLOATS)
def test_refuses_the_numbers_that_json_does_not_have(name: str, text: str) -> None:
    # Python's parser takes them, and a NaN would pass for an absent clip_qkv.
    refused(json.loads(f'{{"{name}": {text}}}'), name, "finite")


@pytest.mark.parametrize("value", ["false", 1, 0.0, [True]])
@pytest.mark.parametrize("name", BOOLS)
def test_refuses_a_switch_that_is_not_a_bool(name: str, value: Any) -> None:
    refused({name: value}, f"{name} is {value!r}", "bool")


@pytest.mark.parametrize("value", [5, True, ["silu"]])
def test_refuses_an_activation_that_is_not_a_string(value: Any) -> None:
    refused({"hidden_act": value}, f"hidden_act is {value!r}", "str")


def test_refuses_an_unknown_activation_and_lists_the_known() -> None:
    refused({"hidden_act": "mish"}, "hidden_act", "'mish'", "olmoe", "silu", "gelu", "relu")


@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("value", ["linear", 4.0, [1]])
def test_refuses_rope_fields_that_are_not_objects(name: str, value: Any) -> None:
    refused({name: value}, f"{name} is {value!r}", "dict")


@pytest.mark.parametrize("value", [1, 0, 0.5, "on", True, [1], {"a": 1}])
def test_refuses_an_unknown_field_with_a_value(value: Any) -> None:
    refused({**RELEASED, "shared_experts": value}, f"shared_experts is {value!r}", "Remove")


@pytest.mark.parametrize("value", [None, False, [], {}])
def test_accepts_an_unknown_field_that_is_off(value: Any) -> None:
    assert OlmoeConfig.read({**RELEASED, "shared_experts": value}) == OlmoeConfig.read(RELEASED)


@given(st.text(min_size=1).filter(lambda name: name not in {*SIZES, *FLOATS, *BOOLS, *NO_EFFECT}))
def test_refuses_any_field_it_does_not_know(name: str) -> None:
    known = {"hidden_act", "head_dim", "rope_parameters", "rope_scaling", "quantization_config"}
    if name not in known:
        refused({name: 3}, named(name))


def test_reads_the_released_config() -> None:
    config = OlmoeConfig.read(RELEASED)
    assert config.intermediate_size == 1024  # not transformers' default
    for field in dataclasses.fields(OlmoeConfig):
        if field.name not in ("rope", "facts", "head_dim"):
            assert getattr(config, field.name) == RELEASED[field.name], field.name
    assert config.head_dim == 128
    assert (config.rope.rope_type, config.rope.rope_theta) == ("default", 10000.0)
    assert config.rope.max_position_embeddings == 4096
    assert config.rope.dim == 128


def test_leaves_the_parsed_config_as_it_was() -> None:
    raw = {**RELEASED, "rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 5e5}}
    before = json.dumps(raw)
    OlmoeConfig.read(raw)
    assert json.dumps(raw) == before  # the digest is made of it later


def same_as_theirs(ours: OlmoeConfig, theirs: TheirConfig) -> None:
    for field in dataclasses.fields(OlmoeConfig):
        if field.name not in ("rope", "facts", "hidden_act", "head_dim"):
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name
    assert ours.rope.max_position_embeddings == theirs.max_position_embeddings
    assert ours.rope.dim == theirs.hidden_size // theirs.num_attention_heads
    assert theirs.rope_parameters is not None
    assert ours.rope.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.rope.rope_type == theirs.rope_parameters["rope_type"]


def test_defaults_of_absent_fields_are_those_of_transformers() -> None:
    ours = OlmoeConfig.read({})
    same_as_theirs(ours, TheirConfig())
    assert ours.hidden_act == TheirConfig().hidden_act


@pytest.mark.parametrize("name", sorted({*SIZES, *FLOATS, *BOOLS, "hidden_act", "head_dim"}))
def test_null_is_the_default(name: str) -> None:
    assert OlmoeConfig.read({name: None}) == OlmoeConfig.read({})


def test_defaults_key_value_heads_to_the_heads() -> None:
    raw: dict[str, Any] = {"hidden_size": 48, "num_attention_heads": 6}
    assert OlmoeConfig.read(raw).num_key_value_heads == TheirConfig(**raw).num_key_value_heads == 6


def test_accepts_the_default_config_of_transformers_as_a_dict() -> None:
    same_as_theirs(OlmoeConfig.read(TheirConfig().to_dict()), TheirConfig())


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, "factor": 2.0}},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_theta": 3e4},
        {"output_router_logits": True, "router_aux_loss_coef": 0.1, "dtype": "bfloat16"},
        {"num_labels": 3, "problem_type": "regression", "attention_dropout": 0.5},
    ],
    ids=lambda more: ",".join(more) or "plain",
)
def test_accepts_a_config_that_transformers_saved(more: dict[str, Any], tmp_path: Path) -> None:
    theirs = TheirConfig(**UNUSUAL, **more)
    theirs.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    for config in (OlmoeConfig.read(raw), OlmoeConfig.read(theirs.to_dict())):
        same_as_theirs(config, theirs)
        assert config.hidden_act == "gelu"


def test_reads_every_field_under_its_own_name() -> None:
    config = OlmoeConfig.read(UNUSUAL)
    for field in dataclasses.fields(OlmoeConfig):
        if field.name not in ("rope", "facts", "head_dim"):
            assert getattr(config, field.name) == UNUSUAL[field.name], field.name
    assert config.rope.max_position_embeddings == UNUSUAL["max_position_embeddings"]


def test_reads_an_integer_where_a_float_belongs() -> None:
    config = OlmoeConfig.read({"clip_qkv": 8, "rope_theta": 500000})
    assert isinstance(config.clip_qkv, float) and config.clip_qkv == 8.0
    assert config.rope.rope_theta == 500000.0


@pytest.mark.parametrize(
    ("name", "operator"),
    [("swish", "silu"), ("gelu_new", "gelu_tanh"), ("gelu_pytorch_tanh", "gelu_tanh")],
)
def test_maps_other_names_of_an_activation(name: str, operator: str) -> None:
    assert OlmoeConfig.read({"hidden_act": name}).hidden_act == operator


@pytest.mark.parametrize(
    "value",
    [{"quant_method": "hqq", "bits": 4}, {"bits": 8}, "fp8", ["fp8"]],
)
def test_refuses_a_quantised_checkpoint(value: Any) -> None:
    method = value.get("quant_method", "unknown") if isinstance(value, dict) else "fp8"
    refused({**RELEASED, "quantization_config": value}, "quantization_config", method, "original")


def test_accepts_an_empty_quantization_config() -> None:
    raw = {**RELEASED, "quantization_config": None}
    assert OlmoeConfig.read(raw) == OlmoeConfig.read(RELEASED)


def test_refuses_a_hidden_size_that_heads_do_not_divide() -> None:
    raw = {"hidden_size": 50, "num_attention_heads": 4}
    refused(raw, "hidden_size 50", "num_attention_heads 4", "multiple")


def test_refuses_heads_that_key_value_heads_do_not_divide() -> None:
    raw = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 4}
    refused(raw, "num_attention_heads 6", "num_key_value_heads 4", "multiple")


def test_refuses_more_experts_per_token_than_there_are() -> None:
    raw = {"num_experts": 4, "num_experts_per_tok": 5}
    refused(raw, "num_experts_per_tok 5", "num_experts 4")


def test_accepts_as_many_experts_per_token_as_there_are() -> None:
    raw = {"num_experts": 4, "num_experts_per_tok": 4}
    assert OlmoeConfig.read(raw).num_experts_per_tok == 4


def test_refuses_another_head_dim() -> None:
    raw = {"hidden_size": 48, "num_attention_heads": 6, "head_dim": 16}
    refused(raw, "head_dim is 16", "8", "q_norm")


def test_accepts_the_head_dim_that_follows_from_the_heads() -> None:
    raw = {"hidden_size": 48, "num_attention_heads": 6, "head_dim": 8}
    assert OlmoeConfig.read(raw).head_dim == 8


def test_refuses_an_odd_head_size() -> None:
    refused({"hidden_size": 45, "num_attention_heads": 3}, "even", "15")


@pytest.mark.parametrize("value", [4096, True])
def test_refuses_a_sliding_window(value: Any) -> None:
    refused({**RELEASED, "sliding_window": value}, f"sliding_window is {value!r}")


def test_accepts_an_absent_sliding_window() -> None:
    raw = {**RELEASED, "sliding_window": None, "use_sliding_window": False}
    assert OlmoeConfig.read(raw) == OlmoeConfig.read(RELEASED)


def test_reads_the_other_name_of_the_experts() -> None:
    raw: dict[str, Any] = {"num_local_experts": 12}
    assert OlmoeConfig.read(raw).num_experts == TheirConfig(**raw).num_experts == 12


def test_refuses_two_numbers_of_experts() -> None:
    # transformers would take num_local_experts here.
    raw = {"num_experts": 12, "num_local_experts": 16}
    refused(raw, "num_local_experts is 16", "12", "num_experts")
    assert OlmoeConfig.read({**raw, "num_local_experts": 12}).num_experts == 12


def test_names_the_architecture_that_reads() -> None:
    reader = ConfigReader({"depth": "x", "mode": "y", "flag": 2}, "granite")
    for read in (
        lambda: reader.take("depth", int, 1),
        lambda: reader.choice("mode", {"z": 1}, "z"),
        lambda: reader.must_be("flag", 1, "of a reason"),
        ConfigReader({"extra": 1}, "granite").finish,
    ):
        with pytest.raises(ConfigError, match="granite"):
            read()


def test_finish_accepts_what_was_taken() -> None:
    reader = ConfigReader({"depth": 3, "flag": 1, "mode": "z", "x": 0.5}, "granite")
    assert reader.size("depth", 1) == 3
    assert reader.choice("mode", {"z": 26}, "z") == 26
    assert reader.optional_float("x") == 0.5
    reader.must_be("flag", 1, "of a reason")
    reader.finish()
    assert reader.optional_float("absent") is None


@pytest.mark.parametrize(
    ("value", "ids"), [(None, ()), (5, (5,)), ([3, 4], (3, 4)), ([], ()), (-1, (-1,))]
)
def test_reads_token_ids(value: Any, ids: tuple[int, ...]) -> None:
    assert ConfigReader({"eos_token_id": value}, "olmoe").token_ids("eos_token_id") == ids


@pytest.mark.parametrize("value", ["</s>", 2.0, True, [2, "x"], {"id": 2}])
def test_refuses_what_is_no_token_id(value: Any) -> None:
    refused({**RELEASED, "eos_token_id": value}, f"eos_token_id is {value!r}", "a list of them")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"hidden_size": 50, "num_attention_heads": 4},
            "hidden_size 50 is not a multiple of num_attention_heads 4",
        ),
        # The other field's default counts as well.
        (
            {"num_key_value_heads": 3},
            "num_attention_heads 16 is not a multiple of num_key_value_heads 3",
        ),
        ({"num_experts_per_tok": 65}, "num_experts_per_tok 65 is more than num_experts 64"),
    ],
)
def test_refuses_sizes_that_do_not_go_together(fields: dict[str, Any], message: str) -> None:
    refused(fields, message)
