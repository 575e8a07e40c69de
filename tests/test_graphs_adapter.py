"""Adapters that are refused, and what adapter_config.json says of names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import CONFIG, WEIGHTS, change_config, change_tensors, make_adapter
from conftest import MakeCheckpoint

from ingot.graphs.adapter import IGNORED, REFUSED, AdapterConfig
from ingot.graphs.merge import open_checkpoint
from ingot.plugins.errors import IngotError

Tensors = dict[str, torch.Tensor]
LAYER = "base_model.model.model.layers.1"
QUERY = f"{LAYER}.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint("granite")


@pytest.fixture(scope="module")
def good(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapts two projections, stores a norm and three rows of the embedding; read only."""
    return make_adapter(
        base,
        tmp_path_factory.mktemp("adapter"),
        target_modules=["q_proj", "down_proj"],
        modules_to_save=["model.norm"],
        trainable_token_indices=[3, 9, 4],
    )


@pytest.fixture
def adapter(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "adapter"))


def refused(base: Path, adapter: Path | None, *words: str) -> None:
    with pytest.raises(IngotError) as caught:
        open_checkpoint(base, adapter)
    said = str(caught.value)
    assert all(word in said for word in words), said
    assert len(said) < 700


def test_is_good(base: Path, adapter: Path) -> None:
    open_checkpoint(base, adapter)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA"),
        ({"peft_type": None}, "only LORA"),
        ({"peft_type": ["LORA"]}, "only LORA"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "LoftQ"}, "changes the weights"),
        ({"init_lora_weights": "tomorrow's"}, "tomorrow"),
        ({"r": 0}, "r is 0"),
        ({"r": "4"}, "r is '4'"),
        ({"r": True}, "r is True"),
        ({"r": 5}, "rank 5"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"rank_pattern": {"q_proj": -1}}, "rank_pattern of 'q_proj' is -1"),
        ({"rank_pattern": {"q_proj": 2}}, "rank 2"),
        ({"rank_pattern": ["q_proj"]}, "an object"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern of 'q_proj' is None"),
        ({"alpha_pattern": {"q_proj\\": 3}}, "is no regular expression"),
        ({"alpha_pattern": {"q_(proj": 3}}, "cannot be matched"),
        ({"alpha_pattern": {"q_*proj)": 3}}, "unbalanced parenthesis"),
        ({"use_rslora": "yes"}, "true or false"),
        ({"use_dora": True}, "without its lora_magnitude_vector"),
        ({"lora_bias": True}, "without its lora_B.bias"),
        ({"bias": "some"}, "one of none, all, lora_only"),
        ({"target_modules": ["q_proj"]}, "down_proj"),
        ({"target_modules": 3}, "a list of names"),
        ({"target_modules": [3]}, "a list of names"),
        ({"target_modules": None}, "does not target"),
        ({"target_modules": ["q_proj", "down_proj", "o_proj"]}, "self_attn.o_proj"),
        ({"target_modules": "all-linear"}, "has no tensors for it"),
        ({"target_modules": r".*\.(q_proj|down_proj|k_proj)"}, "self_attn.k_proj"),
        ({"target_modules": r".*\.(q_proj|down_proj"}, "cannot be matched"),
        ({"exclude_modules": ["layers.0.self_attn.q_proj"]}, "layers.0.self_attn.q_proj"),
        ({"layers_to_transform": [0]}, "does not target"),
        ({"layers_to_transform": "0"}, "the number of a layer"),
        ({"layers_to_transform": 1, "target_modules": "x"}, "regular expression"),
        ({"layers_to_transform": [0, 1], "layers_pattern": "h"}, "does not target"),
        ({"target_parameters": ["up_proj.weight"]}, "mlp.up_proj.weight"),
        ({"target_parameters": "up_proj.weight"}, "a list of names"),
        ({"modules_to_save": ["norm"]}, "input_layernorm"),
        ({"modules_to_save": ["embed_tokens", "model.norm"]}, "embed_tokens"),
        ({"trainable_token_indices": [3, 9]}, "makes it [2, 64]"),
        ({"trainable_token_indices": [3, 9, 512]}, "vocabulary of 512"),
        ({"trainable_token_indices": [3, 9, -1]}, "vocabulary of 512"),
        ({"trainable_token_indices": [3, 9, 9]}, "differ"),
        ({"trainable_token_indices": [3, 9, 4.0]}, "token ids"),
        ({"trainable_token_indices": None}, "trainable_token_indices"),
        ({"trainable_token_indices": {"embed_tokens": [3, 9, 4], "lm_head": [1]}}, "no rows"),
        ({"use_tomorrow": {"a": 1}}, "does not implement"),
        ({"alora_invocation_tokens": [5]}, "after some tokens"),
        ({"layer_replication": [[0, 1], [0, 2]]}, "repeats layers"),
        ({"use_bdlora": {"nblocks": 2}}, "block-diagonal"),
        ({"use_qalora": True}, "pooled"),
    ],
)
def test_refuses_a_config(fields: dict[str, Any], words: str, base: Path, adapter: Path) -> None:
    refused(base, change_config(adapter, **fields), words)


