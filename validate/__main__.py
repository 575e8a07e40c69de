"""``python -m validate``."""

from ingot.validate.cli import validate_command

if __name__ == "__main__":
    validate_command(prog_name=f"python -m {__package__}")
