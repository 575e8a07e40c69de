"""Checkpoints of compressed-tensors, which llm-compressor writes and vLLM reads.

``config_groups`` say of which layers the weights are quantised and how: a target is a name, a
pattern behind ``re:``, or a class, such as ``Linear``; what ``ignore`` matches is left as it is. A
layer ``[N, K]`` is stored

- ``pack-quantized``: as ``weight_packed [N, K * bits / 32]`` int32, whose words hold numbers that
  follow each other along K, the first in the lowest bits, with ``weight_shape`` [2]; a zero point
  as ``weight_zero_point [N * bits / 32, groups]`` int32, packed along N (earlier versions: int8
  ``[N, groups]``);
- ``int-quantized`` and ``naive-quantized``: as ``weight [N, K]`` int8, a zero point as int8.

``weight_scale`` is ``[N, groups]``. Numbers and zero points are signed; packed, ``2**(bits - 1)``
was added to both. With the activation order ``group`` of earlier versions there is
``weight_g_idx [K]``, the group of each column.

Source: github.com/vllm-project/compressed-tensors, ``compressors/pack_quantized``,
``compressors/naive_quantized``, ``quantization/quant_args.py``, ``quant_scheme.py``,
``quantization/lifecycle/forward.py`` (``dequantize``) and ``utils/match.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ingot.graphs.checkpoint import CheckpointError, Entry
from ingot.graphs.coded import Coded, unpacked
from ingot.graphs.config import ConfigError, ConfigReader
from ingot.graphs.patterns import PatternError, full_matches
from ingot.graphs.quantisation import (
    ALL_COLUMNS,
    Format,
    Packed,
    Settings,
    bits_of,
    group_of,
)
from ingot.plugins.errors import named, shown

METHOD = "compressed-tensors"
PACKED = "pack-quantized"
WHOLE = ("int-quantized", "naive-quantized")
# Names of schemes, in place of a scheme.
PRESETS = {
    "W4A16": Settings(4, 128, True),
    "W4A16_ASYM": Settings(4, 128, False),
    "W8A16": Settings(8, 128, True),
}
# How the numbers were found, and what is said of the result.
NO_EFFECT = ("global_compression_ratio", "quant_method", "version")
# Of the weights' arguments; what the order of calibration changes is in weight_g_idx.
NO_EFFECT_OF_WEIGHTS = ("actorder", "observer", "observer_kwargs", "scale_dtype", "zp_dtype")
ROLES = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
SCALES = ("F16", "BF16", "F32")
PATTERN = "re:"
# By the last part of a name, of which class a module is that is no Linear.
EMBEDDINGS = ("embed_tokens", "embeddings", "embedding")


@dataclass(frozen=True)
class Scheme:
    """What one group of the config says.

    Attributes:
        targets: names, patterns and classes.
        weights: how they are quantised; None where they are not.
    """

    targets: tuple[str, ...]
    weights: Settings | None


@dataclass(frozen=True)
class CompressedTensors(Format):
    """One ``quantization_config`` of compressed-tensors.

    Attributes:
        schemes: in their order.
        ignore: names, patterns and classes of what is left as it is.
    """

    schemes: tuple[Scheme, ...]
    ignore: tuple[str, ...]

    method = METHOD
    marks = ("weight_packed", "weight")

    @classmethod
    def read(cls, section: dict[str, Any]) -> CompressedTensors:
        """Read the section.

        Raises:
            IngotError: a field of another type, or one that is not implemented.
        """
        config = ConfigReader(section, METHOD)
        given = config.take("format", str, PACKED)
        status = config.take("quantization_status", str, "compressed")
        if status != "compressed":
            raise ConfigError(
                f"config.json: quantization_status is {shown(status)}: the weights are stored as "
                "they were, to be rounded where they are used; save the checkpoint compressed."
            )
        config.must_be("kv_cache_scheme", None, "its caches are not quantised")
        sparsity = config.take("sparsity_config", dict, {})
        if sparsity.get("format", "dense") != "dense":
            raise ConfigError(
                f"config.json: sparsity_config has format {shown(sparsity['format'])}, which is "
                "not read; save the checkpoint with dense tensors."
            )
        groups = config.take("config_groups", dict, {})
        ignore = config.take("ignore", list, [])
        config.ignore(*NO_EFFECT)
        config.finish()
        if not groups:
            raise ConfigError("config.json: config_groups names no layers; nothing is quantised.")
        return cls(
            tuple(_scheme(name, group, given) for name, group in groups.items()),
            _texts("ignore", ignore),
        )

    def role(self, leaf: str, entry: Entry) -> str | None:
        """See ``Format.role``; a whole number is no weight by itself."""
        return leaf if leaf in ROLES or (leaf == "weight" and entry.dtype == "I8") else None

    def settings(self, modules: Sequence[str]) -> Mapping[str, Settings | None]:
        """See ``Format.settings``; names count before patterns, and those before classes."""
        matched = _matches(self.ignore, modules)
        ignored = set[str]().union(*matched.values())
        by_target: dict[str, Settings | None] = {}
        for scheme in self.schemes:
            by_target.update(dict.fromkeys(scheme.targets, scheme.weights))
        found = _matches(tuple(by_target), modules)
        result: dict[str, Settings | None] = {}
        for module in modules:
            targets = [target for target, of in found.items() if module in of]
            first = min(targets, key=lambda target: _rank(target, module), default=None)
            known = first is not None and module not in ignored
            result[module] = by_target[first] if known and first is not None else None
        return result

    def shape(self, packed: Packed) -> tuple[int, int]:
        """See ``Format.shape``."""
        if "weight_packed" in packed.tensors:
            rows, columns = self._packed_shape(packed)
        else:
            rows, columns = packed.entry("weight", 2, "I8").shape
        group = packed.settings.columns(columns)
        if columns % group:
            raise packed.error(
                "weight_scale",
                f"belongs to {columns} columns, which groups of {group} do not divide; the config "
                "does not belong to these weights.",
            )
        self._spread(packed, "weight_scale", rows, columns // group, *SCALES)
        return rows, columns

    @staticmethod
    def _spread(packed: Packed, role: str, rows: int, groups: int, *dtypes: str) -> torch.Tensor:
        """What each group has one of, or all together: ``[N, groups]`` or ``[1, 1]``."""
        shape = packed.entry(role, None, *dtypes).shape
        if shape in ((1,), (1, 1)):
            return packed.read(role).view(1, 1)
        return packed.shaped(role, (rows, groups), *dtypes)

    def _packed_shape(self, packed: Packed) -> tuple[int, int]:
        rows, words = packed.entry("weight_packed", 2, "I32").shape
        said = packed.shaped("weight_shape", (2,), "I64", "I32").tolist()
        columns = said[1]
        if said[0] != rows or columns < 1 or -(-columns * packed.settings.bits // 32) != words:
            raise packed.error(
                "weight_shape",
                f"is {said}, which does not fit weight_packed {[rows, words]} with "
                f"{packed.settings.bits} bits; the config does not belong to these weights, or "
                "the file is damaged.",
            )
        return rows, columns

    def order(self, packed: Packed) -> torch.Tensor | None:
        """See ``Format.order``."""
        role = "weight_g_idx"
        if role not in packed.tensors:
            return None
        _, columns = self.shape(packed)
        group = packed.settings.columns(columns)
        order = packed.shaped(role, (columns,), "I32", "I64").long()
        # As a module has it before it is calibrated.
        if (order == -1).all():
            return None
        if ((order < 0) | (order >= columns // group)).any():
            raise packed.error(
                role,
                f"names a group that is not there; there are {columns // group}. The file is "
                "damaged.",
            )
        return None if torch.equal(order, torch.arange(columns) // group) else order

    def decode(self, packed: Packed) -> Coded:
        """See ``Format.decode``."""
        rows, columns = self.shape(packed)
        bits, group = packed.settings.bits, packed.settings.columns(columns)
        groups = columns // group
        if "weight_packed" in packed.tensors:
            codes = unpacked(packed.read("weight_packed"), bits).flatten(1)[:, :columns]
        else:
            codes = _unsigned(packed, "weight", packed.read("weight"))
        scales = self._spread(packed, "weight_scale", rows, groups, *SCALES)
        return Coded(
            codes.contiguous(),
            scales.float().expand(rows, groups).contiguous(),
            self._zero_points(packed, rows, groups),
            bits,
            group,
            self.order(packed),
        )

    def _zero_points(self, packed: Packed, rows: int, groups: int) -> torch.Tensor | None:
        role, bits = "weight_zero_point", packed.settings.bits
        if packed.settings.symmetric and role not in packed.tensors:
            return None
        if packed.entry(role, None, "I32", "I8").dtype == "I32":
            words = packed.shaped(role, (-(-rows * bits // 32), groups), "I32")
            zeros = unpacked(words, bits).transpose(1, 2).flatten(0, 1)[:rows]
        else:
            signed = self._spread(packed, role, rows, groups, "I8")
            zeros = _unsigned(packed, role, signed).expand(rows, groups)
        return packed.zero_points(
            role,
            zeros,
            "is there and not zero, and the config says that the weights are symmetric; "
            "download the checkpoint again.",
        )


def _unsigned(packed: Packed, role: str, given: torch.Tensor) -> torch.Tensor:
    """Signed numbers of a few bits, made unsigned.

    Raises:
        CheckpointError: one that has more bits.
    """
    bits, signed = packed.settings.bits, given.to(torch.int16)
    middle = 1 << (bits - 1)
    if signed.numel() and ((signed < -middle) | (signed >= middle)).any():
        raise packed.error(
            role, f"holds numbers of more than {bits} bits; the file or its config is damaged."
        )
    return (signed + middle).to(torch.uint8)


def _scheme(name: str, group: Any, given: str) -> Scheme:
    """One of ``config_groups``.

    Raises:
        IngotError: one that is not implemented.
    """
    if isinstance(group, list):
        if name.upper() not in PRESETS:
            raise ConfigError(
                f"config.json: config_groups has {named(name)}; schemes that are read: "
                f"{', '.join(PRESETS)}. Export the float32, float16 or bfloat16 original."
            )
        return Scheme(_texts(name, group), PRESETS[name.upper()])
    if not isinstance(group, dict):
        raise ConfigError(
            f"config.json: config_groups has {shown(group)} for {named(name)}; it must be an "
            "object or a list of targets."
        )
    config = ConfigReader(group, f"{METHOD}' {named(name)}")
    for which in ("input_activations", "output_activations"):
        if config.take(which, dict, {}):
            raise ConfigError(
                f"config.json: {named(name)} has {which}: the model is meant to compute with "
                "quantised activations, which is not what an ingot computes; export the float32, "
                "float16 or bfloat16 original."
            )
    own = config.take("format", str, given)
    weights = config.take("weights", dict, {})
    targets = _texts(name, config.take("targets", list, []))
    config.finish()
    if weights and own not in (PACKED, *WHOLE):
        raise ConfigError(
            f"config.json: {named(name)} has format {shown(own)}; supported: "
            f"{', '.join((PACKED, *WHOLE))}. Export the float32, float16 or bfloat16 original."
        )
    return Scheme(targets, _weights(name, weights) if weights else None)


def _weights(name: str, given: dict[str, Any]) -> Settings:
    """How the weights of one group are quantised.

    Raises:
        IngotError: a way that is not implemented.
    """
    config = ConfigReader(given, f"{METHOD}' weights of {named(name)}")
    config.must_be("type", "int", "its numbers are whole")
    config.must_be("dynamic", False, "weights are quantised once")
    config.must_be("block_structure", None, "its scales are of rows")
    group = config.take("group_size", int, ALL_COLUMNS)
    by_size = "group" if group != ALL_COLUMNS else "channel"
    strategy = config.take("strategy", str, by_size)
    if strategy not in ("group", "channel", "tensor"):
        raise ConfigError(
            f"config.json: strategy of the weights of {named(name)} is {shown(strategy)}; "
            "supported: group, channel, tensor."
        )
    if (strategy == "group") != (group != ALL_COLUMNS):
        raise ConfigError(
            f"config.json: group_size of the weights of {named(name)} is {shown(group)} and their "
            f"strategy {strategy}; it is of strategy group alone."
        )
    symmetric = config.take("symmetric", bool, True)
    bits = bits_of(config.take("num_bits", int, 8), f"num_bits of the weights of {named(name)}")
    config.ignore(*NO_EFFECT_OF_WEIGHTS)
    config.finish()
    return Settings(bits, group_of(group, f"group_size of the weights of {named(name)}"), symmetric)


def _texts(name: str, given: list[Any]) -> tuple[str, ...]:
    if not all(isinstance(each, str) for each in given):
        raise ConfigError(
            f"config.json: {named(name)} has {shown(given)}; it must be a list of names."
        )
    return tuple(given)


def _class(module: str) -> str:
    return "Embedding" if module.rpartition(".")[2] in EMBEDDINGS else "Linear"


def _rank(target: str, module: str) -> tuple[int, str]:
    """Names before patterns before classes, and else in the order of the alphabet."""
    kind = 1 if target.startswith(PATTERN) else 0 if target == module else 2
    return kind, target


def _matches(targets: tuple[str, ...], modules: Sequence[str]) -> dict[str, set[str]]:
    """The modules that each target matches: by name, by class, or from the beginning."""
    patterns = [each for each in targets if each.startswith(PATTERN)]
    bare = [each.removeprefix(PATTERN) for each in patterns]
    try:
        found = dict(zip(patterns, full_matches(bare, modules, beginning=True), strict=True))
    except PatternError as error:
        raise CheckpointError(f"config.json: {METHOD}: {error}.") from error
    for target in targets:
        if target not in found:
            found[target] = {each for each in modules if target in (each, _class(each))}
    return found
