"""Fields that no graph reads: transformers computes the same with them, and others are refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeCheckpoint
from kinds import every_family
from oracle import relative_rms
from transformers import AutoModelForCausalLM

from ingot.graphs.checkpoint import Checkpoint
from ingot.graphs.config import ConfigError
from ingot.graphs.config_fields import NEUTRAL, NO_EFFECT, SYNONYMS
from ingot.graphs.family import find_family
from ingot.graphs.names import FAMILIES
from ingot.graphs.preset import preset_config
from ingot.validate.truth.eager import EagerSession

# Where transformers checks a type, or acts on the value before any forward pass; the others get a
# number that would show if something were multiplied with it.
TYPED: dict[str, Any] = {
    "_attn_implementation": "eager",
    "_attn_implementation_internal": "sdpa",
    "_experts_implementation": "eager",
    "_experts_implementation_internal": "eager",
    "architectures": ["SomeForCausalLM"],
    "attn_implementation": "eager",
    "auto_map": {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.X"},
    "base_model_ep_plan": {"layers.*": "grouped_gemm"},
    "base_model_fsdp_plan": {},
    "base_model_pp_plan": {},
    "base_model_tp_plan": {},
    "bos_token_id": 5,
    "cache_implementation": "dynamic",
    "chunk_size_feed_forward": 16,
    "compile_config": None,
    "dtype": "float32",
    "experts_implementation": "eager",
    "id2label": {"0": "no", "1": "yes", "2": "both"},
    "label2id": {"no": 0, "yes": 1, "both": 2},
    "model_type": None,
    "num_labels": 3,
    "num_logits_to_keep": 1,
    "output_attentions": False,
    "output_hidden_states": True,
    "output_router_logits": True,
    "problem_type": "regression",
    "return_dict": True,
    "torch_dtype": "float32",
    "tp_plan": {},
    "transformers_version": "4.44.0",
    "use_cache": False,
}
# Of those that steer drawing some; transformers checks most of them against one another.
DRAWING = {"do_sample": True, "temperature": 0.37, "top_k": 7, "top_p": 0.5, "max_length": 20}


# Fields that a family reads, or that transformers does not read of it.
READ = {
    "sliding_window": ("mixtral", "qwen3_moe"),
    "partial_rotary_factor": ("bamba",),
    "shared_intermediate_size": ("granitemoehybrid", "granitemoeshared"),
    "moe_intermediate_size": ("qwen3_moe",),
}


def _all_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Every field of the tables that a config can have beside its own."""
    fields = {name: TYPED.get(name, 0.37) for name, why in NO_EFFECT.items() if "drawn" not in why}
    fields |= {**DRAWING, **NEUTRAL}
    for name, known in SYNONYMS.items():
        for other in known:
            if other in config:
                fields[name] = config[other]
    return {name: value for name, value in fields.items() if value is not None}


@pytest.mark.parametrize("family", every_family())
def test_every_field_leaves_the_logits_of_transformers(
    family: str, make_checkpoint: MakeCheckpoint
) -> None:
    folder = make_checkpoint(family)
    file = folder / "config.json"
    plain = json.loads(file.read_text())
    more = {n: v for n, v in _all_fields(plain).items() if family not in READ.get(n, ())}
    file.write_text(json.dumps({**more, **plain}))
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    )
    ids = np.random.default_rng(5).integers(0, plain["vocab_size"], (2, 21))
    with torch.no_grad():
        expected = model(torch.from_numpy(ids), use_cache=False).logits.numpy()
    session = EagerSession(Checkpoint.open(folder), "generate")
    session.reset(2, 21)
    assert relative_rms(expected, session.step(ids, np.ones_like(ids))) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("value", [0, 1, -3.5, "x", True, [1], {"a": 1}, 10**400])
