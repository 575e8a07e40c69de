"""Makes the files here with compressed-tensors (0.20.0), in an environment that has it.

    python tests/data/quantised/make.py

Each file holds layers as the library packs them, and under ``unpacked.`` what it makes of them.
"""

# mypy: ignore-errors

import json
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file

HERE = Path(__file__).parent
LAYERS = {"a": (24, 64), "b": (20, 96)}
WAYS = {
    "int4-group": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
    "int4-group-zeros": (
        "pack-quantized",
        {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
    ),
    "int8-channel-zeros": (
        "pack-quantized",
        {"num_bits": 8, "strategy": "channel", "symmetric": False},
    ),
    "int8-whole": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "int8-naive-zeros": (
        "naive-quantized",
        {"num_bits": 8, "strategy": "group", "group_size": 32, "symmetric": False},
    ),
    "int8-tensor": ("naive-quantized", {"num_bits": 8, "strategy": "tensor"}),
}


def main() -> None:
    torch.manual_seed(0)
    for way, (name, weights) in WAYS.items():
        scheme = QuantizationScheme(targets=["Linear"], weights=weights)
        args = scheme.weights
        compressor = BaseCompressor.get_value_from_registry(name)
        held = {}
        for layer, shape in LAYERS.items():
            weight = torch.randn(shape, dtype=torch.bfloat16) + 0.3
            size = {"group": args.group_size, "channel": shape[1]}.get(args.strategy)
            parts = weight.unflatten(1, (-1, size)) if size else weight.view(1, 1, -1)
            scale, zero = calculate_qparams(parts.amin(-1), parts.amax(-1), args)
            if not size:
                scale, zero = scale.view(1), zero.view(1)
            state = {
                "weight": weight,
                "weight_scale": scale.to(weight.dtype),
                "weight_zero_point": zero.to(torch.int8),
            }
            packed = compressor.compress(state, scheme)
            held.update({f"{layer}.{leaf}": each.contiguous() for leaf, each in packed.items()})
            held[f"unpacked.{layer}.weight"] = compressor.decompress(packed, scheme)["weight"]
        config = QuantizationConfig(
            config_groups={"group_0": scheme}, format=name, quantization_status="compressed"
        )
        save_file(held, HERE / f"{way}.safetensors")
        text = json.dumps(json.loads(config.model_dump_json()), indent=1)
        (HERE / f"{way}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
