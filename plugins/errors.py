"""The one base class of every error a user can cause, and the words of the commonest."""

from reprlib import Repr


class _Cut(Repr):
    def repr_int(self, x: int, level: int) -> str:
        # Python writes no more than 4,300 digits.
        bits = x.bit_length()
        return super().repr_int(x, level) if bits < 4300 else f"<an integer of {bits} bits>"


# Enough to find a value in its file; a file from somebody else may hold a hundred megabytes of it.
_CUT = _Cut()
_CUT.maxstring = _CUT.maxother = _CUT.maxlong = 80


class IngotError(Exception):
    """A mistake in the input, not in Ingot: what was found, what was expected, what to do next.

    Command lines print the message without a stack trace and exit with status 2.
    """


def install_hint(extra: str) -> str:
    """The command that adds what an extra of Ingot's needs, where Ingot is installed."""
    return f"pip install 'ingot-export[{extra}]'"


def shown(value: object) -> str:
    """A value as a message quotes it: its ``repr``, cut in the middle where it is long."""
    return _CUT.repr(value)


def named(name: str) -> str:
    """A name as a message has it: the name itself, quoted and cut where it is long or odd."""
    return name if name.isprintable() and len(name) <= 120 else shown(name)
