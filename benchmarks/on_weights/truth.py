"""What the checkpoint itself says of the windows: transformers in float32, made by neither side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks.on_weights.figures import Floats, Ids


def record(checkpoint: Path, windows: Ids, path: Path) -> Floats:
    """Write transformers' logits of every window to ``path``.

    Returns:
        ``[W, L, V]``, mapped from the file: of a large vocabulary they may be gigabytes.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    shape = (*windows.shape, model.config.vocab_size)
    logits = np.lib.format.open_memmap(path, "w+", np.float32, shape)
    with torch.inference_mode():
        for at, ids in enumerate(windows):
            # A window is a text of its own, and no state of it is of use to the next.
            found = model(torch.from_numpy(ids)[None], use_cache=False).logits
            logits[at] = found[0].numpy()
    logits.flush()
    return logits
