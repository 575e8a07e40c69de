"""``python -m export``."""

from ingot.export.cli import export_command

export_command(prog_name=f"python -m {__package__}")
