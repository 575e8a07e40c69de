"""The attributes by which TensorRT's parser finds the plugin of a node."""

from __future__ import annotations

import onnx_ir as ir

from ingot.export.passes.graph_pass import GraphPass
from ingot.plugins.operator import DOMAIN, VERSION

NAMESPACE, PLUGIN_VERSION = "plugin_namespace", "plugin_version"


class NamePlugins(GraphPass):
    """Gives each ``ingot`` node its plugin's namespace and version, as TensorRT wants them.

    The function bodies declare both attributes, and use neither: another runtime refuses a node
    with an attribute its function does not know.
    """

    def requires(self, model: ir.Model) -> None:
        for node in model.graph:
            has_body = node.domain != DOMAIN or node.op_identifier() in model.functions
            self.require(has_body, node, "has no function body yet")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        nodes = [node for node in model.graph if node.domain == DOMAIN]
        for node in nodes:
            node.attributes[NAMESPACE] = ir.AttrString(NAMESPACE, DOMAIN)
            node.attributes[PLUGIN_VERSION] = ir.AttrString(PLUGIN_VERSION, str(VERSION))
        for function in model.functions.values():
            if function.domain != DOMAIN:
                continue
            for name in (NAMESPACE, PLUGIN_VERSION):
                function.attributes[name] = ir.Attr(name, ir.AttributeType.STRING, None)
        return ir.passes.PassResult(model, modified=bool(nodes))

    def ensures(self, model: ir.Model) -> None:
        names = {NAMESPACE, PLUGIN_VERSION}
        for node in model.graph:
            if node.domain == DOMAIN:
                self.ensure(names <= node.attributes.keys(), node, "names no plugin")
                known = model.functions[node.op_identifier()].attributes.keys()
                foreign = node.attributes.keys() - known
                self.ensure(not foreign, node, f"has {foreign}, which its function does not know")