def test_takes_fields_that_change_no_weight(base: Path, adapter: Path) -> None:
    change_config(adapter, **dict.fromkeys(IGNORED, 0.25))
    change_config(adapter, **dict.fromkeys(REFUSED), use_next_year=None, layers_pattern=[])
    open_checkpoint(base, adapter)


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def added(name: str, *shape: int) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: torch.ones(shape)}


def renamed(part: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(part, new): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without(f"{QUERY}.lora_A.weight"), "without its lora_A"),
        (without(f"{QUERY}.lora_B.weight"), "without its lora_B"),
        (without("base_model.model.model.norm.weight"), "model.norm.weight"),
        (added(f"{QUERY}.lora_A.weight", 4, 63), "[4, 63]"),
        (added(f"{QUERY}.lora_B.weight", 4, 64), "make it [64, 4]"),
        (added(f"{QUERY}.lora_A.weight", 256), "[256]"),
        (added(f"{QUERY}.lora_A.other.weight", 4, 64), "says again"),
        (added(f"{QUERY}.lora_magnitude_vector", 64), "asks for none"),
        (added(f"{QUERY}.lora_B.bias", 64), "asks for none"),
        (added(f"{QUERY}.lora_C.weight", 4, 64), "has no place"),
        (added(f"{QUERY}.base_layer.lora_A.weight", 4, 64), "does not target"),
        (added(f"{QUERY}.lora_embedding_A", 4, 64), "asks for none"),
        (added(f"{LAYER}.self_attn.k_proj.lora_A.weight", 4, 64), "does not target"),
        (added("base_model.model.model.layers.7.mlp.up_proj.lora_A.weight", 4, 64), "no place"),
        (added("base_model.model.model.layers.7.mlp.up_proj.weight", 4, 64), "has no place"),
        (added(f"{LAYER}.input_layernorm.weight", 63), "the model makes it [64]"),
        (added(f"{LAYER}.input_layernorm.lora_A.weight", 4, 64), "does not target"),
        (added("model.layers.0.self_attn.q_proj.lora_A.weight", 4, 64), "base_model.model."),
        (added("base_model.model.model.norm.base_layer.weight", 64), "says again"),
        (added("base_model.model.model.embed_tokens.weight", 3, 4, 5), "[3, 4, 5]"),
        (added("base_model.model.x." + "y" * 100_000, 1), "has no place"),
        (lambda tensors: {name: each * float("nan") for name, each in tensors.items()}, "nan"),
        (lambda tensors: {name: each.to(torch.int8) for name, each in tensors.items()}, "is I8"),
        (renamed(".lora_B.weight", ".lora_B"), "by its end"),
        (renamed("trainable_tokens_delta", "trainable_tokens_delta.weight"), "by its end"),
        (renamed("model.model.layers.0.self_attn", "model.layers.0.self_attn"), "no place"),
        (renamed("model.model.norm", "model.norm"), "has no place"),
        (added("base_model.model.model.lm_head.weight", 512, 64), "has no place"),
        (lambda _tensors: {}, "no tensors"),
    ],
)
def test_refuses_tensors(
    change: Callable[[Tensors], Tensors], words: str, base: Path, adapter: Path
) -> None:
    refused(base, change_tensors(adapter, change), words)


