"""The tensors of a checkpoint folder, with an adapter in them where one is merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ingot.validate.identity.weights_adapter import Adapter, Change, Merged
from ingot.validate.identity.weights_compare import Plain, Source
from ingot.validate.identity.weights_files import Reader, Tensor, read_checkpoint, read_object
from ingot.validate.identity.weights_names import (
    EMBEDDINGS,
    HEAD,
    OF_ONE_EXPERT,
    Made,
    canonical,
    make,
    spellings,
)
from ingot.validate.identity.weights_packed import unpacked


@dataclass
class Tensors:
    """A checkpoint, and what its tensors make of the weights of a graph.

    Attributes:
        folder: of the checkpoint.
        adapter_folder: of what is merged into it; None where nothing is.
        weights: names of the graph's weights.
    """

    folder: Path
    adapter_folder: Path | None
    weights: Sequence[str]

    @cached_property
    def config(self) -> dict[str, Any]:
        """``config.json``, as it is in the folder."""
        return read_object(self.folder / "config.json")

    @cached_property
    def _base(self) -> dict[str, Tensor]:
        return unpacked(read_checkpoint(self.folder), self.config)

    @cached_property
    def stored(self) -> dict[str, Tensor]:
        """Every tensor by name, with those that an adapter stores whole in their place."""
        if self._adapter is None:
            return self._base
        base = dict(self._base)
        # A head that an adapter makes another than its embedding is what that was.
        if self.tied and HEAD not in base and self._tables:
            base[HEAD] = base[self._tables[0]]
        return self._adapter.replace(base)

    @property
    def changes(self) -> Mapping[str, Sequence[Change]]:
        """What an adapter does to weights, by their names in a bare model."""
        return {} if self._adapter is None else self._adapter.changes

    @property
    def placeless(self) -> Sequence[str]:
        """Tensors of an adapter that change no weight."""
        return () if self._adapter is None else self._adapter.placeless

    @cached_property
    def _adapter(self) -> Adapter | None:
        if self.adapter_folder is None:
            return None
        # A stack may be stored an expert at a time, and then has no name of its own in the graph.
        ones = [one for name in self.weights if (one := OF_ONE_EXPERT.fullmatch(name))]
        names = (*self.weights, *(one["stack"] for one in ones))
        found = [make(name, self._base, self.tied) for name in names]
        shapes = {made.parameter: made.shape for made in found if made and not made.of_stack}
        head = make(HEAD, self._base, self.tied)
        if head is not None:
            shapes[HEAD] = head.shape
        adapter = Adapter.read(self.adapter_folder, shapes)
        for table in self._tables if self.tied else ():
            adapter.tie(canonical(table))
        return adapter

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding, by the config or else by what is stored."""
        said = self._said_tied
        # Defaults differ by architecture. Where one is stored, it is both, or it would be missing.
        return HEAD not in self._base or not self._tables if said is None else said

    @property
    def _said_tied(self) -> bool | None:
        # mamba_ssm has another name for it.
        said = [self.config.get(name) for name in ("tie_word_embeddings", "tie_embeddings")]
        return next((each for each in said if isinstance(each, bool)), None)

    @property
    def _tables(self) -> list[str]:
        """The names of the embedding in the checkpoint; at most one."""
        names = [each for table in EMBEDDINGS for each in spellings(table, tied=False)]
        return [name for name in dict.fromkeys(names) if name in self._base]

    def make(self, name: str) -> Made | None:
        """What a weight of the graph is made of; None where no tensors have a name for it."""
        return make(name, self.stored, self.tied)

    def twin(self, name: str) -> Tensor | None:
        """The tensor that a tied one repeats."""
        if self._said_tied is False or name not in (HEAD, *self._tables):
            return None
        other = self._tables[:1] if name == HEAD else [HEAD]
        return next((self.stored[each] for each in other if each in self.stored), None)

    def source(self, reader: Reader) -> Source:
        """Reads rows of weights."""
        plain = Plain(reader)
        return plain if self._adapter is None else Merged(self._adapter, reader, plain)
