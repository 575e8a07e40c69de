"""Merging an adapter into a checkpoint: which tensor of the one changes which of the other.

What an adapter adapts, its tensors say; ``adapter_config.json`` has ranks and scalings, and what is
to be there. So every tensor has one place, and whatever the config targets has its tensors, or the
adapter is refused: it is damaged, or belongs to another model.

The names in an adapter are those of the model that was trained. Experts are there one by one, as
transformers 4 had them, or as parameters of all experts, as transformers 5 has them, and so they
are in the checkpoint, in the same spelling or not. Both are places in the graph's own parameters.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from ingot.graphs.adapter import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    ALL_LINEAR,
    AdapterError,
    refuse_forgotten,
)
from ingot.graphs.adapter_weights import (
    Adapter,
    Change,
    LowRank,
    MergedCheckpoint,
    Piece,
    Shift,
    TokenRows,
)
from ingot.graphs.checkpoint import Checkpoint
from ingot.graphs.family import family_of
from ingot.graphs.patterns import PatternError
from ingot.graphs.quantised import open_folder
from ingot.plugins.errors import shown

# What PEFT puts before the name of every tensor.
WRAPPER = "base_model.model."
# The name of the adapter may stand behind the role; PEFT drops it, and other tools leave it.
ROLE = re.compile(
    r"(?P<module>.+?)\.(?P<role>lora_A|lora_B|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector|token_adapter\.trainable_tokens_delta)"
    r"(?:\.(?!weight$|bias$)(?P<adapter>[^.]+))?(?P<leaf>\.weight|\.bias)?"
)
TOKEN_ROWS = "token_adapter.trainable_tokens_delta"
MAGNITUDE = "lora_magnitude_vector"
# Of a module that is stored whole: the name of the adapter, where a tool has left it.
SAVED = re.compile(r"\.modules_to_save\.[^.]+")
BASE_LAYER = ".base_layer"
# What the name of each kind of tensor may end in; those of other kinds are parameters themselves.
LEAVES = {
    "lora_A": (".weight",),
    "lora_B": (".weight", ".bias"),
    MAGNITUDE: (None, ".weight"),
}


def open_checkpoint(path: Path, adapter: Path | None = None) -> Checkpoint:
    """A checkpoint folder, opened, with an adapter merged into it where one is given.

    Args:
        path: the folder of the checkpoint.
        adapter: the folder of a PEFT LoRA adapter.

    Raises:
        IngotError: a folder that cannot be read, an adapter in it that was not asked for, or one
            that does not fit.
    """
    refuse_forgotten(path, adapter)
    checkpoint = open_folder(path)
    return checkpoint if adapter is None else merge(checkpoint, Adapter.open(adapter))


def merge(base: Checkpoint, adapter: Adapter) -> MergedCheckpoint:
    """A checkpoint with an adapter merged into it as it is read.

    Raises:
        AdapterError: a tensor of the adapter that has no place in the model or another shape than
            its place, one that is missing, or one that ``adapter_config.json`` does not speak of.
    """
    try:
        return _Merge(base, adapter).result()
    except PatternError as error:
        raise AdapterError(f"{adapter.path / ADAPTER_CONFIG}: {error}.") from error


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a parameter of the graph, whose matrices are counted row by row.

    Attributes:
        parameter: of the graph.
        shape: of the tensor.
        start: its first row.
    """

    parameter: str
    shape: tuple[int, ...]
    start: int = 0

    @property
    def height(self) -> int:
        """Rows of each of its matrices; a vector is one of a single column."""
        return self.shape[-2] if len(self.shape) > 1 else self.shape[0]

    @property
    def stop(self) -> int:
        """Behind its last row."""
        return self.start + (math.prod(self.shape[:-1]) if len(self.shape) > 1 else self.shape[0])

    def holds(self, other: Place) -> bool:
        """Whether another place lies in this one."""
        same = self.parameter == other.parameter
        return same and self.start <= other.start and other.stop <= self.stop


