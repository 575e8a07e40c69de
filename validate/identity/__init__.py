"""What needs no run: an ingot's weights, graph and contract held against its checkpoint."""
