"""What the tracer noted for its own debugging, removed."""

from __future__ import annotations

import onnx_ir as ir


class DropTracerMetadata(ir.passes.InPlacePass):
    """Removes stack traces and FX text: they hold this machine's paths and double the file."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        model.metadata_props.clear()
        model.graph.metadata_props.clear()
        for node in model.graph:
            node.metadata_props.clear()
            for value in node.outputs:
                value.metadata_props.clear()
        for value in (*model.graph.inputs, *model.graph.initializers.values()):
            value.metadata_props.clear()
        return ir.passes.PassResult(model, modified=True)
