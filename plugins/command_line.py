"""How every command ends: its exit status, and one sentence where it could not do its work.

========  ==================================================================================
status    meaning
========  ==================================================================================
0         done: what was asked for is there
1         an ingot is there and failed its validation, or is worse than its baseline
2         nothing was made: a mistake in the input, what the system refuses, a fault of Ingot's
130, 143  interrupted (Ctrl-C), terminated (SIGTERM); what was begun is removed
========  ==================================================================================

``Command`` and ``Group`` are click's with that promise, and with ``--debug``, which shows the stack
trace of what is no mistake in the input. Programs without click use ``ended``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import click

from ingot.plugins import startup
from ingot.plugins.errors import IngotError, shown
from ingot.plugins.whole import system_error

if TYPE_CHECKING:
    from rich.console import Console

# Characters of a sentence: some lines of a terminal.
MOST_SAID = 1500
REFUSED, INTERRUPTED, TERMINATED = 2, 130, 143
# In the metadata that all contexts of one command line share.
_DEBUG = "ingot.debug"
# What memory that is not there reads like, where it is no MemoryError: of PyTorch's allocator, of
# C++ and of a library that cannot be mapped.
_NO_MEMORY = (
    "can't allocate memory",
    "cannot allocate memory",
    "failed to allocate memory",
    "failed to map segment",
    "bad_alloc",
    "bad allocation",
    "out of memory",
)


@contextlib.contextmanager
def ended(*, debug: Callable[[], bool] = lambda: False, doing: str = "") -> Iterator[None]:
    """Ends the process with the right status, and at most one sentence, where the block raises.

    Args:
        debug: whether to show stack traces.
        doing: what is done, such as ``ingot export``.
    """
    try:
        try:
            yield
        except (SystemExit, click.exceptions.Exit):
            # Now, since what cannot be written at the interpreter's own end has another status.
            _flush()
            raise
        _flush()
    # A click.Abort is an interrupt that click has caught.
    except (KeyboardInterrupt, click.Abort) as error:
        _interrupted(error)
    except (SystemExit, click.ClickException, click.exceptions.Exit):
        raise
    except BrokenPipeError:
        # Whoever reads, such as head, has enough.
        close_output()
        sys.exit(REFUSED)
    except IngotError as error:
        _exit_if_stopped(error)
        _refuse(str(error))
    # A panic of a library that is written in Rust is no Exception.
    except BaseException as error:
        _exit_if_stopped(error)
        if debug():
            traceback.print_exc()
        _refuse(sentence(error, doing))


def _interrupted(error: BaseException) -> NoReturn:
    _say(str(error) or "interrupted; what was begun is removed")
    sys.exit(INTERRUPTED)


def _exit_if_stopped(error: BaseException) -> None:
    """End as a signal asks, where a package that was being imported made another error of it."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        if isinstance(cause, KeyboardInterrupt):
            _interrupted(cause)
        if isinstance(cause, SystemExit) and cause.code == TERMINATED:
            sys.exit(TERMINATED)
        seen.append(cause)
        cause = cause.__cause__ or cause.__context__


def sentence(error: BaseException, doing: str = "") -> str:
    """What a user is told of an exception that is no ``IngotError``, raised by what was done."""
    # Where a long step was under way, ``Stages`` has noted which.
    steps = notes(error)
    step = f" at the step `{steps[0]}`" if steps else ""
    text = " ".join(str(error).split())
    said = shown(text) if len(text) > 200 else text
    system = system_error(error)
    if _lacks_memory(error):
        made = step or (f" for `{doing}`" if doing else "")
        return f"there is not enough memory{made}; free some, or use a machine with more."
    if system is not None:
        what = system.strerror or said or type(error).__name__
        places = [str(each) for each in (system.filename, system.filename2) if each is not None]
        where = f"{' and '.join(places)}: " if places else ""
        return f"the system refuses{step}: {where}{what}."
    if isinstance(error, ImportError):
        return f"a package is missing or broken: {said}; install Ingot and its extras again."
    kind = type(error).__name__
    return (
        f"a fault of Ingot itself{step}: {kind}{f': {said}' if said else ''}. --debug shows where; "
        "please report it."
    )


def notes(error: BaseException) -> list[str]:
    """What was added to an exception on its way (``add_note``), innermost first."""
    return list(getattr(error, "__notes__", []))


def _lacks_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error).lower()
    return any(words in text for words in _NO_MEMORY)


def _refuse(text: str) -> NoReturn:
    # What is quoted is cut where it is quoted; a path, or many names, may be long all the same.
    if len(text) > MOST_SAID:
        text = f"{text[: MOST_SAID // 2]} … {text[-MOST_SAID // 2 :]}"
    _say(f"error: {text}")
    sys.exit(REFUSED)


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        click.echo(text, err=True)


def _flush() -> None:
    # None where a program was started with its output closed.
    if sys.stdout is not None:
        sys.stdout.flush()


def close_output() -> None:
    """Let what is left of the standard output be flushed into nothing: whoever read it is gone."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, sys.stdout.fileno())
        os.close(nothing)


def console(**options: Any) -> Console:
    """Rich's console, which leaves it to ``ended`` what a reader that is gone means."""
    # Here: --help answers without it.
    from rich.console import Console

    class Ended(Console):
        def on_broken_pipe(self) -> NoReturn:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    return Ended(**options)


@contextlib.contextmanager
def told(made: Path) -> Iterator[None]:
    """In the block something is told of what is there already: failing changes no exit status.

    Raises:
        KeyboardInterrupt: saying that it is there.
    """
    try:
        yield
        _flush()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {made} is there, and whole") from None
    except BrokenPipeError:
        close_output()
    except Exception as error:
        said = str(error) if isinstance(error, IngotError) else sentence(error)
        note(f"{made} is there, and whole; but: {said}")
        # What the output still holds would fail once more at the end.
        if isinstance(error, OSError):
            close_output()


def note(text: str) -> None:
    """A line beside what was asked for, to standard error where that can be written."""
    _say(text)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """In the block SIGTERM unwinds the stack, so that what is half made is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _on_terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _on_terminate(_signal: int, _frame: FrameType | None) -> None:
    sys.exit(TERMINATED)


class _Ended(click.Command):
    """What ``Command`` and ``Group`` have in common."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.params.append(
            click.Option(
                ["--debug"],
                is_flag=True,
                expose_value=False,
                callback=_remember,
                help="Show the stack trace of an error that is no mistake in the input.",
            )
        )

    def make_context(self, *arguments: Any, **options: Any) -> click.Context:
        with ended():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: click.Context) -> Any:
        with ended(debug=lambda: bool(ctx.meta.get(_DEBUG)), doing=ctx.command_path):
            return super().invoke(ctx)

    def main(self, *arguments: Any, **options: Any) -> Any:
        # A process of its own, and no call of a test's.
        own = not arguments and options.get("args") is None
        try:
            with ended(), terminable():
                if own:
                    startup.done()
                return super().main(*arguments, **options)
        except SystemExit:
            # Of an interrupt that struck inside of `exec`, Python remembers that nobody handled it,
            # and ends by the signal all the same; one that comes now is too late to change a thing.
            if own and hasattr(signal, "pthread_sigmask"):
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            raise


def _remember(context: click.Context, _option: click.Parameter, given: bool) -> None:
    context.meta[_DEBUG] = given or context.meta.get(_DEBUG, False)


class Command(_Ended):
    """A command that ends as this module says."""


class Group(_Ended, click.Group):
    """A group of such commands."""

    command_class = Command