def test_no_value_of_a_field_without_effect_is_refused(family: str, value: Any) -> None:
    found = find_family(family)
    config = preset_config(found, "tiny")
    taken = {"id2label", "num_labels", "bos_token_id", *config}
    more = {name: value for name in NO_EFFECT if name not in taken}
    assert found.read_config({**more, **config}) == found.read_config(config)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sliding_window", 4096),
        ("sliding_window", 1),
        ("attn_logit_softcapping", 30.0),
        ("final_logit_softcapping", 50),
        ("partial_rotary_factor", 0.5),
        ("rotary_pct", 0.25),
        ("use_rope", 1),
        ("use_rope", False),
        ("causal", False),
        ("is_causal", False),
        ("position_embedding_type", "absolute"),
        ("position_embedding_type", "alibi"),
        ("alibi", True),
        ("use_qk_norm", True),
        ("is_encoder_decoder", True),
        ("add_cross_attention", True),
        ("per_layer_config", {"0": {"head_dim": 8}}),
        ("num_shared_experts", 2),
        ("n_shared_experts", 1),
        ("shared_intermediate_size", 32),
        ("routed_scaling_factor", 2.5),
        ("topk_method", "noaux_tc"),
        ("scoring_func", "sigmoid"),
        ("logit_scale", 0.0625),
        ("num_nextn_predict_layers", 1),
        ("layer_types", ["sliding_attention", "full_attention"]),
        ("layer_types", ["full_attention"]),
        ("layer_types", "full_attention"),
        ("layer_types", [["full_attention"], {}]),
        ("vision_config", {"hidden_size": 8}),
        ("adapter", "lora"),
        ("attention_chunk_size", 128),
        ("no_rope_layers", [1, 0]),
        ("pruned_heads", {"0": [1]}),
        ("use_parallel_residual", True),
    ],
    ids=str,
)
def test_refuses_what_would_change_numbers(family: str, name: str, value: Any) -> None:
    if family in READ.get(name, ()):
        pytest.skip("the family has the field")
    found = find_family(family)
    with pytest.raises(ConfigError, match=name):
        found.read_config({**preset_config(found, "tiny"), name: value})


@pytest.mark.parametrize("name", NEUTRAL)
def test_refuses_another_value_than_the_one_that_changes_nothing(name: str) -> None:
    found = find_family("jetmoe")
    other = "learned" if isinstance(NEUTRAL[name], str) else 3
    with pytest.raises(ConfigError, match=name):
        found.read_config({**preset_config(found, "tiny"), name: other})


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        ("granite", {"layer_types": ["full_attention"] * 2, "mlp_layer_types": ["dense"] * 2}),
        ("granite", {"layer_types": ["attention", "full_attention"]}),
        ("olmoe", {"layer_types": ["full_attention"] * 2, "mlp_layer_types": ["sparse"] * 2}),
        ("jetmoe", {"layer_types": ["attention"] * 2, "mlp_layer_types": ["moe"] * 2}),
        ("mamba2", {"layer_types": ["linear_attention"] * 2}),
        ("mamba2", {"layers_block_type": ["mamba", "mamba2"]}),
    ],
)
def test_takes_kinds_of_layers_that_are_those_of_the_model(
    family: str, kinds: dict[str, list[str]]
) -> None:
    found = find_family(family)
    config = preset_config(found, "tiny")
    assert found.read_config({**config, **kinds}) == found.read_config(config)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SYNONYMS)
def test_refuses_another_name_of_a_field_that_says_something_else(family: str, name: str) -> None:
    found = find_family(family)
    config = preset_config(found, "tiny")
    if family == "mamba2" and SYNONYMS[name] == ("max_position_embeddings",):
        pytest.skip("a recurrence has no positions")
    if family in READ.get(name, ()):
        pytest.skip("the family has the field")
    with pytest.raises(ConfigError, match=name):
        found.read_config({**config, name: 5 if name != "hidden_activation" else "relu"})


def test_takes_another_name_of_a_default() -> None:
    found = find_family("olmoe")
    names = {"n_embd": 2048, "n_layer": 16, "n_head": 16, "moe_num_experts": 64, "moe_top_k": 8}
    assert found.read_config({**names, "norm_eps": 1e-05}) == found.read_config({})


# What jetmoe/jetmoe-8b's config.json says by the names of JetMoE's own code.
JETMOE_OWN_NAMES = {
    "bias": True,
    "ffn_hidden_size": 5632,
    "glu": True,
    "layer_norm_epsilon": 1e-05,
    "moe_num_experts": 8,
    "moe_top_k": 2,
    "n_positions": 4096,
    "num_attention_heads": 32,
    "num_layers": 12,
    "rotary_percent": 1.0,
}


def test_jetmoe_takes_its_own_names_of_the_defaults() -> None:
    found = find_family("jetmoe")
    assert found.read_config(JETMOE_OWN_NAMES) == found.read_config({})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ffn_hidden_size", 64),
        ("moe_num_experts", 4),
        ("moe_top_k", 1),
        ("n_positions", 2048),
        ("num_attention_heads", 16),
        ("num_layers", 24),
        ("glu", False),
        ("bias", False),
        ("bias", 1),
    ],
)
def test_jetmoe_refuses_its_own_names_of_something_else(name: str, value: Any) -> None:
    # transformers would read the default all the same, and compute with other sizes than these.
    with pytest.raises(ConfigError, match=rf"{name} is {value}"):
        find_family("jetmoe").read_config({**JETMOE_OWN_NAMES, name: value})


def test_jetmoe_reads_no_epsilon_of_its_layers() -> None:
    found = find_family("jetmoe")
    assert found.read_config({"layer_norm_epsilon": 0.5}) == found.read_config({})
