"""Checkpoints of GPTQ, as AutoGPTQ, GPTQModel, optimum and auto-round write them.

A layer ``[N, K]`` is stored as ``qweight [K * bits / 32, N]`` int32, whose words hold numbers that
follow each other along K, the first in the lowest bits; ``scales [groups, N]``; ``qzeros [groups,
N * bits / 32]`` int32, packed along N; and ``g_idx [K]`` int32, the group of each column. With
``desc_act`` columns are quantised in the order of what they carry, and where the groups follow that
order, ``g_idx`` is not in order.

Zero points are stored one too small, and in ``gptq_v2`` as they are. Readers of the first format
add the one in different ways, so that a zero point that is all ones in the file, and so a zero that
was made smaller, is taken for 0, for 16 or for 0 and one more in its neighbour. GPTQModel subtracts
and adds in whole words, which is without loss; what others wrote is refused there.

Source: github.com/ModelCloud/GPTQModel, ``nn_modules/qlinear/__init__.py`` (``dequantize_weight``
and ``pack_block``), ``utils/model.py`` (``convert_gptq_v1_to_v2_format_module``) and
``quantization/config.py`` (``dynamic_get``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ingot.graphs.checkpoint import CheckpointError, Entry
from ingot.graphs.coded import Coded, unpacked
from ingot.graphs.config import ConfigReader
from ingot.graphs.patterns import PatternError, full_matches
from ingot.graphs.quantisation import Format, Packed, Settings, bits_of, group_of
from ingot.plugins.errors import named, shown

# How the numbers were found, with which program and how fast, and how a reader is to run them.
NO_EFFECT = (
    "act_group_aware",
    "amp",
    "auto_forward_data_parallel",
    "autoround_version",
    "backend",
    "batch_size",
    "block_name_to_quantize",
    "cache_block_outputs",
    "compute_device_filter",
    "damp_auto_increment",
    "damp_percent",
    "dataset",
    "dense_vram_strategy",
    "device",
    "disable_exllama",
    "enable_minmax_tuning",
    "enable_norm_bias_tuning",
    "enable_quanted_input",
    "exllama_config",
    "failsafe",
    "fallback",
    "gc_mode",
    "gptaq",
    "gptaq_alpha",
    "gradient_accumulate_steps",
    "hessian",
    "iters",
    # Which tensors are packed is seen in the file.
    "lm_head",
    "low_gpu_mem_usage",
    "lr",
    "max_input_length",
    "minmax_lr",
    "mock_quantization",
    "model_file_base_name",
    "model_name_or_path",
    "model_seqlen",
    "moe",
    "moe_vram_strategy",
    "module_name_preceding_first_block",
    "mse",
    "nsamples",
    "offload_to_disk",
    "offload_to_disk_path",
    "pack_impl",
    "pad_token_id",
    "parallel_packing",
    "process",
    "provider",
    "quant_method",
    "sampler",
    "scale_dtype",
    "seqlen",
    "static_groups",
    "supported_types",
    "to_quant_block_names",
    "tokenizer",
    "true_sequential",
    "use_cuda_fp16",
    "use_exllama",
    "v2",
    "vram_strategy",
    "wait_for_submodule_finalizers",
)
VERSIONS = {"gptq": 1, "gptq_v2": 2}
ROLES = ("qweight", "qzeros", "scales", "g_idx")
SCALES = ("F16", "BF16", "F32")
# Of a pattern in ``dynamic`` whose layers are left as they are, and of any other.
LEFT, TAKEN = "-:", "+:"


@dataclass(frozen=True)
class Gptq(Format):
    """One ``quantization_config`` of GPTQ.

    Attributes:
        usual: of most layers.
        version: 1 where zero points are stored one too small, 2 where they are not.
        by_words: whether they were made smaller in whole words.
        dynamic: patterns of layers with settings of their own; None where they are left as they
            are.
        within: ends of names, of which each packed layer in a block has one; empty for any.
    """

    usual: Settings
    version: int
    by_words: bool
    dynamic: Mapping[str, Settings | None]
    within: tuple[str, ...]

    method = "gptq"
    marks = ("qweight",)

    @classmethod
    def read(cls, section: dict[str, Any]) -> Gptq:
        """Read the section.

        Raises:
            IngotError: a field of another type, or one that is not implemented.
        """
        config = ConfigReader(section, "GPTQ")
        usual = Settings(
            bits_of(config.take("bits", int, 0), "GPTQ's bits"),
            group_of(config.take("group_size", int, 128), "GPTQ's group_size"),
            config.take("sym", bool, True),
        )
        own = config.take("format", str, "gptq")
        written = config.take("checkpoint_format", str, own)
        if written not in VERSIONS:
            raise CheckpointError(
                f"config.json: GPTQ's checkpoint_format is {shown(written)}; supported: "
                f"{', '.join(VERSIONS)}. Save the checkpoint again in one of them."
            )
        config.must_be("format", written, "checkpoint_format says so")
        config.must_be("pack_dtype", "int32", "its words are of 32 bits")
        config.must_be("data_type", "int", "its numbers are whole")
        config.must_be("is_marlin_format", False, "that is a layout of one kernel's")
        # What it changes is in g_idx.
        config.ignore("desc_act", "meta", *NO_EFFECT)
        dynamic = {
            pattern: _override(pattern, changed, usual)
            for pattern, changed in config.take("dynamic", dict, {}).items()
        }
        within = _names(config.take("modules_in_block_to_quantize", list, []))
        config.finish()
        return cls(usual, VERSIONS[written], _by_gptqmodel(section), dynamic, within)

    def role(self, leaf: str, entry: Entry) -> str | None:
        """See ``Format.role``."""
        return leaf if leaf in ROLES else None

    def settings(self, modules: Sequence[str]) -> Mapping[str, Settings | None]:
        """See ``Format.settings``; of patterns the first that matches a name's beginning counts."""
        bare = [key.removeprefix(LEFT).removeprefix(TAKEN) for key in self.dynamic]
        try:
            matched = full_matches(bare, modules, beginning=True)
        except PatternError as error:
            raise CheckpointError(f"config.json: GPTQ's dynamic: {error}.") from error
        result: dict[str, Settings | None] = {}
        for module in modules:
            found = [
                self.dynamic[key]
                for key, of in zip(self.dynamic, matched, strict=True)
                if module in of
            ]
            inside = not self.within or module.endswith(self.within)
            result[module] = found[0] if found else self.usual if inside else None
        return result

    def shape(self, packed: Packed) -> tuple[int, int]:
        """See ``Format.shape``."""
        words, rows = packed.entry("qweight", 2, "I32").shape
        columns = words * 32 // packed.settings.bits
        groups = -(-columns // packed.settings.columns(columns))
        packed.shaped("scales", (groups, rows), *SCALES)
        # Of all rows, though the last word of a group may be filled in part.
        packed.shaped("qzeros", (groups, -(-rows * packed.settings.bits // 32)), "I32")
        if "g_idx" in packed.tensors:
            packed.shaped("g_idx", (columns,), "I32", "I64")
        return rows, columns

    def order(self, packed: Packed) -> torch.Tensor | None:
        """See ``Format.order``."""
        if "g_idx" not in packed.tensors:
            return None
        order = packed.read("g_idx").long()
        group = packed.settings.columns(len(order))
        groups = -(-len(order) // group)
        # As tensors are indexed, from the end.
        order = torch.where(order < 0, order + groups, order)
        if ((order < 0) | (order >= groups)).any():
            raise packed.error(
                "g_idx",
                f"names a group that is not there; there are {groups}. The file is damaged.",
            )
        # All zeros is what some programs write where there is no order, and their kernels know it.
        in_order = torch.equal(order, torch.arange(len(order)) // group) or not order.any()
        return None if in_order else order

    def decode(self, packed: Packed) -> Coded:
        """See ``Format.decode``."""
        rows, columns = self.shape(packed)
        bits, group = packed.settings.bits, packed.settings.columns(columns)
        words = packed.read("qweight")
        codes = unpacked(words, bits).transpose(0, 1).reshape(rows, columns)
        return Coded(
            codes,
            packed.read("scales").float().T.contiguous(),
            self._zero_points(packed, rows),
            bits,
            group,
            self.order(packed),
        )

    def _zero_points(self, packed: Packed, rows: int) -> torch.Tensor | None:
        """``[N, groups]``; None where all are the middle."""
        bits = packed.settings.bits
        words = packed.read("qzeros")
        most = (1 << bits) - 1
        stored = unpacked(words, bits).flatten(1)[:, :rows]
        if self.version == 1:
            if self.by_words:
                ones = sum(1 << at for at in range(0, 32, bits))
                # In 32 bits, with what one number carries into the next.
                wide = (words.long() + ones) & 0xFFFFFFFF
                words = torch.where(wide > 0x7FFFFFFF, wide - (1 << 32), wide).to(torch.int32)
                stored = unpacked(words, bits).flatten(1)[:, :rows]
            elif (stored == most).any():
                raise packed.error(
                    "qzeros",
                    f"holds a zero point that is stored as {most}, which some readers of this "
                    f"format take for 0 and others for {most + 1}; quantise the original again "
                    "with checkpoint_format gptq_v2, or with sym true.",
                )
            else:
                stored = stored + 1
        return packed.zero_points(
            "qzeros",
            stored.T,
            f"holds zero points other than {1 << (bits - 1)}, and sym is true in config.json; "
            "set it to false, if the checkpoint was quantised so, or download it again.",
        )


def _override(pattern: str, changed: Any, usual: Settings) -> Settings | None:
    """Settings of the layers that a pattern of ``dynamic`` matches.

    Raises:
        IngotError: a field that is not implemented.
    """
    if pattern.startswith(LEFT):
        return None
    if not isinstance(changed, dict):
        raise CheckpointError(
            f"config.json: GPTQ's dynamic has {shown(changed)} for {named(pattern)}; it must be an "
            "object."
        )
    config = ConfigReader(changed, "GPTQ's dynamic")
    result = Settings(
        bits_of(config.take("bits", int, usual.bits), "bits in GPTQ's dynamic"),
        group_of(config.take("group_size", int, usual.group), "group_size in GPTQ's dynamic"),
        config.take("sym", bool, usual.symmetric),
    )
    config.ignore("desc_act", *NO_EFFECT)
    config.finish()
    return result


def _names(given: list[Any]) -> tuple[str, ...]:
    """The ends of names that lists of names, or of lists of them, have."""
    flat = [name for each in given for name in (each if isinstance(each, list) else [each])]
    return tuple(f".{name}" for name in flat if isinstance(name, str))


def _by_gptqmodel(section: dict[str, Any]) -> bool:
    meta = section.get("meta")
    said = meta.get("quantizer") if isinstance(meta, dict) else None
    tools = said if isinstance(said, list) else [said]
    return any(isinstance(tool, str) and tool.startswith("gptqmodel") for tool in tools)
