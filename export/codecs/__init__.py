"""How weights are encoded in fewer bits than they are computed in: one file a kind of format."""
