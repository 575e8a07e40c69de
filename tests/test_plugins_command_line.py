"""Exit statuses: each kind of ending through click's own runner, and as processes."""

from __future__ import annotations

import errno
import io
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click
import pytest
from click.testing import CliRunner, Result
from safetensors import SafetensorError

from ingot.export.cli import LazyGroup, main
from ingot.export.progress import Stages
from ingot.plugins.command_line import Command, Group, console, ended
from ingot.plugins.errors import IngotError

ROOT = Path(__file__).resolve().parent.parent
BEGINS = "error: the system refuses: "
NO_MEMORY = (
    "error: there is not enough memory for `group do`; free some, or use a machine with more.\n"
)


def _raising(error: BaseException | Callable[[], object]) -> Group:
    """A group with one command, which raises."""

    @click.group(cls=Group)
    def group() -> None:
        """Commands."""

    @group.command("do")
    @click.option("--size", type=int, default=1)
    def do(size: int) -> None:
        click.echo("begun")
        if isinstance(error, BaseException):
            raise error
        error()

    return group


def _run(error: BaseException | Callable[[], object], *words: str) -> Result:
    result = CliRunner().invoke(_raising(error), words or ("do",))
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def _file_too_large() -> NoReturn:
    raise SafetensorError("Error while serializing: I/O error: File too large (os error 27)")


class Panic(BaseException):
    """As PyO3's, of libraries that are written in Rust."""


SAID: dict[str, tuple[BaseException | Callable[[], object], str]] = {
    "a mistake": (IngotError("the seed is 3; give 2."), "error: the seed is 3; give 2.\n"),
    "full": (
        OSError(errno.ENOSPC, "No space left on device"),
        BEGINS + "No space left on device.\n",
    ),
    "read only": (
        OSError(errno.EROFS, "Read-only file system", "/disk/out"),
        BEGINS + "/disk/out: Read-only file system.\n",
    ),
    "no access": (
        PermissionError(errno.EACCES, "Permission denied", "/a"),
        BEGINS + "/a: Permission denied.\n",
    ),
    "a rename": (
        OSError(errno.EXDEV, "Invalid cross-device link", "/a", None, "/b"),
        BEGINS + "/a and /b: Invalid cross-device link.\n",
    ),
    "a long name": (
        lambda: (Path("/tmp") / ("x" * 300)).mkdir(),
        BEGINS + f"/tmp/{'x' * 300}: File name too long.\n",
    ),
    "in Rust": (_file_too_large, BEGINS + "File too large.\n"),
    "only text": (OSError("connection\nlost"), BEGINS + "connection lost.\n"),
    "memory": (
        MemoryError(),
        NO_MEMORY,
    ),
    "PyTorch's memory": (
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        NO_MEMORY,
    ),
    "no fork": (
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        NO_MEMORY,
    ),
    "a package": (
        ImportError("libtorch.so: undefined symbol: x"),
        "error: a package is missing or broken: libtorch.so: undefined symbol: x; install Ingot "
        "and its extras again.\n",
    ),
    "a fault": (
        TypeError("len() of\nunsized object"),
        "error: a fault of Ingot itself: TypeError: len() of unsized object. --debug shows where; "
        "please report it.\n",
    ),
    "a panic": (
        Panic("index out of bounds"),
        "error: a fault of Ingot itself: Panic: index out of bounds. --debug shows where; please "
        "report it.\n",
    ),
    "a silent fault": (
        AssertionError(),
        "error: a fault of Ingot itself: AssertionError. --debug shows where; please report it.\n",
    ),
}


@pytest.mark.parametrize("kind", SAID)
def test_whatever_is_raised_ends_with_two_and_one_sentence(kind: str) -> None:
    error, said = SAID[kind]
    result = _run(error)
    assert (result.exit_code, result.stdout, result.stderr) == (2, "begun\n", said)


def test_cuts_what_an_exception_repeats() -> None:
    assert len(_run(ValueError("x" * 10**6)).stderr) < 400
    said = _run(IngotError(f"{'x' * 10**6} is there; give another --out.")).stderr
    assert len(said) < 2000 and said.endswith("is there; give another --out.\n")


def test_says_at_which_step_memory_ran_out() -> None:
    def allocate() -> None:
        with Stages().stage("capture graph"), Stages().stage("load weights"):
            raise MemoryError

    said = "error: there is not enough memory at the step `load weights`; free some, or use"
    assert _run(allocate).stderr.startswith(said)


@pytest.mark.parametrize("words", [("--debug", "do"), ("do", "--debug")], ids=" ".join)
def test_shows_the_trace_of_a_fault_where_it_is_asked_for(words: tuple[str, ...]) -> None:
    result = _run(TypeError("odd"), *words)
    assert result.exit_code == 2
    assert result.stderr.startswith("Traceback (most recent call last):\n")
    assert "\nTypeError: odd\nerror: a fault of Ingot itself: TypeError: odd." in result.stderr
    # A mistake in the input is not one in the program.
    assert _run(IngotError("no."), *words).stderr == "error: no.\n"


def test_an_interrupt_has_a_status_of_its_own() -> None:
    for error in (KeyboardInterrupt(), click.Abort()):
        result = _run(error)
        assert (result.exit_code, result.stderr) == (
            130,
            "interrupted; what was begun is removed\n",
        )


def test_an_interrupt_while_a_command_is_imported_has_it_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_arguments: Any) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(LazyGroup, "get_command", interrupted)
    assert CliRunner().invoke(main, ["inspect", "x"]).exit_code == 130


