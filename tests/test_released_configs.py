"""Released models' own ``config.json``, every field present, at small sizes against transformers.

The files of ``data/released`` are written down from public records of the models. Their sizes are
scaled here, and a token id that a smaller vocabulary lacks is another one; nothing else is changed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeIngot
from oracle import LIMIT, relative_rms
from transformers import AutoConfig, AutoModelForCausalLM

from ingot.graphs.checkpoint import Checkpoint
from ingot.graphs.family import find_family
from ingot.runtime.loading import load
from ingot.runtime.session import Session
from ingot.validate.truth.eager import EagerSession

RELEASED = Path(__file__).parent / "data" / "released"
NAMES = sorted(file.stem for file in RELEASED.glob("*.json"))
VOCABULARY, TOKENS = 320, 24

# By family, what is scaled; all but the sizes of JetMoE's experts, whose config says them by names
# that transformers does not read, so that its defaults count.
SMALL: dict[str, dict[str, Any]] = {
    "granite": {"hidden_size": 72, "intermediate_size": 96, "num_hidden_layers": 2},
    "olmoe": {
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_experts": 16,
    },
    "jetmoe": {"hidden_size": 32, "kv_channels": 4, "num_hidden_layers": 1},
    "mamba2": {"hidden_size": 64, "head_dim": 16, "num_heads": 8, "num_hidden_layers": 2},
}


def _released(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((RELEASED / f"{name}.json").read_text())
    return config


def _scaled(config: dict[str, Any]) -> dict[str, Any]:
    small = {**config, **SMALL[config["model_type"]], "vocab_size": VOCABULARY}
    if config["model_type"] == "granite":
        # As many groups of query heads as in the release.
        groups = config["num_attention_heads"] // config["num_key_value_heads"]
        small |= {"num_attention_heads": 4, "num_key_value_heads": 4 // groups}
    if "intermediate_size" in config and config["model_type"] == "mamba2":
        small["intermediate_size"] = small["expand"] * small["hidden_size"]
    for id_ in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if config.get(id_) is not None:
            small[id_] = config[id_] % VOCABULARY
    return small


def _theirs(config: dict[str, Any]) -> Any:
    # `auto_map` names code that is in no folder here, nor is it to be run.
    return AutoConfig.for_model(**{name: config[name] for name in config if name != "auto_map"})


def _redraw(model: torch.nn.Module) -> None:
    """Weights with which activations stay near 1; transformers' own leave most of them near 0."""
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        if "norm" in name or name.endswith(".D"):
            parameter.data = 1 + 0.1 * noise
        elif parameter.dim() > 1:
            parameter.data = noise / parameter.shape[-1] ** 0.5
        elif name.endswith("bias") and "dt_bias" not in name:
            parameter.data = 0.1 * noise


def _write(name: str, folder: Path) -> Any:
    """A checkpoint by transformers under the released config, and transformers' reading of it."""
    scaled = _scaled(_released(name))
    torch.manual_seed(11)
    automatic: Any = AutoModelForCausalLM
    model = automatic.from_config(_theirs(scaled), dtype=torch.float32)
    _redraw(model)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(scaled))
    return automatic.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)


def _check(model: Any, session: Session | EagerSession) -> None:
    ids = np.random.default_rng(4).integers(2, VOCABULARY, (2, TOKENS))
    ones = np.ones_like(ids)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids), use_cache=False).logits.numpy()
    session.reset(2, TOKENS)
    found = [session.step(ids[:, :20], ones[:, :20])]
    found += [session.step(ids[:, at : at + 1], ones[:, at : at + 1]) for at in range(20, TOKENS)]
    assert relative_rms(expected, np.concatenate(found, axis=1)) < LIMIT


@pytest.mark.parametrize("name", NAMES)
def test_computes_what_transformers_does(name: str, tmp_path: Path) -> None:
    model = _write(name, tmp_path)
    _check(model, EagerSession(Checkpoint.open(tmp_path), "generate"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["Mamba-Codestral-7B-v0.1", "OLMoE-1B-7B-0924-Instruct", "PowerLM-3b", "jetmoe-8b-chat"],
)
def test_an_ingot_computes_what_transformers_does(
    name: str, tmp_path: Path, make_ingot: MakeIngot
) -> None:
    model = _write(name, tmp_path)
    _check(model, load(make_ingot(tmp_path, "ort")))


@pytest.mark.parametrize("name", NAMES)
def test_reads_every_size_as_transformers_does(name: str) -> None:
    released = _released(name)
    ours = find_family(released["model_type"]).read_config(released)
    theirs = _theirs(released)
    for field, value in vars(ours).items():
        if isinstance(value, int | float) and hasattr(theirs, field):
            assert value == getattr(theirs, field), field
    assert ours.facts.context_length == getattr(theirs, "max_position_embeddings", None)
