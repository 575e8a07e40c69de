"""transformers, its modules as they are called: PyTorch's eager mode, nothing compiled."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from benchmarks.on_peers.workers.measure import Floats, Ids, serve

logging.set_verbosity_error()


class Transformers:
    """See ``measure.Program``."""

    def __init__(self, given: dict[str, Any]) -> None:
        torch.set_num_threads(given["threads"])
        dtype = getattr(torch, given["dtype"])
        self.model: Any = AutoModelForCausalLM.from_pretrained(given["made"], dtype=dtype).eval()
        # The state has another name where it is no cache of keys and values.
        self.state = (
            "cache_params" if self.model.config.model_type == "mamba2" else "past_key_values"
        )
        self.past: Any = None

    def reset(self) -> None:
        self.past = None

    @torch.inference_mode()
    def step(self, ids: Ids) -> Floats:
        given = {} if self.past is None else {self.state: self.past}
        # As its own generation does: the logits of the last token alone.
        found = self.model(torch.from_numpy(ids)[None], use_cache=True, logits_to_keep=1, **given)
        self.past = getattr(found, self.state)
        return found.logits[0, -1].float().numpy()


if __name__ == "__main__":
    serve(Transformers)
