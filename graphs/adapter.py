"""What an adapter says of itself: PEFT's ``adapter_config.json``, field by field.

Source: peft 0.21, ``peft/tuners/lora/config.py``; what a name or a pattern matches is in
``check_target_module_exists`` of ``peft/tuners/tuners_utils.py`` and ``get_pattern_key`` of
``peft/utils/other.py``. Every field is honoured, refused, or in a table that says why it changes no
weight. Nothing here needs PyTorch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ingot.graphs.patterns import full_matches
from ingot.plugins.errors import IngotError, shown
from ingot.plugins.json_fields import safe
from ingot.plugins.json_file import JsonError, read_json

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_PICKLE = "adapter_model.bin"
ALL_LINEAR = "all-linear"
NAME = re.compile(r"[\w.-]+")

# Field -> why it changes none of the merged weights.
IGNORED = {
    "auto_mapping": "the class that was trained, which the base's config.json names as well",
    "base_model_name_or_path": "a name, which a copy of the base need not have",
    "corda_config": "how the tensors began",
    "eva_config": "how the tensors began",
    "fan_in_fan_out": "of Conv1D alone; PEFT itself takes it for false at every nn.Linear",
    "inference_mode": "whether gradients are kept",
    "loftq_config": "how the tensors began, where init_lora_weights says so",
    "lora_dropout": "of the training",
    "lora_ga_config": "how the tensors began, where init_lora_weights says so",
    "megatron_core": "a package, for megatron_config",
    "peft_version": "who wrote it",
    "qalora_group_size": "of use_qalora",
    "revision": "of base_model_name_or_path",
    "runtime_config": "where a forward pass computes",
    "task_type": "which head was trained; the tensors name it",
    "velora_config": "another backward pass",
}
# Field -> what it would make of the adapter, where it says more than null, false or nothing.
REFUSED = {
    "alora_invocation_tokens": "it acts after some tokens only, and no weight can hold that",
    "arrow_config": "it chooses among adapters at every token",
    "kasa_config": "it truncates the base's weights first",
    "layer_replication": "it repeats layers",
    "megatron_config": "it is of Megatron's parallel layers",
    "monteclora_config": "it samples",
    "use_bdlora": "its matrices are block-diagonal",
    "use_qalora": "its inputs are pooled in groups",
}
# Values of init_lora_weights after which the weights below the adapter are no longer the base's.
CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
INIT = (True, False, "gaussian", "eva", "orthogonal", "mica")


class AdapterError(IngotError):
    """An adapter that cannot be read, or cannot be merged into the model it is given for."""


@dataclass(frozen=True)
class AdapterConfig:
    """An ``adapter_config.json`` of LoRA, DoRA included.

    Attributes:
        raw: the file, parsed.
        rank: r of what ``rank_pattern`` does not name.
        alpha: alpha of what ``alpha_pattern`` does not name.
        rank_pattern: pattern -> r.
        alpha_pattern: pattern -> alpha.
        root_scaling: alpha is divided by the square root of r (``use_rslora``).
        magnitudes: each target has a vector of magnitudes (``use_dora``).
        lora_bias: each target's B has a bias.
        tied: what adapts a tied embedding adapts the head as well (``ensure_weight_tying``).
        bias: which biases were trained: ``none``, ``all`` or ``lora_only``.
        targets: names of modules, or one regular expression.
        excluded: the same, of what is not targeted after all.
        parameters: names of targeted parameters that are no module of their own.
        layers: numbers of the layers that ``targets`` is of; None for all.
        layers_pattern: what lists of layers are called; empty for any name.
        saved: names of modules that are stored whole (``modules_to_save``).
        token_rows: name of an embedding -> rows of it that are stored
            (``trainable_token_indices``).
    """

    raw: dict[str, Any]
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    root_scaling: bool
    magnitudes: bool
    lora_bias: bool
    tied: bool
    bias: str
    targets: str | tuple[str, ...]
    excluded: str | tuple[str, ...]
    parameters: tuple[str, ...]
    layers: frozenset[int] | None
    layers_pattern: tuple[str, ...]
    saved: tuple[str, ...]
    token_rows: Mapping[str, tuple[int, ...]]

    @classmethod
    def read(cls, folder: Path) -> AdapterConfig:
        """Read the ``adapter_config.json`` of a folder.

        Raises:
            AdapterError: none there, one of another kind of adapter, or a field that is of another
                type or says what a merge cannot do.
        """
        raw = _read_object(folder)
        kind = raw.get("peft_type")
        if kind != "LORA":
            raise AdapterError(
                f"{folder / ADAPTER_CONFIG}: peft_type is {shown(kind)}; only LORA is merged. "
                "Merge it with PEFT where it has a merge_and_unload, and export the result."
            )
        fields = _Fields(raw, folder)
        token_rows = fields.token_rows()
        targets = fields.names_or_pattern("target_modules")
        parameters = fields.names("target_parameters")
        layers_pattern = raw.get("layers_pattern") or ()
        result = cls(
            raw=raw,
            rank=fields.rank("r", raw.get("r", 8)),
            alpha=fields.number("lora_alpha", raw.get("lora_alpha", 8)),
            rank_pattern={
                name: fields.rank(f"rank_pattern of {shown(name)}", value)
                for name, value in fields.table("rank_pattern").items()
            },
            alpha_pattern={
                name: fields.number(f"alpha_pattern of {shown(name)}", value)
                for name, value in fields.table("alpha_pattern").items()
            },
            root_scaling=fields.flag("use_rslora"),
            magnitudes=fields.flag("use_dora"),
            lora_bias=fields.flag("lora_bias"),
            tied=fields.flag("ensure_weight_tying"),
            bias=fields.choice("bias", ("none", "all", "lora_only")),
            targets=targets,
            excluded=fields.names_or_pattern("exclude_modules"),
            parameters=parameters,
            layers=fields.layers(),
            layers_pattern=(
                (layers_pattern,)
                if isinstance(layers_pattern, str)
                else fields.names("layers_pattern")
            ),
            saved=fields.names("modules_to_save"),
            token_rows=token_rows,
        )
        fields.finish()
        return result

    def targeted(self, modules: Sequence[str]) -> set[str]:
        """Which modules the adapter adapts, of those whose names are given.

        Names are those of the model that was trained. ``all-linear`` matches every name: what is
        linear, the caller knows.

        Raises:
            PatternError: a regular expression that does not compile or takes too long.
        """
        if isinstance(self.targets, str) and self.targets.lower() == ALL_LINEAR:
            found = set(modules)
        elif isinstance(self.targets, str):
            (found,) = full_matches([self.targets], modules)
        else:
            found = {name for name in modules if _ends_in(name, set(self.targets))}
            if self.layers is not None:
                found = {name for name in found if self._layer_of(name) in self.layers}
        if isinstance(self.excluded, str):
            (left_out,) = full_matches([self.excluded], modules)
        else:
            left_out = {name for name in found if _ends_in(name, set(self.excluded))}
        return {name for name in found - left_out if not self._inside_saved(name)}

    def targets_parameter(self, name: str) -> bool:
        """Whether ``target_parameters`` names a parameter of the model that was trained."""
        return _ends_in(name, set(self.parameters))

    def saves(self, parameter: str) -> bool:
        """Whether a parameter lies in a module that is stored whole."""
        # PEFT asks of the end of a module's name alone, so "norm" is "input_layernorm" as well.
        owners = parameter.split(".")[:-1]
        above = (".".join(owners[:count]) for count in range(1, len(owners) + 1))
        return bool(self.saved) and any(name.endswith(self.saved) for name in above)

    def scalings(self, names: Sequence[str]) -> dict[str, tuple[int, float]]:
        """Rank and scaling of every name: of a module, or of a parameter that is targeted itself.

        Raises:
            PatternError: a regular expression that does not compile or takes too long.
        """
        ranks = _by_pattern(self.rank_pattern, names)
        alphas = _by_pattern(self.alpha_pattern, names)
        result = {}
        for name in names:
            rank, alpha = ranks.get(name, self.rank), alphas.get(name, self.alpha)
            result[name] = rank, alpha / (math.sqrt(rank) if self.root_scaling else rank)
        return result

    def _inside_saved(self, module: str) -> bool:
        parts = module.split(".")
        tails = {
            ".".join(parts[first:last])
            for first in range(len(parts))
            for last in range(first + 1, len(parts) + 1)
        }
        return not tails.isdisjoint(self.saved)

    def _layer_of(self, module: str) -> int | None:
        lists = self.layers_pattern or (r"[^.]*",)
        for name in lists:
            text = name if not self.layers_pattern else re.escape(name)
            # The first number that a list's name comes before: a layer's, and not an expert's.
            before = r".*?\." if not self.layers_pattern else r"(?:^|.*?\.)"
            found = re.match(rf"{before}{text}\.(\d+)\.", module)
            if found:
                return int(found[1])
        return None


def read_adapter(folder: Path) -> AdapterConfig:
    """The config of an adapter folder, whose tensors are in it as well.

    Raises:
        AdapterError: see ``AdapterConfig.read``; or no tensors, or a pickle of them.
    """
    config = AdapterConfig.read(folder)
    if (folder / ADAPTER_WEIGHTS).is_file():
        return config
    if (folder / ADAPTER_PICKLE).is_file():
        raise AdapterError(
            f"{folder} holds its adapter as a pickle ({ADAPTER_PICKLE}); loading a pickle can run "
            "any code, so Ingot reads safetensors alone. Load it with PEFT and save it again: "
            "save_pretrained(DIR) writes safetensors."
        )
    raise AdapterError(f"{folder} has {ADAPTER_CONFIG} and no {ADAPTER_WEIGHTS}.")


def base_of(folder: Path) -> str | None:
    """The name of the model that a folder's adapter is of, where its config says it."""
    name = _read_object(folder).get("base_model_name_or_path")
    # One to be typed again, so no other than the file has.
    usable = isinstance(name, str) and 0 < len(name) <= 200 and name == safe(name)
    return name if usable else None


