"""What is fed, and what the truth and the graph of an ingot compute from it."""
