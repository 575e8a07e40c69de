"""What an adapter makes of a checkpoint's weights, worked out apart from the merge.

The formulas are PEFT's (``peft/tuners/lora/layer.py`` and ``variants.py``): ``W + s * B @ A`` in
float32, where s is alpha over the rank or over its root; with DoRA that times the magnitudes over
its norm along each row; a bias plus s times the bias of B; and rows or tensors that are stored
whole. The order in which a sum of float32 numbers is taken is free, so each element has a least and
a most: the exact sum, less and plus what rounding can do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ingot.graphs.patterns import full_matches
from ingot.validate.identity.weights_compare import Plain
from ingot.validate.identity.weights_files import (
    Floats,
    Reader,
    Tensor,
    read_header,
    read_object,
    widen,
)
from ingot.validate.identity.weights_names import EXPERTS, HEAD, Made, Part, bare, canonical

Doubles = npt.NDArray[np.float64]
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
WRAPPER = "base_model.model."
# Role of a tensor, after its module; the name of the adapter may stand behind it.
ROLE = re.compile(
    r"(?P<module>.+?)\.(?P<role>lora_A|lora_B|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector|token_adapter\.trainable_tokens_delta)"
    r"(?:\.(?!weight$|bias$)[^.]+)?(?P<leaf>\.weight|\.bias)?"
)
SAVED = re.compile(r"\.modules_to_save\.[^.]+")
BASE_LAYER = ".base_layer"
BIAS = "lora_B.bias"
TOKENS = "token_adapter.trainable_tokens_delta"
ONE_EXPERT = re.compile(r"(?P<owner>.+)\.(?P<expert>\d+)\.(?P<leaf>[^.]+\.weight)")
# Tensors of an adapter that are kept after their use.
MOST_HELD = 4
# Half a unit in the last place of 1 in float32, and the smallest float32.
UNIT, LEAST = 2.0**-24, 2.0**-149


@dataclass(frozen=True)
class Change:
    """What some tensors of an adapter make of a weight.

    Attributes:
        roles: the tensors, by role.
        scaling: s.
        tokens: rows that are stored whole, for ``TOKENS``.
        matrix: of the weight that is changed; None for all of them.
        row: first row of it that is changed.
        rows: how many rows of each matrix are changed.
        experts: matrices that A and B are of together; 0 where they are of one.
    """

    roles: Mapping[str, Tensor]
    scaling: float = 1.0
    tokens: tuple[int, ...] = ()
    matrix: int | None = None
    row: int = 0
    rows: int = 0
    experts: int = 0


@dataclass
class Adapter:
    """An adapter folder, and which weights of a model its tensors change.

    Attributes:
        config: ``adapter_config.json``.
        shapes: of the model's weights, by their names in a bare model.
        saved: weight -> the tensor that it is instead.
        trained: weight that is stored whole -> its name in the model that was trained.
        changes: weight -> what is done to it, in this order.
        placeless: tensors that are of none of the weights.
    """

    config: dict[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    saved: dict[str, Tensor] = field(default_factory=dict)
    trained: dict[str, str] = field(default_factory=dict)
    changes: dict[str, list[Change]] = field(default_factory=dict)
    placeless: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> Adapter:
        """Read an adapter's names and shapes; its tensors are read as they are needed.

        Raises:
            IngotError: a file that is not what its name says.
        """
        adapter = cls(read_object(folder / CONFIG), shapes)
        modules: dict[str, dict[str, Tensor]] = {}
        for full, tensor in read_header(folder / FILE).items():
            name = full.removeprefix(WRAPPER)
            found = ROLE.fullmatch(name)
            if found is None:
                name = SAVED.sub("", name).replace(f"{BASE_LAYER}.", ".")
                adapter.saved[bare(name)] = tensor
                adapter.trained[bare(name)] = name
            else:
                role = found["role"] + (".bias" if found["leaf"] == ".bias" else "")
                modules.setdefault(found["module"], {})[role] = tensor
        # A vocabulary may be stored with other rows.
        sizes = {name: t.shape for name, t in adapter.saved.items() if name in shapes}
        adapter.shapes = {**shapes, **sizes}
        adapter._place(modules)
        return adapter

    def _place(self, modules: Mapping[str, Mapping[str, Tensor]]) -> None:
        targets = {module: self._target(module, roles) for module, roles in modules.items()}
        patterns = self.config.get("alpha_pattern") or {}
        names = [name for _, name in targets.values()]
        matched = full_matches(list(patterns), names, after_dot=True)
        for module, (weight, name) in targets.items():
            roles = modules[module]
            found = (a for a, m in zip(patterns.values(), matched, strict=True) if name in m)
            alpha = next(found, self.config.get("lora_alpha", 8))
            product = {role: tensor for role, tensor in roles.items() if role != BIAS}
            change = self._change(weight, product, alpha)
            if change is None:
                self.placeless += [tensor.name for tensor in roles.values()]
                continue
            parameter, made = change
            self.changes.setdefault(parameter, []).append(made)
            if BIAS in roles:
                bias = Change({BIAS: roles[BIAS]}, made.scaling)
                owner = parameter.removesuffix(".weight")
                self.changes.setdefault(f"{owner}.bias", []).append(bias)

    def _target(self, module: str, roles: Mapping[str, Tensor]) -> tuple[str, str]:
        """The weight that a module of PEFT's changes, and the name that patterns are of."""
        name = module
        while name.endswith(BASE_LAYER):
            name = name.removesuffix(BASE_LAYER)
        # A module of several weights has each in a wrapper; the shapes tell which it is.
        for leaf in EXPERTS:
            shape = self.shapes.get(f"{bare(name)}.{leaf}")
            adapted = [roles[role].shape for role in ("lora_B", "lora_A") if role in roles]
            if len(adapted) == 2 and shape and shape[1:] == (adapted[0][0], adapted[1][1]):
                return f"{bare(name)}.{leaf}", f"{name}.{leaf}"
        weight, modules = f"{name}.weight", self.config.get("target_modules") or ()
        by_name = isinstance(modules, str) or any(_ends(name, each) for each in modules)
        parameters = self.config.get("target_parameters") or ()
        as_parameter = not by_name and any(_ends(weight, each) for each in parameters)
        return bare(weight), weight if as_parameter else name

    def _change(
        self, weight: str, roles: Mapping[str, Tensor], alpha: float
    ) -> tuple[str, Change] | None:
        """The weight of ``shapes`` that is changed, and how."""
        matrix, row, shape = None, 0, self.shapes.get(weight)
        rows = shape[-2] if shape is not None and len(shape) > 1 else 0
        if shape is None:
            # One expert of a stack, and of that perhaps the gate alone.
            one = ONE_EXPERT.fullmatch(weight)
            stack = next((s for s, ends in EXPERTS.items() if one and one["leaf"] in ends), None)
            if one is None or stack is None or f"{one['owner']}.{stack}" not in self.shapes:
                return None
            weight, matrix = f"{one['owner']}.{stack}", int(one["expert"])
            ends = EXPERTS[stack]
            shape = self.shapes[weight][1:]
            rows = shape[0] // len(ends)
            row = ends.index(one["leaf"]) * rows
        if TOKENS in roles:
            return weight, Change(roles, tokens=self._tokens(weight), rows=rows)
        experts = shape[0] if len(shape) == 3 else 0
        down = roles.get("lora_A", roles.get("lora_embedding_A"))
        if down is None:
            return None
        rank = down.shape[0] // max(experts, 1)
        scaling = alpha / (rank**0.5 if self.config.get("use_rslora") else rank)
        return weight, Change(roles, scaling, (), matrix, row, rows, experts)

    def _tokens(self, weight: str) -> tuple[int, ...]:
        said = self.config.get("trainable_token_indices") or ()
        if not isinstance(said, dict):
            return tuple(said)
        module = weight.removesuffix(".weight")
        return next((tuple(t) for name, t in said.items() if _ends(module, bare(name))), ())

    def tie(self, table: str) -> None:
        """Let a tied head be what the adapted model computes with; see docs/design.md, Adapters.

        Args:
            table: the embedding's, by its name in a bare model.
        """
        for name, other in ((table, HEAD), (HEAD, table)):
            # What was not trained is stored as what lies below both.
            if other in self.saved and name not in self.saved and not self._trains(other):
                self.saved[name] = self.saved[other]
        changes = self.changes.get(table, [])
        # PEFT ties rows of the embedding alone to the head.
        if HEAD not in self.changes and all(TOKENS in each.roles for each in changes):
            self.changes[HEAD] = changes

    def _trains(self, weight: str) -> bool:
        """Whether the config says that a weight was trained whole."""
        owners = self.trained[weight].split(".")[:-1]
        above = (".".join(owners[:count]) for count in range(1, len(owners) + 1))
        saved = tuple(self.config.get("modules_to_save") or ())
        return any(name.endswith(saved) for name in above) if saved else False

    def replace(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a checkpoint, with those that are stored whole in their place."""
        result = dict(stored)
        for weight, tensor in self.saved.items():
            same = [name for name in stored if canonical(name) == weight]
            if not same:
                for name in _other_spelling(weight, result):
                    del result[name]
            result[same[0] if same else weight] = tensor
        return result


def _other_spelling(weight: str, stored: Mapping[str, Tensor]) -> list[str]:
    """Tensors that hold the same experts, fused or one by one."""
    owner, _, leaf = weight.rpartition(".")
    if leaf in EXPERTS:
        ones = ((name, ONE_EXPERT.fullmatch(bare(name))) for name in stored)
        return [
            n for n, one in ones if one and one["owner"] == owner and one["leaf"] in EXPERTS[leaf]
        ]
    one = ONE_EXPERT.fullmatch(weight)
    stack = next((s for s, ends in EXPERTS.items() if one and one["leaf"] in ends), None)
    return [name for name in stored if one and bare(name) == f"{one['owner']}.{stack}"]


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


@dataclass
class Merged:
    """A checkpoint with an adapter in it; a ``Source``."""

    adapter: Adapter
    reader: Reader
    plain: Plain
    _norms: dict[int, Doubles] = field(default_factory=dict)
    _held: dict[str, Doubles] = field(default_factory=dict)

    def rows(
        self, made: Made, part: Part, first: int, count: int, columns: int
    ) -> tuple[Floats, Floats]:
        """See ``Source.rows``."""
        base, _ = self.plain.rows(made, part, first, count, columns)
        changes = self.adapter.changes.get(made.parameter, ())
        if not changes:
            return base, base
        value, bound = base.astype(np.float64), np.zeros(base.shape)
        for change in changes:
            if change.matrix is not None and change.matrix != part.matrix:
                continue
            if BIAS in change.roles:
                shift = self._read(change.roles[BIAS])[part.row + first :][:count, None]
                shift = shift * np.float32(change.scaling)
                value = value + shift
                bound += UNIT * (np.abs(value) + np.abs(shift))
                continue
            begin = part.row + first
            low, high = max(begin, change.row), min(begin + count, change.row + change.rows)
            if low < high:
                inside, rows = slice(low - begin, high - begin), slice(low, high)
                self._apply(change, made, part, rows, value[inside], bound[inside])
        return (value - bound).astype(np.float32), (value + bound).astype(np.float32)

    def _read(self, tensor: Tensor) -> Doubles:
        # The experts of a stack share their tensors, and are changed one after the other.
        if tensor.name not in self._held:
            while len(self._held) >= MOST_HELD:
                del self._held[next(iter(self._held))]
            bits = self.reader.elements(tensor, 0, tensor.size)
            values = widen(bits, tensor.dtype).reshape(tensor.shape)
            self._held[tensor.name] = values.astype(np.float64)
        return self._held[tensor.name]

    def _apply(
        self, change: Change, made: Made, part: Part, rows: slice, value: Doubles, bound: Doubles
    ) -> None:
        """Change some rows of a matrix, and what rounding can do to them, in place."""
        if change.tokens:
            whole = self._read(change.roles[TOKENS])
            for number, token in enumerate(change.tokens):
                if rows.start <= token < rows.stop:
                    value[token - rows.start], bound[token - rows.start] = whole[number], 0.0
            return
        embedding = "lora_embedding_A" in change.roles
        down, up = (
            self._read(change.roles[f"lora_{'embedding_' if embedding else ''}{which}"])
            for which in "AB"
        )
        if embedding:
            down, up = up.T, down.T
        elif change.experts:
            down = down.reshape(change.experts, -1, down.shape[1])[part.matrix]
            up = up.reshape(len(up), -1, change.experts)[:, :, part.matrix]
        up = up[rows.start - change.row : rows.stop - change.row]
        scaling = float(np.float32(change.scaling))
        size = abs(scaling) * (np.abs(up) @ np.abs(down))
        value += scaling * (up @ down)
        # As many roundings as there are products and sums, one of the scaling, one of the sum.
        bound += UNIT * ((len(down) + 3) * size + 2 * np.abs(value)) + LEAST * len(down)
        magnitude = change.roles.get("lora_magnitude_vector")
        if magnitude is None:
            return
        weights = self._read(magnitude)
        if embedding:
            ratio, terms = (weights / self._column_norms(change, made, part))[None], change.rows
        else:
            norm = np.linalg.norm(value, axis=1)
            ratio = (weights[rows.start - change.row : rows.stop - change.row] / norm)[:, None]
            terms = value.shape[1]
        value *= ratio
        # Of a norm over so many squares, a quotient and a product.
        bound *= np.abs(ratio)
        bound += UNIT * (terms / 8 + 8) * np.abs(value)

    def _column_norms(self, change: Change, made: Made, part: Part) -> Doubles:
        """The norm of each column of an embedding with its change, but for the magnitudes."""
        key = id(change)
        if key not in self._norms:
            plain = {k: t for k, t in change.roles.items() if k != "lora_magnitude_vector"}
            without = Change(plain, change.scaling, rows=change.rows)
            columns = made.shape[-1]
            total = np.zeros(columns)
            height = max(1, (1 << 21) // columns)
            for first in range(0, part.rows, height):
                count = min(height, part.rows - first)
                base, _ = self.plain.rows(made, part, first, count, columns)
                value = base.astype(np.float64)
                rows = slice(first, first + count)
                self._apply(without, made, part, rows, value, np.zeros(value.shape))
                total += (value**2).sum(axis=0)
            self._norms[key] = np.sqrt(total)
        return self._norms[key]
