"""``python -m export``."""

from ingot.export.cli import export_command

if __name__ == "__main__":
    export_command(prog_name=f"python -m {__package__}")
