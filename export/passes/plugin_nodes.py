"""The attributes by which TensorRT's parser finds the plugin of a node."""

from __future__ import annotations

import onnx_ir as ir

from ingot.plugins.operator import DOMAIN, VERSION

NAMESPACE, PLUGIN_VERSION = "plugin_namespace", "plugin_version"


class NamePlugins(ir.passes.InPlacePass):
    """Gives each ``ingot`` node its plugin's namespace and version, as TensorRT wants them.

    The function bodies declare both attributes, and use neither: another runtime refuses a node
    with an attribute its function does not know.
    """

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
