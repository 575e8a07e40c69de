"""``python -m runtime``."""

from ingot.runtime.cli import main

main(prog_name=f"python -m {__package__}")
