"""``python -m ingot``: every command."""

from ingot.plugins.startup import begin

begin()

# Only now, for it takes a while.
from ingot.export.cli import main  # noqa: E402

if __name__ == "__main__":
    main(prog_name="python -m ingot")
