"""Where a wrong ingot first goes wrong: the layer and node, or the session."""