class _Graph:
    """The parameters of an architecture, with all its heads, and every spelling of them.

    Attributes:
        shapes: parameter -> its shape, in the order in which modules have them.
        places: name of a tensor, in each spelling -> its place.
        splits: parameter -> the names of the tensors it may be split into.
        linear: linear layers.
        embeddings: embeddings.
        experts: modules that only the split spelling has.
    """

    def __init__(self, base: Checkpoint, adapter: Adapter, config: dict[str, object]) -> None:
        family = family_of(base)
        # Tensors that bound the sizes; the largest may be an embedding of the adapter's.
        stored = {**base.entries, **adapter.tensors.entries}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.linear: dict[str, None] = {}
        self.embeddings: dict[str, None] = {}
        self.experts: dict[str, None] = {}
        for task in family.tasks:
            model = family.build(config, task, stored=stored)
            for name, parameter in model.named_parameters():
                self.shapes.setdefault(name.removeprefix(family.prefix), tuple(parameter.shape))
            for name, module in model.named_modules():
                if isinstance(module, torch.nn.Linear):
                    self.linear[name.removeprefix(family.prefix)] = None
                elif isinstance(module, torch.nn.Embedding):
                    self.embeddings[name.removeprefix(family.prefix)] = None
        # A tied graph has no head of its own.
        for head, embedding in family.tied.items():
            self.shapes.setdefault(head, self.shapes[embedding.removeprefix(family.prefix)])
            self.linear[_owner(head)] = None
        self.places = {name: Place(name, shape) for name, shape in self.shapes.items()}
        self.splits: dict[str, tuple[str, ...]] = {}
        for name, shape in self.shapes.items():
            start = 0
            for part in family.other_spelling(name, shape):
                place = Place(name, part.shape, start)
                self.places[part.name] = place
                self.splits[name] = (*self.splits.get(name, ()), part.name)
                self.experts[_owner(part.name)] = None
                start = place.stop


