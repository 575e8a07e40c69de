"""``python -m export``."""

from ingot.plugins.startup import begin

begin()

# Only now, for it takes a while.
from ingot.export.cli import export_command  # noqa: E402

if __name__ == "__main__":
    export_command(prog_name=f"python -m {__package__}")
