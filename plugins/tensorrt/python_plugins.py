"""The plugins in Python, for TensorRT and for TensorRT-RTX.

Their classes derive from classes of that module, so ``register`` makes them when it is given one.
An engine can be built where the kernels are not, but then it cannot run: see ``KERNELS_FIELD``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ingot.plugins import library
from ingot.plugins.activations import ACTIVATIONS
from ingot.plugins.library import Library
from ingot.plugins.operator import (
    DOMAIN,
    VERSION,
    Attribute,
    AttributeValue,
    Operator,
    OperatorError,
    T,
)
from ingot.plugins.registry import OPERATORS

# As the parser looks a node's plugin up.
NAMESPACE, PLUGIN_VERSION = DOMAIN, str(VERSION)

# Written into an engine beside the fields: the interface version of the kernels whose workspace it
# reserved, 0 where there were none. With too little workspace the kernels would overwrite other
# tensors.
KERNELS_FIELD = "kernels"


def register(trt: Any, path: Path = library.PATH) -> None:
    """Offer the plugins to parsers, builders and runtimes of this process; again does nothing.

    A plugin that is there already stays, such as one of ``libingot_trt.so``.

    Args:
        trt: the module ``tensorrt`` or ``tensorrt_rtx``.
        path: of the kernel library.
    """
    registry = trt.get_plugin_registry()
    # Not `get_creator`, which writes an error to the log for each that is missing.
    there = {
        (each.name, each.plugin_version, each.plugin_namespace) for each in registry.all_creators
    }
    for operator in OPERATORS.values():
        if (operator.name, PLUGIN_VERSION, NAMESPACE) not in there:
            registry.register_creator(creator(trt, operator, path), NAMESPACE)


class Node:
    """What a node of the graph says, and the call that it becomes.

    Args:
        operator: of the node.
        values: its fields; others are ignored.
        kernels: the interface version of the kernels that its engine is for, 0 for none.

    Raises:
        OperatorError: a field is missing, or is an activation that no kernel has.
    """

    def __init__(
        self, operator: Operator, values: Mapping[str, AttributeValue], kernels: int
    ) -> None:
        missing = [each.name for each in operator.attributes if each.name not in values]
        if missing:
            raise OperatorError(f"{operator.name} lacks {', '.join(missing)}; set every attribute.")
        activation = values.get("activation", "silu")
        if activation not in ACTIVATIONS:
            raise OperatorError(
                f"{operator.name} has no activation {activation!r}; use one of "
                f"{', '.join(ACTIVATIONS)}."
            )
        self.operator = operator
        self.values = {each.name: values[each.name] for each in operator.attributes}
        self.kernels = kernels
        # TensorRT keeps only the addresses of what an engine is to hold.
        self.serialized = {
            **{each.name: _array(each, self.values[each.name]) for each in operator.attributes},
            KERNELS_FIELD: np.array([kernels], np.int32),
        }
        # The shapes of the last call and what they became: a generation repeats them.
        self._last: tuple[object, ctypes.Structure, int] | None = None

    def workspace_bytes(self, path: Path, dtype: str, most: Sequence[Sequence[int]]) -> int:
        """Bytes for inputs of up to these shapes; 0 without kernels.

        Raises:
            OperatorError: a size past int32.
            LibraryError: one that the kernels refuse.
        """
        kernels = _library(path)
        if kernels is None:
            return 0
        sizes = self.operator.bound(most)
        parameters = self.operator.parameters(dtype, sizes, len(most[0]), self.values)
        return kernels.workspace_bytes(parameters)

    def run(
        self,
        path: Path,
        dtype: str,
        shapes: Sequence[Sequence[int]],
        addresses: Sequence[int],
        workspace: int,
        stream: int,
    ) -> None:
        """Enqueue the call.

        Args:
            path: of the kernel library.
            dtype: of T.
            shapes: of the inputs.
            addresses: of the inputs, then the outputs.
            workspace: address of what ``workspace_bytes`` asked for.
            stream: a ``CUstream``.

        Raises:
            OperatorError: the engine was built for other kernels, or the shapes disagree.
            LibraryError: there are no kernels here, or they refuse the call.
        """
        kernels = _library(path) or Library(path)
        if self.kernels != library.VERSION:
            built_for = f"version {self.kernels}" if self.kernels else "none"
            raise OperatorError(
                f"the engine was built for other GPU kernels ({built_for}) than those of "
                f"{path} (version {library.VERSION}); build it again."
            )
        # The contexts of an engine share this and may run in several threads, hence the copies.
        last, key = self._last, (dtype, *map(tuple, shapes))
        if last is None or last[0] != key:
            sizes = self.operator.bind(shapes)
            parameters = self.operator.parameters(dtype, sizes, len(shapes[0]), self.values)
            # TensorRT does not say how much it reserved. It serialises a plugin for one profile
            # before it asks what the next needs, so the engine cannot say either. But it asked for
            # the profile's largest sizes, whose bytes are no fewer than those of any in it.
            last = self._last = key, parameters, kernels.workspace_bytes(parameters)
        call = self.operator.structure.from_buffer_copy(last[1])
        self.operator.point(call, addresses)
        kernels.run(call, workspace, last[2], stream)


def _array(attribute: Attribute, value: AttributeValue) -> np.ndarray:
    if isinstance(value, str):
        return np.frombuffer(value.encode(), np.int8)
    return np.array([value], attribute.type.tensorrt)


def _library(path: Path) -> Library | None:
    return _open(path) if path.is_file() else None


@cache
def _open(path: Path) -> Library:
    return Library(path)


def creator(trt: Any, operator: Operator, path: Path = library.PATH) -> Any:
    """A creator of the operator's plugin, which TensorRT's registry takes."""
    field_types = {
        "int32": trt.PluginFieldType.INT32,
        "float32": trt.PluginFieldType.FLOAT32,
        "char": trt.PluginFieldType.CHAR,
    }
    names = {
        trt.float32: "float32",
        trt.float16: "float16",
        trt.bfloat16: "bfloat16",
        trt.int64: "int64",
    }
    data_types = {name: data_type for data_type, name in names.items()}

    class IngotPlugin(
        trt.IPluginV3,  # type: ignore[misc]
        trt.IPluginV3OneCore,  # type: ignore[misc]
        trt.IPluginV3OneBuild,  # type: ignore[misc]
        trt.IPluginV3OneRuntime,  # type: ignore[misc]
    ):
        def __init__(self, node: Node) -> None:
            for base in IngotPlugin.__bases__:
                base.__init__(self)
            self.plugin_name = operator.name
            self.plugin_version = PLUGIN_VERSION
            self.plugin_namespace = NAMESPACE
            self.num_outputs = len(operator.outputs)
            self.node = node

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def clone(self) -> Any:
            return IngotPlugin(self.node)

        def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
            return [
                input_types[0] if output.dtype == "T" else data_types[output.dtype]
                for output in operator.outputs
            ]

        def get_output_shapes(
            self, inputs: Sequence[Any], shape_inputs: Sequence[Any], builder: Any
        ) -> list[Any]:
            operator.check_ranks([len(shape) for shape in inputs])
            by_name = dict(zip((each.name for each in operator.inputs), inputs, strict=True))
            return [
                trt.DimsExprs([by_name[name][axis] for name, axis in operator.references(output)])
                for output in operator.outputs
            ]

        def supports_format_combination(
            self, position: int, tensors: Sequence[Any], inputs: int
        ) -> bool:
            found, expected = tensors[position].desc, operator.tensors[position].dtype
            if found.format != trt.TensorFormat.LINEAR:
                return False
            if expected != "T":
                return bool(found.type == data_types[expected])
            # The first tensor is of T in every operator.
            return names.get(found.type) in T and found.type == tensors[0].desc.type

        def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            # A profile with sizes that the kernels refuse ends the build here; TensorRT would take
            # the exception of get_workspace_size for no need.
            self.get_workspace_size(inputs, outputs)

        def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
            dtype = names[inputs[0].desc.type]
            return self.node.workspace_bytes(path, dtype, [list(each.max) for each in inputs])

        def get_fields_to_serialize(self) -> Any:
            data = self.node.serialized
            return trt.PluginFieldCollection(
                [
                    trt.PluginField(each.name, data[each.name], field_types[each.type.tensorrt])
                    for each in (*operator.attributes, Attribute(KERNELS_FIELD, "int"))
                ]
            )

        def attach_to_context(self, resources: Any) -> Any:
            # Loading kernels is not possible once a stream is being captured into a CUDA graph.
            kernels = _library(path)
            if kernels is not None:
                kernels.prepare()
            return self.clone()

        def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            pass

        def set_tactic(self, tactic: int) -> None:
            pass

        def enqueue(
            self,
            input_descs: Sequence[Any],
            output_descs: Sequence[Any],
            inputs: Sequence[int],
            outputs: Sequence[int],
            workspace: int,
            stream: int,
        ) -> None:
            dtype = names[input_descs[0].type]
            shapes = [list(each.dims) for each in input_descs]
            self.node.run(path, dtype, shapes, [*inputs, *outputs], workspace, stream)

    class IngotCreator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.name = operator.name
            self.plugin_version = PLUGIN_VERSION
            self.plugin_namespace = NAMESPACE
            self.field_names = trt.PluginFieldCollection(
                [
                    trt.PluginField(
                        each.name, np.array([], np.int8), field_types[each.type.tensorrt]
                    )
                    for each in operator.attributes
                ]
            )

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            values: dict[str, Any] = {}
            for each in fields:
                if each.type == trt.PluginFieldType.CHAR:
                    # The ONNX parser ends a string with a zero byte.
                    values[each.name] = each.data.tobytes().decode().rstrip("\0")
                else:
                    values[each.name] = each.data.item()
            here = library.VERSION if path.is_file() else 0
            return IngotPlugin(Node(operator, values, int(values.get(KERNELS_FIELD, here))))

    return IngotCreator()
