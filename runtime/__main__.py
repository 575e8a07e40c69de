"""``python -m runtime``."""

from ingot.runtime.cli import main

main(prog_name="python -m runtime")
