"""What an operator of Ingot is: said once, at the end of its file, and all that follows from it.

PyTorch's custom operator with its fake, the ONNX schema, the exporter's translation, the structure
of the kernels' call, TensorRT's plugins in Python and C++, and the inputs of checks are derived.
Four things are not, and are compared with each other by tests: the eager body, the function body in
standard ONNX operators, the kernel, and its plan in ``plugins/csrc``.

A dimension is a letter of docs/design.md, a number, or one of the two forms ``2I`` and ``W-1``. One
letter is one size across all tensors of a call.

Runtimes read declarations too, so PyTorch and ONNX are imported inside of functions, here and in
every file of an operator.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from ctypes import Structure, c_float, c_int32, c_void_p
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ingot.plugins.activations import ACTIVATIONS
from ingot.plugins.errors import IngotError

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir
    from onnx.defs import OpSchema

DOMAIN = "ingot"
VERSION = 1
BODY_OPSET = 23

# ONNX's and PyTorch's name of an element type -> its number in ingot_kernels.h.
DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2}
# "T" is one of these, the same for every tensor of a call that has it.
T = tuple(DTYPES)
HALVES = ("float16", "bfloat16")
INT32_MAX = 2**31 - 1

Shape = Sequence[int]
AttributeValue = int | float | str

_DIM = re.compile(r"(\d*)([A-Za-z]*)(-\d+)?")


class OperatorError(IngotError):
    """A node, an engine or a call that an operator refuses."""


class Kind(NamedTuple):
    """An attribute's type in PyTorch's schema, in ONNX, in TensorRT, and in a call's structure."""

    torch: str
    onnx: str
    tensorrt: Literal["int32", "float32", "char"]
    c: type[c_int32 | c_float]
    cpp: str


KINDS = {
    "int": Kind("SymInt", "INT", "int32", c_int32, "int32_t"),
    "bool": Kind("bool", "INT", "int32", c_int32, "int32_t"),
    "float": Kind("float", "FLOAT", "float32", c_float, "float"),
    "activation": Kind("str", "STRING", "char", c_int32, "ingot_activation"),
}


@dataclass(frozen=True)
class Attribute:
    """An attribute of the ONNX node, and a field of TensorRT's plugin.

    Attributes:
        name: in all of them.
        kind: a key of ``KINDS``; an activation is a key of ``activations.ACTIVATIONS``.
    """

    name: str
    kind: Literal["int", "bool", "float", "activation"]

    @property
    def type(self) -> Kind:
        return KINDS[self.kind]


@dataclass(frozen=True)
class Tensor:
    """An input or output.

    Attributes:
        name: as in the ONNX schema; the kernels' pointer has it in lower case.
        dtype: "T" or the one type it may have. Where T is float64, as in eager references, float32
            is float64 too.
        shapes: the forms it may take, each the names of its dimensions.
        optional: whether an eager call may leave it out; a node has it.
        draw: how a check draws it, see ``plugins.check.inputs``.
    """

    name: str
    dtype: Literal["T", "float32", "int64"]
    shapes: tuple[tuple[str, ...], ...]
    optional: bool = False
    draw: str = "normal"

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(map(len, self.shapes))

    @property
    def forms(self) -> str:
        """Its shapes as a reader wants them: ``[N, Kin] or [N, K, Kin]``."""
        return " or ".join(f"[{', '.join(shape)}]" for shape in self.shapes)


def tensor(
    name: str,
    dtype: Literal["T", "float32", "int64"],
    *shapes: str,
    optional: bool = False,
    draw: str = "normal",
) -> Tensor:
    """A ``Tensor`` whose forms are written with spaces: ``"N K Kin"``."""
    return Tensor(name, dtype, tuple(tuple(shape.split()) for shape in shapes), optional, draw)