def refuse_forgotten(folder: Path, adapter: Path | None, hub_name: str | None = None) -> None:
    """Refuse a checkpoint folder with an adapter in it that nobody asked to merge.

    Args:
        folder: of the checkpoint.
        adapter: the folder of the adapter that is merged, if any is.
        hub_name: what the checkpoint was asked for by, where it is from the hub.

    Raises:
        AdapterError: naming both ways out.
    """
    files = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER_PICKLE)
    there = [name for name in files if (folder / name).is_file()]
    if not there:
        return
    name = hub_name or folder
    if not (folder / "config.json").is_file():
        base = base_of(folder) if ADAPTER_CONFIG in there else None
        raise AdapterError(
            f"{name} holds an adapter{f' of {base}' if base else ''} and no model; give "
            f"--model {base or 'BASE'} --adapter {name}."
        )
    if adapter is None or not adapter.exists() or not folder.samefile(adapter):
        remove = "take the base it was trained on" if hub_name else "remove it from the folder"
        raise AdapterError(
            f"{name} holds an adapter beside the model ({', '.join(there)}), which the model alone "
            f"would lose; merge it with --adapter {name}, or {remove}."
        )


def _read_object(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise AdapterError(f"{folder} is not a folder; give the folder of a PEFT adapter.")
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        below = sorted(file.parent.name for file in folder.glob(f"*/{ADAPTER_CONFIG}"))
        hint = f" One is in its folder {shown(below[0])}." if below else ""
        raise AdapterError(
            f"{folder} holds no adapter: it has no {ADAPTER_CONFIG}, which PEFT writes beside "
            f"{ADAPTER_WEIGHTS}.{hint}"
        )
    try:
        raw = read_json(path)
    except JsonError as error:
        raise AdapterError(f"{error}; copy it or save it with PEFT again.") from error
    if not isinstance(raw, dict):
        raise AdapterError(f"{path} must hold a JSON object, not {shown(raw)}.")
    return raw


class _Fields:
    """The fields of an ``adapter_config.json`` by type; ``finish`` refuses all others."""

    def __init__(self, raw: dict[str, Any], folder: Path) -> None:
        self.raw = raw
        self.path = folder / ADAPTER_CONFIG
        self.known = {"peft_type", "r", "lora_alpha", "layers_pattern", "init_lora_weights"}

    def wrong(self, name: str, value: object, expected: str) -> AdapterError:
        return AdapterError(f"{self.path}: {name} is {shown(value)}; it must be {expected}.")

    def _take(self, name: str) -> Any:
        self.known.add(name)
        return self.raw.get(name)

    def rank(self, name: str, value: object) -> int:
        if type(value) is not int or not 1 <= value < 1 << 31:
            raise self.wrong(name, value, "a rank, an integer from 1")
        return value

    def number(self, name: str, value: object) -> float:
        if type(value) not in (int, float) or not abs(value) < 1e30:  # type: ignore[arg-type]
            raise self.wrong(name, value, "a number")
        return value  # type: ignore[return-value]

    def flag(self, name: str) -> bool:
        value = self._take(name)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(name, value, "true or false")
        return bool(value)

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        value = self._take(name)
        if value is None:
            return choices[0]
        if value not in choices:
            raise self.wrong(name, value, f"one of {', '.join(choices)}")
        return str(value)

    def names(self, name: str) -> tuple[str, ...]:
        value = self._take(name)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise self.wrong(name, value, "a list of names")
        return tuple(value)

    def names_or_pattern(self, name: str) -> str | tuple[str, ...]:
        value = self._take(name)
        return value if isinstance(value, str) else self.names(name)

    def table(self, name: str) -> dict[str, Any]:
        value = self._take(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.wrong(name, value, "an object")
        return value

    def layers(self) -> frozenset[int] | None:
        name = "layers_to_transform"
        value = self._take(name)
        if value is None or value == []:
            return None
        numbers = value if isinstance(value, list) else [value]
        if not all(type(each) is int for each in numbers):
            raise self.wrong(name, value, "the number of a layer, or a list of them")
        if isinstance(self.raw.get("target_modules"), str):
            raise self.wrong(name, value, "null where target_modules is a regular expression")
        return frozenset(numbers)

    def token_rows(self) -> dict[str, tuple[int, ...]]:
        name = "trainable_token_indices"
        value = self._take(name)
        if value is None or value in ([], {}):
            return {}
        # A list is of the embedding, whatever the architecture calls it.
        by_module = value if isinstance(value, dict) else {"": value}
        for rows in by_module.values():
            if not isinstance(rows, list) or not all(type(each) is int for each in rows):
                raise self.wrong(name, value, "token ids, or an object of them by embedding")
            if len(set(rows)) < len(rows):
                raise self.wrong(name, value, "token ids that differ from each other")
        return {module: tuple(rows) for module, rows in by_module.items()}

    def finish(self) -> None:
        init = self.raw.get("init_lora_weights")
        if isinstance(init, str) and init.lower().startswith(CHANGES_BASE):
            raise AdapterError(
                f"{self.path}: init_lora_weights is {shown(init)}, which changes the weights below "
                "the adapter. Convert it to a plain LoRA with PEFT: "
                "save_pretrained(DIR, path_initial_model_for_weight_conversion=INITIAL)."
            )
        if init is not None and init not in INIT:
            raise self.wrong("init_lora_weights", init, f"one of {', '.join(map(str, INIT))}")
        for name, value in self.raw.items():
            if name in self.known or name in IGNORED or value in (None, False, [], {}, ""):
                continue
            reason = REFUSED.get(name)
            if reason is None:
                raise AdapterError(
                    f"{self.path}: {shown(name)} is {shown(value)}, a field that the merge does "
                    "not implement. Remove it if it does not change what the adapter computes."
                )
            raise AdapterError(
                f"{self.path}: {name} is set, so the adapter cannot be merged here: {reason}."
            )


def _ends_in(name: str, endings: set[str]) -> bool:
    """Whether a dotted name is one of ``endings``, or ends in one after a dot."""
    return not endings.isdisjoint(_endings(name))


def _endings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[first:]) for first in range(len(parts))]


def _by_pattern(table: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The value of the first pattern that matches the end of each name, after a dot."""
    places = {key: place for place, key in enumerate(table)}
    # Nearly all are names, and there may be one for each of thousands of experts.
    patterns = [key for key in table if not NAME.fullmatch(key)]
    matched = dict(zip(patterns, full_matches(patterns, names, after_dot=True), strict=True))
    found = {}
    for name in names:
        keys = [key for key in _endings(name) if key in table and key not in matched]
        keys += [key for key in patterns if name in matched[key]]
        if keys:
            found[name] = table[min(keys, key=places.__getitem__)]
    return found
