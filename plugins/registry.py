"""The operators by their ONNX names; what works on every operator goes through these."""

from __future__ import annotations

from ingot.plugins.causal_conv import causal_conv
from ingot.plugins.mamba2_scan import mamba2_scan
from ingot.plugins.moe_dispatch import moe_dispatch
from ingot.plugins.moe_linear import moe_linear

OPERATORS = {each.name: each for each in (moe_dispatch, moe_linear, mamba2_scan, causal_conv)}