def test_leaves_other_endings_as_they_are() -> None:
    assert _run(lambda: sys.exit(1)).exit_code == 1
    assert _run(lambda: click.get_current_context().exit(0)).exit_code == 0
    assert _run(lambda: None).exit_code == 0
    result = _run(lambda: None, "do", "--size", "many")
    assert result.exit_code == 2
    assert "'many' is not a valid integer" in result.stderr
    assert "'de' is not" not in _run(lambda: None, "do", "--help").stdout


def test_every_command_ends_so() -> None:
    from ingot.plugins.tensorrt.build import main as plugins
    from ingot.runtime.cli import main as runtime

    commands = {name: main.get_command(click.Context(main), name) for name in LazyGroup.commands_at}
    assert {name for name, each in commands.items() if not isinstance(each, Command)} == set()
    assert isinstance(plugins, Command) and isinstance(main, Group)
    assert all(isinstance(each, Command) for each in runtime.commands.values())


def test_a_reader_that_has_enough_is_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def write(self, _text: str) -> int:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    def print_much() -> None:
        console(file=Closed()).print("much")

    result = _run(print_much)
    assert (result.exit_code, result.stderr) == (2, "")


def test_programs_without_click_end_so() -> None:
    with pytest.raises(SystemExit) as done, ended():
        raise OSError(errno.ENOSPC, "No space left on device")
    assert done.value.code == 2


# --- processes


def _process(*words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ingot", *map(str, words)]
    options = {"stdout": subprocess.PIPE, **options}
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, **options)


def test_output_that_cannot_be_written_is_one_sentence_or_nothing(tiny_ort: Path) -> None:
    # Each is found when the output is flushed, at the latest.
    with Path("/dev/full").open("w") as full:
        done = _process("inspect", tiny_ort, stdout=full)
    assert done.returncode == 2
    assert done.stderr == BEGINS + "No space left on device.\n"
    reader, writer = os.pipe()
    os.close(reader)
    for words in (("inspect", tiny_ort), ("--help",)):
        done = _process(*words, stdout=writer)
        assert (done.returncode, done.stderr) == (2, ""), words
    os.close(writer)
    done = _process("inspect", tiny_ort, preexec_fn=lambda: os.close(1))
    assert (done.returncode, done.stderr) == (0, "")


def test_an_interrupted_process_says_so_and_leaves_nothing(tiny_ort: Path, tmp_path: Path) -> None:
    # A generation without end: it is interrupted in the middle.
    words = ["generate", tiny_ort, "--prompt-ids", "1,2", "--stop-id", "9999999"]
    command = [sys.executable, "-m", "ingot", *map(str, words), "--max-new-tokens", "100"]
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        process = subprocess.Popen(
            command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
        )
        assert process.stdout is not None
        process.stdout.read(1)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode in (status, 0), stderr
        assert b"Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []


def test_what_was_made_stays_made_where_nobody_can_be_told(tiny_ort: Path, tmp_path: Path) -> None:
    out = tmp_path / "repository"
    with Path("/dev/full").open("w") as full:
        done = _process("triton", tiny_ort, "--out", out, stdout=full)
    assert (done.returncode, (out / "triton.json").is_file()) == (0, True)
    assert done.stderr == (
        f"{out} is there, and whole; but: the system refuses: No space left on device.\n"
    )
    # Nor does a remark beside the tokens.
    command = [sys.executable, "-m", "ingot", "generate", str(tiny_ort), "--prompt-ids", "1,2"]
    with Path("/dev/full").open("w") as full:
        tokens = subprocess.run(command, stdout=subprocess.PIPE, stderr=full, check=False)
    assert tokens.returncode == 0 and len(tokens.stdout.split()) > 1


@pytest.mark.parametrize("module", ["ingot", "export", "runtime", "validate"])
def test_an_interrupt_during_imports_leaves_no_trace(module: str, tmp_path: Path) -> None:
    """By a click that never ends to import, found before the installed one."""
    slow = tmp_path / "click.py"
    slow.write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        process = subprocess.Popen(
            [sys.executable, "-m", module, "--help"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": f"{tmp_path}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            # Of a suite in the background of a script, which ignores Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        assert process.stdout is not None
        process.stdout.read(1)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
        assert (process.returncode, stderr) == (status, b"")


@pytest.mark.parametrize(
    ("signalled", "status"), [(KeyboardInterrupt(), 130), (SystemExit(143), 143)]
)
def test_a_package_that_makes_another_error_of_a_signal(
    signalled: BaseException, status: int
) -> None:
    """As modules in C++ do while they are imported."""

    def imported() -> None:
        raise ImportError("initialization failed") from signalled

    assert _run(imported).exit_code == status


def test_an_interrupt_inside_of_generated_code_has_the_same_status(tmp_path: Path) -> None:
    # As PyTorch and dataclasses make theirs.
    code = (
        "import click\n"
        "from ingot.plugins.command_line import Command\n"
        "@click.command(cls=Command)\n"
        "def main(): exec('raise KeyboardInterrupt')\n"
        "main()"
    )
    (tmp_path / "interrupted.py").write_text(code)
    command = [sys.executable, "-m", "interrupted"]
    done = subprocess.run(command, cwd=tmp_path, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (130, b"interrupted; what was begun is removed\n")


def test_little_memory_is_one_sentence(tiny: Path, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (400 << 20, 400 << 20))

    words = ("export", "--model", tiny, "--out", tmp_path / "out")
    done = _process(*words, preexec_fn=limit)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
