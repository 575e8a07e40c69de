"""A target's numbers held against the truth's: figures, limits, and the verdict."""
