"""What the tracer noted for its own debugging, removed."""

from __future__ import annotations

import onnx_ir as ir

from ingot.export.passes.graph_pass import GraphPass
from ingot.export.passes.scales import FACTOR


class DropTracerMetadata(GraphPass):
    """Removes stack traces and FX text: they hold this machine's paths and double the file."""

    def requires(self, model: ir.Model) -> None:
        for node in model.graph:
            folded = FACTOR not in node.metadata_props
            self.require(folded, node, "has a note of a factor that is still to be folded")

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

    def ensures(self, model: ir.Model) -> None:
        self.ensure(not model.metadata_props, "the model", "has metadata")
        for node in model.graph:
            for noted in (node, *node.inputs, *node.outputs):
                clean = noted is None or not noted.metadata_props
                self.ensure(clean, node, "has metadata, or one of its values has")
