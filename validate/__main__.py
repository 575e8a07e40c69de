"""``python -m validate``."""

from ingot.plugins.startup import begin

begin()

# Only now, for it takes a while.
from ingot.validate.cli import validate_command  # noqa: E402

if __name__ == "__main__":
    validate_command(prog_name=f"python -m {__package__}")
