"""The layout in which mamba_ssm writes Mamba2, such as in ``state-spaces/mamba2-130m``.

Source: https://github.com/state-spaces/mamba, ``models/config_mamba.py`` (the fields and their
defaults), ``models/mixer_seq_simple.py`` (padding of the vocabulary, tied embeddings) and
``modules/mamba2.py`` (what ``ssm_cfg`` may hold). The weights are those of transformers' layout,
under the same names but for the embedding's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ingot.graphs.config import QUANTISATION, ConfigError, ConfigReader
from ingot.plugins.errors import shown

LAYOUT = "mamba_ssm"
# What messages call the fields that make the sizes of its tensors.
SIZES = "mamba_ssm's d_model, vocab_size and ssm_cfg"

# How new weights are drawn, which kernels are taken, and how a model is spread over GPUs.
NO_EFFECT = (
    "A_init_range",
    "conv_init",
    "device",
    "dt_init_floor",
    "dt_max",
    "dt_min",
    "dtype",
    "layer_idx",
    "process_group",
    "sequence_parallel",
    "use_mem_eff_path",
)


def wrote(raw: dict[str, Any]) -> bool:
    """Whether a parsed ``config.json`` is mamba_ssm's, which names no ``model_type``."""
    return "model_type" not in raw and ("ssm_cfg" in raw or {"d_model", "n_layer"} <= raw.keys())


def config(raw: dict[str, Any]) -> dict[str, Any]:
    """The same config as transformers writes it; absent fields take mamba_ssm's defaults.

    Raises:
        ConfigError: a field of another type, or one that is not Mamba2's or not implemented.
    """
    model = ConfigReader(raw, LAYOUT)
    hidden_size = model.size("d_model", 2560)
    layers = model.size("n_layer", 64)
    vocabulary = model.size("vocab_size", 50277)
    multiple = model.size("pad_vocab_size_multiple", 8)
    model.must_be("d_intermediate", 0, "Mamba2's layers here have no MLP")
    model.must_be("attn_layer_idx", [], "Mamba2 here has no attention layers")
    model.must_be("rms_norm", True, "its layers have no other norm")
    model.must_be(QUANTISATION, {}, "packed weights are read in transformers' layout")
    # Of attention layers, of which there are none; and of the kernels that add and norm.
    model.ignore("attn_cfg", "fused_add_norm")
    result = {
        "model_type": "mamba2",
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary + -vocabulary % multiple,
        "residual_in_fp32": model.take("residual_in_fp32", bool, True),
        "tie_word_embeddings": model.take("tie_embeddings", bool, True),
        **_mixer(model.take("ssm_cfg", dict, {}), hidden_size),
    }
    # mamba_ssm writes none of these, but whoever prepares a folder for generation may.
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if name in raw:
            result[name] = raw[name]
    model.finish()
    return result


def _mixer(raw: dict[str, Any], hidden_size: int) -> dict[str, Any]:
    """What ``ssm_cfg`` says, as transformers' fields."""
    mixer = ConfigReader(raw, "mamba_ssm's Mamba2")
    layer = mixer.take("layer", str, "")
    if layer != "Mamba2":
        has = f"layer {shown(layer)}" if layer else "no layer, which means Mamba1"
        raise ConfigError(
            f"config.json: ssm_cfg of this mamba_ssm checkpoint has {has}; Ingot implements "
            '"layer": "Mamba2" alone.'
        )
    expand, head_size = mixer.size("expand", 2), mixer.size("headdim", 64)
    inner = expand * hidden_size
    if inner % head_size:
        raise ConfigError(
            f"config.json: expand {expand} times d_model {hidden_size} is {inner}, which is no "
            f"multiple of ssm_cfg's headdim {head_size}."
        )
    mixer.must_be("d_ssm", inner, "its mixers have no MLP")
    mixer.must_be("D_has_hdim", False, "D is one number a head")
    mixer.must_be("norm_before_gate", False, "it gates before the norm")
    mixer.must_be("learnable_init_states", False, "a sequence begins with states of zeros")
    mixer.ignore(*NO_EFFECT)
    result = {
        "expand": expand,
        "head_dim": head_size,
        "num_heads": inner // head_size,
        "state_size": mixer.size("d_state", 128),
        "n_groups": mixer.size("ngroups", 1),
        "conv_kernel": mixer.size("d_conv", 4),
        "chunk_size": mixer.size("chunk_size", 256),
        "hidden_act": mixer.choice("activation", {"silu": "silu", "swish": "silu"}, "silu"),
        "use_bias": mixer.take("bias", bool, False),
        "use_conv_bias": mixer.take("conv_bias", bool, True),
        "rms_norm": mixer.take("rmsnorm", bool, True),
    }
    if raw.get("dt_limit") is not None:
        result["time_step_limit"] = _dt_limit(mixer.take("dt_limit", list, []))
    mixer.finish()
    return result


def _dt_limit(given: list[Any]) -> list[Any]:
    """``[least, most]``, refused by the name that it has here."""
    numbers = [n for n in given if type(n) in (int, float)]
    if len(given) != 2 or len(numbers) != 2 or not 0 <= numbers[0] < numbers[1]:
        raise ConfigError(
            f"config.json: ssm_cfg's dt_limit is {shown(given)}; it must be two numbers, the first "
            "at least 0 and below the second, which may be Infinity."
        )
    return given


def tensor_names(config: dict[str, Any], stored: Iterable[str]) -> dict[str, str]:
    """What transformers calls each tensor.

    Args:
        config: by ``config``.
        stored: the names in mamba_ssm's layout.

    Raises:
        ConfigError: names that mamba_ssm itself would not load.
    """
    result = {name: _tensor_name(name) for name in stored}
    if len(set(result.values())) < len(result):
        raise ConfigError("the weights hold the embedding twice, in two spellings; keep one.")
    # transformers computes a norm that is stored whatever its config says.
    if not config["rms_norm"] and any(name.endswith(".mixer.norm.weight") for name in result):
        raise ConfigError(
            "config.json: ssm_cfg's rmsnorm is False, yet the weights hold the norm of the mixers; "
            "mamba_ssm loads no such checkpoint."
        )
    return result


def _tensor_name(stored: str) -> str:
    head, _, leaf = stored.rpartition("embedding.weight")
    return f"{head}embeddings.weight" if not leaf and head in ("", "backbone.") else stored
