"""``python -m runtime``."""

from ingot.plugins.startup import begin

begin()

# Only now, for it takes a while.
from ingot.runtime.cli import main  # noqa: E402

if __name__ == "__main__":
    main(prog_name=f"python -m {__package__}")