def test_refuses_tensors_of_several_adapters(base: Path, adapter: Path) -> None:
    def named(tensors: Tensors) -> Tensors:
        return {
            name.replace("lora_A.", "lora_A.one.").replace("lora_B.", "lora_B.two."): tensor
            for name, tensor in tensors.items()
        }

    refused(base, change_tensors(adapter, named), "several adapters", "'one', 'two'")


def test_refuses_a_merge_that_overflows(base: Path, adapter: Path) -> None:
    change_tensors(adapter, lambda tensors: {name: each * 1e30 for name, each in tensors.items()})
    merged = open_checkpoint(base, adapter)
    with pytest.raises(IngotError, match=r"q_proj.*makes a NaN or an infinity"):
        merged.read("model.layers.0.self_attn.q_proj.weight")


def test_refuses_an_adapter_of_another_architecture(
    make_checkpoint: MakeCheckpoint, adapter: Path
) -> None:
    refused(make_checkpoint("mamba2"), adapter, "has no place in this mamba2 model")
    refused(make_checkpoint("granite", num_hidden_layers=1), adapter, "has no place")
    refused(make_checkpoint("granite", num_hidden_layers=3), adapter, "has no tensors for it")
    refused(make_checkpoint("granite", hidden_size=32), adapter, "shape")


def test_sizes_are_bounded_before_a_model_is_made(
    make_checkpoint: MakeCheckpoint, adapter: Path
) -> None:
    base = make_checkpoint("granite")
    raw = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**raw, "num_hidden_layers": 10**9}))
    refused(base, adapter, "num_hidden_layers is 1000000000")


def test_refuses_lora_of_a_convolution(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    base = make_checkpoint("mamba2")
    adapter = make_adapter(base, tmp_path, target_modules=["in_proj"])
    change_config(adapter, target_modules=["in_proj", "conv1d"])
    layer = "base_model.model.backbone.layers.0.mixer.conv1d"

    def convolution(tensors: Tensors) -> Tensors:
        ends = {f"{layer}.lora_A.weight": (4, 192, 4), f"{layer}.lora_B.weight": (192, 4, 1)}
        return {**tensors, **{name: torch.ones(shape) for name, shape in ends.items()}}

    refused(base, change_tensors(adapter, convolution), "conv1d")


def test_refuses_folders_that_hold_no_adapter(base: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(base, tmp_path / "empty", CONFIG)
    refused(base, tmp_path / "nowhere", "is not a folder")
    refused(base, adapter / WEIGHTS, "is not a folder")
    refused(base, tmp_path, "One is in its folder 'adapter'")
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    refused(base, adapter, "pickle", "save_pretrained")
    (adapter / "adapter_model.bin").unlink()
    refused(base, adapter, f"no {WEIGHTS}")


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "[" * 10_000, '{"r": 1', "\ufeff{}", '{"r": ' + "9" * 5000 + "}"]
)
def test_refuses_a_config_that_is_no_object(text: str, base: Path, adapter: Path) -> None:
    (adapter / CONFIG).write_text(text)
    refused(base, adapter, CONFIG)


def test_refuses_a_truncated_file(base: Path, adapter: Path) -> None:
    raw = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(raw[:-100])
    refused(base, adapter, "not a whole safetensors file")


def test_an_adapter_in_the_checkpoint_is_not_forgotten(
    base: Path, adapter: Path, good: Path, tmp_path: Path
) -> None:
    both = Path(shutil.copytree(base, tmp_path / "both"))
    for name in (CONFIG, WEIGHTS):
        shutil.copy(adapter / name, both / name)
    refused(both, None, f"--adapter {both}", "or remove it")
    refused(both, good, "beside the model")
    merged = open_checkpoint(both, both)
    assert merged.digest() != open_checkpoint(base).digest()


def test_an_adapter_is_no_model(adapter: Path) -> None:
    for name in (None, "", 3, "x" * 500, "org/a\x1b[2Jb"):
        change_config(adapter, base_model_name_or_path=name)
        refused(adapter, None, "no model", f"--model BASE --adapter {adapter}")
    change_config(adapter, base_model_name_or_path="org/base-of-it")
    refused(adapter, None, f"--model org/base-of-it --adapter {adapter}")
    refused(adapter, adapter, "no model")


