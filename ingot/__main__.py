"""``python -m ingot``: every command."""

from ingot.export.cli import main

if __name__ == "__main__":
    main(prog_name="python -m ingot")
