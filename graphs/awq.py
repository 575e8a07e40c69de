"""Checkpoints of AWQ in the packing of AutoAWQ's GEMM kernel.

A layer ``[N, K]`` is stored as ``qweight [K, N / 8]`` int32, of which a word holds eight rows of
one column; ``qzeros [groups, N / 8]`` int32, packed alike; and ``scales [groups, N]``. In a word
lie rows 0, 2, 4, 6, 1, 3, 5, 7, the first in the lowest bits.

Source: github.com/casper-hansen/AutoAWQ, ``awq/modules/linear/gemm.py`` and
``awq/utils/packing_utils.py`` (``dequantize_gemm``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ingot.graphs.checkpoint import CheckpointError, Entry
from ingot.graphs.coded import Coded, unpacked
from ingot.graphs.config import ConfigReader
from ingot.graphs.quantisation import Format, Packed, Settings, group_of
from ingot.plugins.errors import shown

NO_EFFECT = (
    "backend",
    "do_fuse",
    "exllama_config",
    "fuse_max_seq_len",
    "modules_to_fuse",
    "quant_method",
)
# Where in a word each of eight rows lies.
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
BITS = 4
ROLES = ("qweight", "qzeros", "scales")
SCALES = ("F16", "BF16", "F32")
# What transformers writes of GPTQ's, of which AWQ's config is one there.
OF_GPTQ = (
    "act_group_aware",
    "batch_size",
    "block_name_to_quantize",
    "cache_block_outputs",
    "damp_percent",
    "dataset",
    "desc_act",
    "max_input_length",
    "meta",
    "model_seqlen",
    "module_name_preceding_first_block",
    "modules_in_block_to_quantize",
    "pad_token_id",
    "sym",
    "tokenizer",
    "true_sequential",
)


@dataclass(frozen=True)
class Awq(Format):
    """One ``quantization_config`` of AWQ.

    Attributes:
        usual: of all layers.
        left: names of modules that are not packed.
    """

    usual: Settings
    left: tuple[str, ...]

    method = "awq"
    marks = ("qweight",)

    @classmethod
    def read(cls, section: dict[str, Any]) -> Awq:
        """Read the section.

        Raises:
            IngotError: a field of another type, or one that is not implemented.
        """
        config = ConfigReader(section, "AWQ")
        config.must_be("bits", BITS, "its packing is one of 4 bits")
        packing = config.take("version", str, config.take("format", str, "gemm"))
        if packing.lower() != "gemm":
            raise CheckpointError(
                f"config.json: AWQ's version is {shown(packing)}; supported: gemm. Save the "
                "checkpoint again in that packing."
            )
        if str(section.get("backend")) == "llm-awq":
            raise CheckpointError(
                "config.json: AWQ's backend is 'llm-awq', which packs in another way than gemm; "
                "quantise the original with AutoAWQ."
            )
        usual = Settings(
            BITS,
            group_of(config.take("group_size", int, 128), "AWQ's group_size"),
            not config.take("zero_point", bool, True),
        )
        left = config.take("modules_to_not_convert", list, [])
        config.ignore("bits", *NO_EFFECT, *OF_GPTQ)
        config.finish()
        return cls(usual, tuple(name for name in left if isinstance(name, str)))

    def role(self, leaf: str, entry: Entry) -> str | None:
        """See ``Format.role``."""
        return leaf if leaf in ROLES else None

    def settings(self, modules: Sequence[str]) -> Mapping[str, Settings | None]:
        """See ``Format.settings``; a module is left with all that is in it."""
        return {
            module: None
            if any(f".{name.strip('.')}." in f".{module}." for name in self.left)
            else self.usual
            for module in modules
        }

    def shape(self, packed: Packed) -> tuple[int, int]:
        """See ``Format.shape``."""
        columns, words = packed.entry("qweight", 2, "I32").shape
        groups = -(-columns // packed.settings.columns(columns))
        packed.shaped("scales", (groups, words * 8), *SCALES)
        if not packed.settings.symmetric or "qzeros" in packed.tensors:
            packed.shaped("qzeros", (groups, words), "I32")
        return words * 8, columns

    def decode(self, packed: Packed) -> Coded:
        """See ``Format.decode``."""
        _, columns = self.shape(packed)
        return Coded(
            _rows(packed.read("qweight")),
            packed.read("scales").float().T.contiguous(),
            self._zero_points(packed),
            BITS,
            packed.settings.columns(columns),
        )

    @staticmethod
    def _zero_points(packed: Packed) -> torch.Tensor | None:
        if "qzeros" not in packed.tensors:
            return None
        return packed.zero_points(
            "qzeros",
            _rows(packed.read("qzeros")),
            f"holds zero points other than {1 << (BITS - 1)}, and zero_point is false in "
            "config.json; set it to true, if the checkpoint was quantised so, or download it "
            "again.",
        )


def _rows(words: torch.Tensor) -> torch.Tensor:
    """Words ``[n, N / 8]`` -> numbers ``[N, n]`` uint8."""
    return unpacked(words, BITS)[..., PLACES].flatten(1).T.contiguous()
