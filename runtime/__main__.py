"""``python -m runtime``."""

from ingot.runtime.cli import main

if __name__ == "__main__":
    main(prog_name=f"python -m {__package__}")