@dataclass(frozen=True, eq=False)
class Operator:
    """One operator. Called, it is PyTorch's custom operator, which the exporter knows.

    Attributes:
        name: of the ONNX operator; PyTorch and the kernels have it in snake case.
        doc: of its file.
        eager: the reference in PyTorch, whose arguments are the inputs, then the attributes; its
            outputs are contiguous, as the kernels write them.
        body: the node -> the operator in standard ONNX operators. A function cannot branch on a
            string, so it may depend on the node's attributes.
        refusal: sizes of the dimensions, integer attributes among them, and the dtype of T -> why
            the kernels do not take them and the way out; empty where they do.
        inputs: the first is of T.
        outputs: their dimensions are those of inputs.
        attributes: all of them required.
        call: members of the kernels' structure between ``dtype`` and the pointers, in its order:
            an attribute by its name, a size as ``tokens=N``, and ``=form`` for the number of the
            form that the first input has. What is not in it, the kernels choose by themselves.
        kernels: the file of ``plugins/kernels`` that has its forms.
        workspace: whether the kernels take one.
        wide: what is computed in float32 beside the sums, in words; empty for nothing.
        onnx_runtime: ONNX Runtime's own operator that ``--target ort`` makes of it, if one.
    """

    name: str
    doc: str
    eager: Callable[..., Any]
    body: Callable[[ir.Node], onnx.FunctionProto]
    refusal: Callable[[Mapping[str, int], str], str]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    call: str
    kernels: str
    attributes: tuple[Attribute, ...] = ()
    workspace: bool = True
    wide: str = ""
    onnx_runtime: str = ""

    @property
    def snake(self) -> str:
        """The name in snake case: ``moe_dispatch``."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", self.name).lower()

    @property
    def c_call(self) -> str:
        """The function of ``ingot_kernels.h``; its structure ends in ``_params``."""
        return f"ingot_{self.snake}"

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Inputs, then outputs."""
        return self.inputs + self.outputs

    # Shapes.

    def references(self, output: Tensor) -> tuple[tuple[str, int], ...]:
        """Where each dimension of an output comes from: an input and an axis of it."""
        # An input of several forms has no fixed axis for a dimension.
        axes = {
            dim: (tensor.name, axis)
            for tensor in reversed(self.inputs)
            if len(tensor.shapes) == 1
            for axis, dim in reversed(list(enumerate(tensor.shapes[0])))
        }
        return tuple(axes[dim] for dim in output.shapes[0])

    def bind(self, shapes: Sequence[Shape | None]) -> dict[str, int]:
        """The size of each dimension, from the inputs' shapes; None for one that is left out.

        Raises:
            OperatorError: a wrong rank, or two tensors that disagree.
        """
        named = self._named(shapes)
        sizes: dict[str, int] = {}
        for *_, dim, size in named:
            sizes.setdefault(dim, size)
        for name, axis, dim, size in named:
            expected = size_of(dim, sizes)
            if size != expected:
                raise OperatorError(
                    f"{self.name} got {size} for dimension {axis} of {name}, which is {dim}; by "
                    f"its other inputs that is {expected}."
                )
        return sizes

    def bound(self, shapes: Sequence[Shape]) -> dict[str, int]:
        """Upper limits of the dimensions, from those of the inputs' shapes.

        TensorRT derives each tensor's limits apart, so that two may disagree.
        """
        sizes: dict[str, int] = {}
        for *_, dim, size in self._named(shapes):
            sizes[dim] = max(size, sizes.get(dim, size))
        return sizes

    def check_ranks(self, ranks: Sequence[int | None]) -> None:
        """Raise OperatorError where an input has another rank than it may."""
        for tensor, rank in zip(self.inputs, ranks, strict=True):
            if rank is not None and rank not in tensor.ranks:
                raise OperatorError(
                    f"{self.name} got {tensor.name} of rank {rank}; it is {tensor.forms}."
                )

    def _named(self, shapes: Sequence[Shape | None]) -> list[tuple[str, int, str, int]]:
        """Input, axis, name and size of each dimension."""
        self.check_ranks([None if shape is None else len(shape) for shape in shapes])
        return [
            (tensor.name, axis, dim, size)
            for tensor, shape in zip(self.inputs, shapes, strict=True)
            if shape is not None
            for axis, (dim, size) in enumerate(
                zip(tensor.shapes[tensor.ranks.index(len(shape))], shape, strict=True)
            )
        ]

    # The kernels' call.

    @cached_property
    def members(self) -> dict[str, str]:
        """Members of the structure between ``dtype`` and the pointers -> where each comes from."""
        pairs = (each.partition("=") for each in self.call.split())
        return {member: source or member for member, _, source in pairs}

    @cached_property
    def sizes(self) -> dict[str, str]:
        """Members of the structure that are sizes -> the dimension."""
        return {member: source for member, source in self.members.items() if source[0].isupper()}

    @cached_property
    def structure(self) -> type[Structure]:
        """The structure of ``ingot_kernels.h`` that a call of the kernels is given."""
        types = {attribute.name: attribute.type.c for attribute in self.attributes}
        fields = [
            ("dtype", c_int32),
            *((member, types.get(source, c_int32)) for member, source in self.members.items()),
            *((member, c_void_p) for member in self.pointers),
        ]
        return type(self.name, (Structure,), {"_fields_": fields})

    def parameters(
        self,
        dtype: str,
        sizes: Mapping[str, int],
        first_rank: int,
        attributes: Mapping[str, AttributeValue],
    ) -> Structure:
        """The structure of a call, but for the addresses.

        Args:
            dtype: of T.
            sizes: of the dimensions, as ``bind`` or ``bound`` give them.
            first_rank: of the first input.
            attributes: by name.

        Raises:
            OperatorError: a size past int32.
        """
        values: dict[str, AttributeValue] = {"dtype": DTYPES[dtype]}
        for member, source in self.members.items():
            if member in self.sizes:
                if sizes[source] > INT32_MAX:
                    raise OperatorError(
                        f"{self.name} got {sizes[source]} for {source}; it takes up to {INT32_MAX}."
                    )
                values[member] = sizes[source]
            elif source == "form":
                values[member] = self.inputs[0].ranks.index(first_rank)
            else:
                value = attributes[source]
                values[member] = ACTIVATIONS[value].number if isinstance(value, str) else value
        return self.structure(**values)

    @cached_property
    def pointers(self) -> tuple[str, ...]:
        """Members of the structure that are addresses: of the inputs, then of the outputs."""
        return tuple(each.name.lower() for each in self.tensors)

    def point(self, parameters: Structure, addresses: Sequence[int | None]) -> None:
        """Put the addresses of the inputs, then of the outputs, into the structure of a call."""
        for member, address in zip(self.pointers, addresses, strict=True):
            setattr(parameters, member, address)

    # PyTorch.

    def __call__(self, *arguments: Any) -> Any:
        return self.custom_op(*arguments)

    @cached_property
    def custom_op(self) -> Any:
        """PyTorch's custom operator ``ingot::moe_dispatch``, registered when it is first asked for.

        Its fake has the shapes and dtypes of the declared outputs.
        """
        import torch

        inputs = [f"Tensor{'?' * each.optional} {each.name}" for each in self.inputs]
        attributes = [f"{each.type.torch} {each.name}" for each in self.attributes]
        returned = ["Tensor"] * len(self.outputs)
        result = returned[0] if len(returned) == 1 else f"({', '.join(returned)})"
        schema = f"({', '.join([*inputs, *attributes])}) -> {result}"
        operator = torch.library.custom_op(
            f"{DOMAIN}::{self.snake}", self.eager, mutates_args=(), schema=schema
        )
        operator.register_fake(self._fake)
        return operator

    @property
    def overload(self) -> Any:
        """What a traced graph calls: ``torch.ops.ingot.moe_dispatch.default``."""
        import torch

        assert self.custom_op is not None
        return getattr(getattr(torch.ops, DOMAIN), self.snake).default

    def _fake(self, *arguments: Any) -> Any:
        import torch

        x = arguments[0]
        by_name = dict(zip((each.name for each in self.inputs), arguments, strict=False))
        outputs = tuple(
            x.new_empty(
                [by_name[name].shape[axis] for name, axis in self.references(output)],
                dtype=x.dtype
                if output.dtype == "T"
                else torch.promote_types(x.dtype, torch.float32),
            )
            for output in self.outputs
        )
        return outputs if len(outputs) > 1 else outputs[0]

    # ONNX.

    @cached_property
    def schema(self) -> OpSchema:
        """The ONNX schema."""
        from onnx.defs import OpSchema

        types = {"T": "T", "float32": "tensor(float)", "int64": "tensor(int64)"}

        def parameters(tensors: tuple[Tensor, ...]) -> list[OpSchema.FormalParameter]:
            return [
                OpSchema.FormalParameter(each.name, types[each.dtype], each.forms)
                for each in tensors
            ]

        return OpSchema(
            self.name,
            DOMAIN,
            VERSION,
            doc=self.doc,
            inputs=parameters(self.inputs),
            outputs=parameters(self.outputs),
            type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "")],
            attributes=[
                OpSchema.Attribute(each.name, getattr(OpSchema.AttrType, each.type.onnx))
                for each in self.attributes
            ],
        )

    def register_schema(self) -> None:
        """Make the operator known to onnx's registry, once; exporters look it up there."""
        import onnx.defs

        if not onnx.defs.has(self.name, DOMAIN):
            onnx.defs.register_schema(self.schema)

    @cached_property
    def translate(self) -> Callable[..., Any]:
        """Entry of the torch exporter's translation table: one FX call becomes one ONNX node."""

        # The exporter takes notes on it, so it is a function and no method.
        def translate(*arguments: Any) -> Any:
            from onnxscript.values import Opset

            self.register_schema()
            inputs, values = arguments[: len(self.inputs)], arguments[len(self.inputs) :]
            attributes = {
                each.name: int(value) if each.kind == "bool" else value
                for each, value in zip(self.attributes, values, strict=True)
            }
            return getattr(Opset(DOMAIN, VERSION), self.name)(*inputs, **attributes)

        return translate


def size_of(dim: str, sizes: Mapping[str, int]) -> int:
    """The size of a dimension, from those of the letters: of ``2I``, from that of ``I``."""
    factor, letter, added = _parsed(dim)
    return factor * (sizes[letter] if letter else 1) + added


@cache
def _parsed(dim: str) -> tuple[int, str, int]:
    """``2I`` and ``W-1`` as a factor, a letter or none, and what is added."""
    parts = _DIM.fullmatch(dim)
    assert parts is not None, dim
    factor, letter, less = parts.groups()
    return int(factor or 1), letter, int(less or 0)


def not_multiple_of_8(sizes: Mapping[str, int], dtype: str) -> str:
    """Why the kernels refuse sides by their names; empty where they do not.

    They load 16 bytes at a time, which in half precision are 8 numbers.
    """
    for name, size in sizes.items():
        if dtype in HALVES and size % 8:
            return f"{name} {size} is not a multiple of 8: pad it, or use --precision fp32"
    return ""
