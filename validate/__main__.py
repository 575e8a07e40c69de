"""``python -m validate``."""

from ingot.validate.cli import validate_command

validate_command(prog_name=f"python -m {__package__}")