class _Merge:
    """The places of one adapter's tensors in one checkpoint.

    Names are without what stands before them in a whole model, so that a bare model's checkpoint or
    adapter has the same; ``_trained`` makes of them the names of the model that was trained, of
    which ``adapter_config.json`` speaks.
    """

    def __init__(self, base: Checkpoint, adapter: Adapter) -> None:
        self.base = base
        self.adapter = adapter
        self.config = adapter.config
        self.family = family_of(base)
        self.heads = {_owner(name) for name in self.family.head_tensors}
        # Module, and in how many others of PEFT's it is -> role -> tensor of the adapter.
        self.roles: dict[tuple[str, int], dict[str, str]] = {}
        # Parameter that is stored whole, in some spelling -> tensor of the adapter.
        self.stored: dict[str, str] = {}
        self.prefix = ""
        self._sort_tensors()
        self.raw_config = dict(base.config)
        self._resize()
        self.graph = _Graph(base, adapter, self.raw_config)
        self.on_disk = {self._bare(name): name for name in base.entries}
        # As in ``MergedCheckpoint``, but for the names.
        self.entries = {self._bare(name): entry for name, entry in base.entries.items()}
        self.sources: dict[str, tuple[Checkpoint, str]] = {}
        self.changes: list[tuple[Place, Change]] = []

    def result(self) -> MergedCheckpoint:
        self._place_roles()
        self._check_stored()
        self._check_complete()
        self._tie()
        self._place_stored()
        pieces = self._pieces()
        return MergedCheckpoint(
            path=self.base.path,
            config=self.raw_config,
            entries={self._stored_name(name): entry for name, entry in self.entries.items()},
            adapter=self.adapter,
            base=self.base,
            sizes=self.base.sizes,
            sources={self._stored_name(name): source for name, source in self.sources.items()},
            pieces={self._stored_name(name): made for name, made in pieces.items()},
        )

    def _wrong(self, tensor: str, reason: str) -> AdapterError:
        return AdapterError(f"{self.adapter.path / ADAPTER_WEIGHTS}: {shown(tensor)} {reason}.")

    def _placeless(self, tensor: str) -> AdapterError:
        return self._wrong(
            tensor,
            f"has no place in this {self.family.model_type} model; the adapter is of another "
            "model, or of another kind of layer",
        )

    def _shape(self, tensor: str) -> tuple[int, ...]:
        return self.adapter.tensors.entries[tensor].shape

    # Names.

    def _bare(self, name: str) -> str:
        return name.removeprefix(self.family.prefix)

    def _is_head(self, name: str) -> bool:
        return name.partition(".")[0] in self.heads

    def _trained(self, name: str) -> str:
        return name if self._is_head(name) else self.prefix + name

    def _stored_name(self, name: str) -> str:
        if name in self.on_disk:
            return self.on_disk[name]
        whole = any(stored.startswith(self.family.prefix) for stored in self.on_disk.values())
        return self.family.prefix + name if whole and not self._is_head(name) else name

    # The adapter's tensors, by what they are.

    def _sort_tensors(self) -> None:
        adapters = set()
        for tensor in self.adapter.tensors.entries:
            name = tensor.removeprefix(WRAPPER)
            if name == tensor:
                raise self._wrong(tensor, f"is no name of PEFT's, all of which begin {WRAPPER}")
            if name.startswith(self.family.prefix):
                self.prefix = self.family.prefix
            found = ROLE.fullmatch(name)
            if found is None:
                name = self._bare(SAVED.sub("", name).replace(f"{BASE_LAYER}.", "."))
                slots, slot = self.stored, name
            else:
                module, depth = found["module"], 0
                while module.endswith(BASE_LAYER):
                    module, depth = module.removesuffix(BASE_LAYER), depth + 1
                slots = self.roles.setdefault((self._bare(module), depth), {})
                role, leaf = found["role"], found["leaf"]
                if leaf not in LEAVES.get(role, (None,)):
                    raise self._wrong(tensor, "is no name of PEFT's, by its end")
                slot = f"{role}.bias" if leaf == ".bias" else role
                adapters.add(found["adapter"] or "")
            if slot in slots:
                raise self._wrong(tensor, f"says again what {shown(slots[slot])} says; keep one")
            slots[slot] = tensor
        for tensor in self.adapter.tensors.entries:
            name = tensor.removeprefix(WRAPPER)
            if name != self._trained(self._bare(name)):
                raise self._placeless(tensor)
        if len(adapters) > 1:
            raise AdapterError(
                f"{self.adapter.path / ADAPTER_WEIGHTS} holds several adapters "
                f"({shown(sorted(adapters))}); save the one to merge alone."
            )

    def _resize(self) -> None:
        """Take the vocabulary of an embedding that was resized and is stored whole."""
        config = self.family.read_config(self.raw_config)
        for head, embedding in self._tied_names():
            tensors = [self.stored[name] for name in (embedding, head) if name in self.stored]
            rows = {self._shape(tensor)[0] for tensor in tensors if len(self._shape(tensor)) == 2}
            both = len(tensors) == 2 or config.tie_word_embeddings
            if both and len(rows) == 1 and rows != {config.vocab_size}:
                (self.raw_config["vocab_size"],) = rows

    def _tied_names(self) -> list[tuple[str, str]]:
        return [(head, self._bare(embedding)) for head, embedding in self.family.tied.items()]

    # Low-rank changes.

    def _place_roles(self) -> None:
        graph = self.graph
        modules = (*graph.linear, *graph.embeddings, *graph.experts)
        self.targeted = self.config.targeted([self._trained(name) for name in modules])
        # PEFT, too, ties nothing where the model does not.
        if self.config.tied and self.family.read_config(self.raw_config).tie_word_embeddings:
            for head, embedding in self._tied_names():
                if self._trained(_owner(embedding)) in self.targeted:
                    self.targeted.add(_owner(head))
        found = {}
        for (module, depth), roles in self.roles.items():
            if TOKEN_ROWS in roles:
                self._place_token_rows(module, roles)
            else:
                found[module, depth] = self._target(module, depth, roles)
        scalings = self.config.scalings([name for _, name in found.values()])
        for (module, depth), (place, name) in found.items():
            self._place_low_rank(module, self.roles[module, depth], place, *scalings[name])

    def _target(self, module: str, depth: int, roles: dict[str, str]) -> tuple[Place, str]:
        """What a module of PEFT's adapts, and by which name its rank is found."""
        graph, trained = self.graph, self._trained(module)
        any_tensor = next(iter(roles.values()))
        place = graph.places.get(f"{module}.weight")
        if place is not None and depth == 0:
            if trained in self.targeted:
                return place, trained
            if self.config.targets_parameter(f"{trained}.weight"):
                return place, f"{trained}.weight"
        # PEFT wraps a module once for each of its parameters, the last of them outermost.
        names = [name for name in graph.shapes if _owner(name) == module]
        names = [name for name in names if self.config.targets_parameter(self._trained(name))]
        if depth < len(names):
            name = names[-1 - depth]
            return graph.places[name], self._trained(name)
        if place is None and not any(_owner(name) == module for name in graph.shapes):
            raise self._placeless(any_tensor)
        raise self._wrong(
            any_tensor, f"is of a module that {ADAPTER_CONFIG} does not target, or not any more"
        )

    def _place_low_rank(
        self, module: str, roles: dict[str, str], place: Place, rank: int, scaling: float
    ) -> None:
        embedding = module in self.graph.embeddings and "lora_embedding_A" in roles
        kind = "lora_embedding_" if embedding else "lora_"
        outputs, inputs = place.shape[-2:] if len(place.shape) > 1 else (*place.shape, 0)
        experts = place.shape[0] if len(place.shape) == 3 else 1
        if embedding:
            outputs, inputs = inputs, outputs
        wanted: dict[str, tuple[int, ...]] = {
            f"{kind}A": (rank * experts, inputs),
            f"{kind}B": (outputs, rank * experts),
        }
        if self.config.magnitudes:
            wanted[MAGNITUDE] = (outputs,)
        if self.config.lora_bias:
            wanted["lora_B.bias"] = (outputs,)
        any_tensor = next(iter(roles.values()))
        for role, shape in wanted.items():
            if role not in roles:
                raise self._wrong(any_tensor, f"is there without its {role}")
            if self._shape(roles[role]) != shape:
                raise self._wrong(
                    roles[role],
                    f"has shape {list(self._shape(roles[role]))}; the model and rank {rank} make "
                    f"it {list(shape)}",
                )
        for role, tensor in roles.items():
            if role not in wanted:
                raise self._wrong(tensor, f"is there, and {ADAPTER_CONFIG} asks for none")
        tensors = self.adapter.tensors
        if (experts > 1 and self.config.magnitudes) or not inputs:
            raise self._wrong(any_tensor, "is of a parameter that PEFT does not adapt this way")
        change = LowRank(
            tensors,
            roles[f"{kind}A"],
            roles[f"{kind}B"],
            scaling,
            experts=experts if len(place.shape) == 3 else 0,
            embedding=embedding,
            magnitude=roles.get(MAGNITUDE),
        )
        self.changes.append((place, change))
        if self.config.lora_bias:
            bias = self.graph.places.get(f"{module}.bias")
            if bias is None:
                raise self._wrong(roles["lora_B.bias"], "is added to a layer that has no bias")
            self.changes.append((bias, Shift(tensors, roles["lora_B.bias"], scaling)))

    def _place_token_rows(self, module: str, roles: dict[str, str]) -> None:
        tensor = roles[TOKEN_ROWS]
        place = self.graph.places.get(f"{module}.weight")
        tokens = self._tokens_of(module)
        if place is None:
            raise self._placeless(tensor)
        if tokens is None or len(roles) > 1:
            raise self._wrong(tensor, f"has no trainable_token_indices in {ADAPTER_CONFIG}")
        rows, width = place.shape
        if self._shape(tensor) != (len(tokens), width):
            raise self._wrong(
                tensor,
                f"has shape {list(self._shape(tensor))}; trainable_token_indices makes it "
                f"{[len(tokens), width]}",
            )
        if not all(0 <= token < rows for token in tokens):
            raise AdapterError(
                f"{self.adapter.path / ADAPTER_CONFIG}: trainable_token_indices names a token that "
                f"the vocabulary of {rows} does not have."
            )
        self.changes.append((place, TokenRows(self.adapter.tensors, tensor, tokens)))

    def _tokens_of(self, module: str) -> tuple[int, ...] | None:
        for name, tokens in self.config.token_rows.items():
            if self._trained(module).endswith(name) if name else module in self.graph.embeddings:
                return tokens
        return None

    # What is stored whole.

    def _check_stored(self) -> None:
        for name, tensor in self.stored.items():
            place = self.graph.places.get(name)
            if place is None:
                raise self._placeless(tensor)
            if self._shape(tensor) != place.shape:
                raise self._wrong(
                    tensor,
                    f"has shape {list(self._shape(tensor))}; the model makes it "
                    f"{list(place.shape)}",
                )

    def _place_stored(self) -> None:
        """Put what is stored whole in the place of the checkpoint's own, in its own spelling."""
        tensors = self.adapter.tensors
        for parameter in dict.fromkeys(self.graph.places[name].parameter for name in self.stored):
            split = self.graph.splits.get(parameter, ())
            names = [name for name in (parameter, *split) if name in self.stored]
            if parameter in names and len(names) > 1:
                raise self._wrong(self.stored[names[1]], f"is in {shown(names[0])} already")
            # Another spelling than the checkpoint's has to be there as a whole.
            replaced = [name for name in (parameter, *split) if name in self.entries]
            if not set(names) <= set(replaced) and names not in ([parameter], [*split]):
                raise self._wrong(
                    self.stored[names[0]],
                    f"replaces a part of {shown(replaced[0] if replaced else parameter)} alone; "
                    "save the checkpoint with its experts one by one",
                )
            if not set(names) <= set(replaced):
                for name in replaced:
                    del self.entries[name]
            for name in names:
                self.entries[name] = tensors.entries[self.stored[name]]
                self.sources[name] = (tensors, self.stored[name])

    # What has to be there.

    def _check_complete(self) -> None:
        """Refuse an adapter without the tensors that its config says it has."""
        adapted: dict[str, list[Place]] = {}
        for place, change in self.changes:
            if not isinstance(change, Shift):
                adapted.setdefault(place.parameter, []).append(place)
        stored: dict[str, list[Place]] = {}
        for name in self.stored:
            place = self.graph.places[name]
            stored.setdefault(place.parameter, []).append(place)
        graph, targets = self.graph, self.config.targets
        every = isinstance(targets, str) and targets.lower() == ALL_LINEAR
        # Experts were linear layers in transformers 4 alone, and a head is none of all-linear.
        modules = (*graph.linear,) if every else (*graph.linear, *graph.embeddings, *graph.experts)
        for module in modules:
            if self._trained(module) not in self.targeted or (every and module in self.heads):
                continue
            self._check_there(f"{module}.weight", adapted)
            if self.config.bias == "lora_only" and f"{module}.bias" in graph.places:
                self._check_there(f"{module}.bias", stored)
        for name in graph.shapes:
            # The head of another task than the one that was trained.
            if self._is_head(name) and name not in self.family.tied:
                continue
            trained = self._trained(name)
            if self.config.targets_parameter(trained):
                self._check_there(name, adapted)
            if self.config.saves(trained) or (
                self.config.bias == "all" and trained.endswith(".bias")
            ):
                self._check_there(name, stored)
        for name in self.config.token_rows:
            tokens = self.config.token_rows[name]
            rows = [c.tokens for _, c in self.changes if isinstance(c, TokenRows)]
            if tokens not in rows:
                raise AdapterError(
                    f"{self.adapter.path / ADAPTER_CONFIG} has trainable_token_indices, and "
                    f"{ADAPTER_WEIGHTS} no rows for them; the adapter is incomplete."
                )

    def _check_there(self, name: str, found: dict[str, list[Place]]) -> None:
        place = self.graph.places[name]
        inside = [each for each in found.get(place.parameter, ()) if place.holds(each)]
        around = any(each.holds(place) for each in found.get(place.parameter, ()))
        rows = sum(each.stop - each.start for each in inside)
        if not around and rows < place.stop - place.start:
            raise AdapterError(
                f"{self.adapter.path / ADAPTER_CONFIG} speaks of {self._trained(name)}, and "
                f"{ADAPTER_WEIGHTS} has no tensors for it; the adapter is incomplete, or of "
                "another model."
            )

    # Tied weights.

    def _tie(self) -> None:
        """Untie an embedding and a head that the adapter makes different.

        That is what the adapted model computes. ``merge_and_unload`` adds what is of the one to the
        other as well, since they are one tensor in memory; of that PEFT warns, and advises to untie
        the model first.
        """
        if not self.family.read_config(self.raw_config).tie_word_embeddings:
            return
        for head, embedding in self._tied_names():
            # One name is enough for a tied tensor, and what it is called is the embedding's.
            if embedding not in self.entries and head in self.entries:
                self.entries[embedding] = self.entries.pop(head)
                self.sources[embedding] = (self.base, self.on_disk[head])
            changed = {
                name: [change for place, change in self.changes if place.parameter == name]
                for name in (embedding, head)
            }
            stored = {name: self.stored[name] for name in (embedding, head) if name in self.stored}
            if embedding not in self.entries or not any((*changed.values(), stored)):
                continue
            # What was not trained is in the file as the weight below: of both, as it is in memory.
            for name, other in ((embedding, head), (head, embedding)):
                if other in stored and not self.config.saves(self._trained(other)):
                    stored.setdefault(name, stored[other])
            self._drop_repeated(head, embedding)
            # PEFT ties rows of the embedding alone to the head.
            if not changed[head] and all(isinstance(c, TokenRows) for c in changed[embedding]):
                changed[head] = changed[embedding]
            same = self._same(stored.get(head), stored.get(embedding))
            if same and changed[head] == changed[embedding]:
                stored.pop(head, None)
                self.stored.pop(head, None)
            else:
                self.raw_config["tie_word_embeddings"] = False
                self.entries[head] = self.entries[embedding]
                kept = self.base, self._stored_name(embedding)
                self.sources[head] = self.sources.get(embedding, kept)
            self.stored.update(stored)

    def _drop_repeated(self, head: str, embedding: str) -> None:
        """Leave out a tied head that the checkpoint stores as well, once it is the same."""
        if head not in self.entries:
            return
        names = self.on_disk[head], self.on_disk[embedding]
        if not torch.equal(*map(self.base.read, names)):
            raise AdapterError(
                f"{self.base.path.name}: tie_word_embeddings is true, yet {names[0]} differs from "
                f"{names[1]}. Set tie_word_embeddings to false, or remove {names[0]}."
            )
        del self.entries[head]

    def _same(self, one: str | None, other: str | None) -> bool:
        if one is None or other is None:
            return one is other
        return one == other or torch.equal(*map(self.adapter.tensors.read, (one, other)))

    # From places in parameters to the tensors that are stored.

    def _pieces(self) -> dict[str, list[Piece]]:
        by_parameter: dict[str, list[str]] = {}
        for name in self.entries:
            if name in self.graph.places:
                by_parameter.setdefault(self.graph.places[name].parameter, []).append(name)
        result: dict[str, list[Piece]] = {}
        for place, change in self.changes:
            rows = 0
            for name in by_parameter.get(place.parameter, ()):
                for piece, count in _overlaps(self.graph.places[name], place, change):
                    result.setdefault(name, []).append(piece)
                    rows += count
            if rows < place.stop - place.start:
                raise AdapterError(
                    f"{self.adapter.path} adapts {self._trained(place.parameter)}, which "
                    f"{self.base.path.name} does not have; the adapter is of another model."
                )
        return result


def _overlaps(stored: Place, place: Place, change: Change) -> list[tuple[Piece, int]]:
    """The rows that a stored tensor and a changed place share, matrix by matrix, and how many."""
    result = []
    row, stop = max(stored.start, place.start), min(stored.stop, place.stop)
    while row < stop:
        block, first = divmod(row - stored.start, stored.height)
        of_block, of_first = divmod(row - place.start, place.height)
        count = min(stored.height - first, place.height - of_first, stop - row)
        rows, of_rows = slice(first, first + count), slice(of_first, of_first + count)
        result.append((Piece(change, block, rows, of_block, of_rows), count))
        row += count
    return result


def _owner(name: str) -> str:
    return name.rpartition(".")[0]
