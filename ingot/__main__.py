"""``python -m ingot``: every command."""

from ingot.export.cli import main

main(prog_name="python -m ingot")
