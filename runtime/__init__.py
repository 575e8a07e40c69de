"""Running an ingot: sessions, generation, serving. Nothing here imports PyTorch."""
