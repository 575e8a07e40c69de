"""An eager session that forgets, as no right one does."""

from __future__ import annotations

import torch

from ingot.runtime.session import Floats, Ids
from ingot.validate.truth.eager import EagerSession


class Forgetful:
    """An eager session that begins every call with one of its states at zero."""

    def __init__(self, inner: EagerSession, index: int) -> None:
        self.inner = inner
        self.index = index
        self.tapped: dict[str, Floats] = {}

    def reset(self, batch: int, capacity: int) -> None:
        self.inner.reset(batch, capacity)

    def step(self, input_ids: Ids, attention_mask: Ids, logits_to_keep: int = 0) -> Floats:
        self.inner._past = tuple(
            torch.zeros_like(state) if index == self.index else state
            for index, state in enumerate(self.inner._past)
        )
        return self.inner.step(input_ids, attention_mask, logits_to_keep)

    def state(self) -> dict[str, Floats]:
        return self.inner.state()
