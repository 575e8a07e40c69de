"""optimum-intel's export of a Hugging Face folder. One argument: JSON with what it takes."""

from __future__ import annotations

import json
import sys
from typing import Any


def export(checkpoint: str, out: str, bits: int | None) -> None:
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    # Its default for int4 is a scale for 128 numbers; the other programs have one for 32.
    chosen: Any = {"load_in_8bit": False}
    if bits is not None:
        sizes = {"group_size": 32} if bits == 4 else {}
        chosen = {"quantization_config": OVWeightQuantizationConfig(bits=bits, sym=True, **sizes)}
    model = OVModelForCausalLM.from_pretrained(checkpoint, export=True, compile=False, **chosen)
    model.save_pretrained(out)


if __name__ == "__main__":
    export(**json.loads(sys.argv[1]))
