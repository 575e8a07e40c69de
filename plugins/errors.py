"""The one base class of every error a user can cause."""


class IngotError(Exception):
    """A mistake in the input, not in Ingot: what was found, what was expected, what to do next.

    Command lines print the message without a stack trace and exit with status 2.
    """