@pytest.mark.parametrize("field", ["alpha_pattern", "target_modules"])
def test_a_pattern_that_takes_years_is_refused(
    field: str, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ingot.graphs.patterns.SECONDS", 1)
    hostile = "(([a-z._0-9]+)+)+!"
    change_config(adapter, **{field: hostile if field == "target_modules" else {hostile: 3}})
    refused(base, adapter, CONFIG, "takes more than 1 seconds")


NAMES = [f"model.layers.{n}.self_attn.{which}_proj" for n in (0, 1, 11) for which in "qk"]


def read(folder: Path, **fields: Any) -> AdapterConfig:
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", **fields}))
    return AdapterConfig.read(folder)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"target_modules": ["q_proj"]}, NAMES[::2]),
        ({"target_modules": ["proj"]}, []),
        ({"target_modules": ["1.self_attn.k_proj"]}, [NAMES[3]]),
        ({"target_modules": [NAMES[4]]}, [NAMES[4]]),
        ({"target_modules": "q_proj"}, []),
        ({"target_modules": r"model.*\.1\..*q_proj"}, [NAMES[2]]),
        ({"target_modules": r"model.*[01]\..*"}, NAMES),
        ({"target_modules": "All-Linear", "exclude_modules": ["k_proj"]}, NAMES[::2]),
        ({"target_modules": ["q_proj"], "exclude_modules": r".*\.1\..*"}, [NAMES[0], NAMES[4]]),
        ({"target_modules": ["q_proj"], "layers_to_transform": 11}, [NAMES[4]]),
        ({"target_modules": ["q_proj"], "layers_to_transform": []}, NAMES[::2]),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
            [NAMES[0]],
        ),
        ({"target_modules": ["q_proj"], "modules_to_save": ["self_attn"]}, []),
        ({"target_modules": "(?i)model.*Q_PROJ"}, NAMES[::2]),
        ({"target_modules": ["q_proj"], "modules_to_save": ["attn"]}, NAMES[::2]),
    ],
)
def test_targets_what_peft_targets(
    fields: dict[str, Any], expected: list[str], tmp_path: Path
) -> None:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    assert read(tmp_path, **fields).targeted(NAMES) == set(expected)
    if fields["target_modules"] != "All-Linear":
        config = LoraConfig(**fields)
        assert [n for n in NAMES if check_target_module_exists(config, n)] == expected


@pytest.mark.parametrize(
    "patterns",
    [
        {"q_proj": 2, "self_attn.q_proj": 3},
        {"self_attn.q_proj": 3, "q_proj": 2},
        {r"layers\.1\..*": 2, "layers.11.self_attn.(q|k)_proj": 4},
        {r".*\.k_proj": 2, "k_proj": 3, "^model.layers.0.self_attn.k_proj": 5},
        {"^q_proj": 2, "^model.*0.*": 6, "proj": 7, "1": 8},
        {r"layers\.\d{2}\.self_attn\.\w_proj": 9, "layers.1.self_attn..+": 3},
    ],
)
def test_finds_the_rank_that_peft_finds(patterns: dict[str, int], tmp_path: Path) -> None:
    from peft.utils.other import get_pattern_key

    config = read(tmp_path, r=5, lora_alpha=1, rank_pattern=patterns)
    expected = {name: patterns.get(get_pattern_key(list(patterns), name), 5) for name in NAMES}
    found = config.scalings(NAMES)
    assert {name: rank for name, (rank, _) in found.items()} == expected
    assert all(scaling == 1 / rank for rank, scaling in found.values())


def test_every_field_of_peft_has_a_place() -> None:
    import dataclasses

    from peft import LoraConfig

    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    honoured = {
        *("alpha_pattern", "bias", "ensure_weight_tying", "exclude_modules", "init_lora_weights"),
        *("layers_pattern", "layers_to_transform", "lora_alpha", "lora_bias", "modules_to_save"),
        *("peft_type", "r", "rank_pattern", "target_modules", "target_parameters"),
        *("trainable_token_indices", "use_dora", "use_rslora"),
    }
    assert fields == honoured | IGNORED.keys() | REFUSED.keys()
    assert not honoured & (IGNORED.keys() | REFUSED.keys()) and not IGNORED.keys() & REFUSED.keys()
