"""Files and folders appear whole or not at all, whatever strikes and whoever else makes them."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import inspect
import linecache
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import pytest

from ingot.plugins import whole
from ingot.plugins.whole import (
    LOCK,
    NEW,
    OLD,
    STALE,
    TakenError,
    WriteError,
    check_destination,
    check_file,
    remove_abandoned,
    sha256,
    staged,
    staged_file,
    write_whole,
)

LONGEST_WAIT = 120.0
MARK = "mark.json"


def make(out: Path, text: str, *, replace: bool = True) -> None:
    with staged(out, replace=replace) as folder:
        (folder / "a").write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_hashes_a_file_of_several_pieces(tmp_path: Path) -> None:
    content = os.urandom(9_000_001)
    (tmp_path / "file").write_bytes(content)
    told: list[int] = []
    assert sha256(tmp_path / "file", told.append) == hashlib.sha256(content).hexdigest()
    assert sum(told) == len(content) and len(told) == 3


def test_moves_a_finished_folder_into_place(tmp_path: Path) -> None:
    out = tmp_path / "new" / "parents" / "out"
    with staged(out, replace=False) as folder:
        (folder / "a").write_text("1")
        assert not out.exists()
        # The same file system, or the rename would not be atomic.
        assert out.parent in folder.parents
    # Nothing of the workplace, and above all no lock, is in what it made.
    assert names(out) == ["a"]
    assert (out / "a").read_text() == "1"
    assert names(out.parent) == ["out"]


def test_gives_a_folder_the_rights_that_any_new_one_has(tmp_path: Path) -> None:
    make(tmp_path / "out", "1")
    (tmp_path / "any").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "any").stat().st_mode


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_leaves_nothing_after_an_exception(tmp_path: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with staged(tmp_path / "out", replace=True) as folder:
            (folder / "a").write_text("1")
            raise error

    with pytest.raises(error):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_replaces_the_folder_that_was_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for text in ("old", "new"):
        with staged(out, replace=True) as folder:
            (folder / text).write_text(text)
    assert names(out) == ["new"]
    assert list(tmp_path.iterdir()) == [out]


def test_keeps_the_folder_that_was_there_after_an_exception(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out, "old")

    def fail() -> None:
        with staged(out, replace=True) as folder:
            (folder / "a").write_text("new")
            raise ValueError("halfway")

    with pytest.raises(ValueError, match="halfway"):
        fail()
    assert (out / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]


def test_keeps_the_folder_that_was_there_where_the_last_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    make(out, "old")
    rename, made = Path.rename, 0

    def fails(path: Path, target: Path) -> Path:
        nonlocal made
        if path.name == NEW:
            made += 1
            # The first is refused since something is there; by the second it has made room.
            raise OSError(errno.ENOTEMPTY if made == 1 else errno.EIO, "no")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="no"):
        make(out, "new")
    assert made == 2
    assert (out / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]


def test_replaces_a_link_and_not_what_it_points_to(tmp_path: Path) -> None:
    real, out = tmp_path / "real", tmp_path / "out"
    real.mkdir()
    (real / "a").write_text("old")
    for target in (real, tmp_path / "nothing"):
        out.unlink(missing_ok=True)
        out.symlink_to(target)
        make(out, "new")
        assert (out / "a").read_text() == "new"
        assert (real / "a").read_text() == "old"
        assert sorted(tmp_path.iterdir()) == [out, real]
        shutil.rmtree(out)


def test_leaves_alone_what_came_meanwhile_and_may_not_be_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def late() -> None:
        with staged(out, replace=False) as folder:
            (folder / "a").write_text("second")
            make(out, "first", replace=False)

    with pytest.raises(TakenError, match=r"out was made by another process meanwhile; give --over"):
        late()
    assert (out / "a").read_text() == "first"
    assert list(tmp_path.iterdir()) == [out]


def test_replaces_what_another_process_puts_there_between_the_two_renames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    make(out, "first")
    rename, others = Path.rename, ["second", "third"]

    def slow(path: Path, target: Path) -> Path:
        result = rename(path, target)
        if path == out and others:
            text = others.pop()
            out.mkdir()
            (out / "a").write_text(text)
        return result

    monkeypatch.setattr(Path, "rename", slow)
    make(out, "last")
    assert others == []
    assert (out / "a").read_text() == "last"
    assert list(tmp_path.iterdir()) == [out]


def _interrupted(out: Path, text: str, strike: int) -> tuple[str, str] | None:
    """Stage one file and be interrupted before the ``strike``-th line that ``whole.py`` runs.

    Returns:
        The function and the line's text, or None where it runs fewer lines.
    """
    seen: list[tuple[str, int]] = []

    # A signal's handler runs between two instructions; a trace function can raise there too.
    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        if frame.f_code.co_filename != whole.__file__:
            return None
        if event == "line":
            seen.append((frame.f_code.co_name, frame.f_lineno))
            if len(seen) == strike:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        make(out, text)
    except KeyboardInterrupt:
        function, line = seen[-1]
        return function, linecache.getline(whole.__file__, line).strip()
    finally:
        sys.settrace(before)
    return None


@pytest.mark.parametrize("before", [None, "old"])
def test_is_whole_or_as_it_was_wherever_a_signal_strikes(
    tmp_path: Path, before: str | None
) -> None:
    struck: list[str] = []
    while True:
        out = tmp_path / str(len(struck)) / "out"
        if before is not None:
            make(out, before)
        found = _interrupted(out, "new", len(struck) + 1)
        if found is None:
            break
        function, line = found
        struck.append(line)
        now = (out / "a").read_text() if out.exists() else None
        assert now in ("new", before), line
        # Only what strikes the cleaning itself can leave something; the next one removes it.
        source = inspect.getsource(whole._work_in)
        cleaning = function in ("_clear", "_remove", "_moved") or (
            function == "_work_in" and "finally:" in source.partition(line)[0]
        )
        siblings = set(names(out.parent)) if out.parent.exists() else set()
        assert cleaning or siblings <= {"out"}, line
        make(out, "next")
        assert (out / "a").read_text() == "next"
        assert list(out.parent.iterdir()) == [out], line
    for expected in ("work.mkdir()", "unnamed.rename(work / LOCK)", "source.rename(out)"):
        assert expected in struck
    assert ("out.rename(old)" in struck) == (before is not None)


# --- what a killed process leaves


def _interruptible() -> None:
    """A shell starts background jobs with SIGINT ignored, and their children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


# One line on standard output at each moment; the process then waits until it is killed or told on.
# Its id is 1, as that of every container's first process.
STEPS = """
import os, signal, sys
from pathlib import Path
from ingot.plugins import command_line
from ingot.plugins.errors import IngotError
from ingot.plugins.whole import staged

os.getpid = lambda: 1

def pause(name):
    print(name, flush=True)
    sys.stdin.readline()

signal.signal(signal.SIGTERM, command_line._on_terminate)
try:
    with staged(Path(sys.argv[1]), replace=sys.argv[2] == "replace") as folder:
        pause("begun")
        with (folder / "weights").open("wb") as file:
            file.write(sys.argv[3].encode() * 100000)
            file.flush()
            pause("half")
            file.write(sys.argv[3].upper().encode() * 100000)
        pause("whole")
    pause("placed")
except IngotError as error:
    sys.exit(str(error))
"""


class Process:
    """``STEPS`` in a process of its own."""

    def __init__(self, out: Path, letter: str, *, replace: bool = True) -> None:
        arguments = [str(out), "replace" if replace else "keep", letter]
        self.weights = letter.encode() * 100000 + letter.upper().encode() * 100000
        self._process = subprocess.Popen(
            preexec_fn=_interruptible,
            args=[sys.executable, "-c", STEPS, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def to(self, moment: str) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        while (line := self._process.stdout.readline().strip()) != moment:
            assert line, self._process.communicate()[1]
            self._process.stdin.write("on\n")
            self._process.stdin.flush()

    def kill(self, killer: signal.Signals) -> None:
        self._process.send_signal(killer)
        self._process.communicate(timeout=LONGEST_WAIT)
        assert self._process.returncode != 0

    def end(self) -> tuple[int, str]:
        """Let it run on; its status and what it says on standard error."""
        _, errors = self._process.communicate("on\n" * 4, timeout=LONGEST_WAIT)
        return self._process.returncode, errors


@pytest.mark.parametrize("moment", ["begun", "half", "whole", "placed"])
@pytest.mark.parametrize("killer", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("before", [None, b"old"])
def test_is_whole_or_as_it_was_when_killed(
    tmp_path: Path, moment: str, killer: signal.Signals, before: bytes | None
) -> None:
    out = tmp_path / "out"
    if before is not None:
        out.mkdir()
        (out / "weights").write_bytes(before)
    process = Process(out, "x")
    process.to(moment)
    process.kill(killer)

    expected = process.weights if moment == "placed" else before
    if expected is None:
        assert not out.exists()
    else:
        assert (out / "weights").read_bytes() == expected
    partial = [path for path in tmp_path.iterdir() if path != out]
    assert len(partial) == (killer == signal.SIGKILL and moment != "placed")

    make(out, "next")
    assert (out / "a").read_text() == "next"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("replace", [True, False])
def test_two_processes_with_equal_ids_never_take_each_other_for_abandoned(
    tmp_path: Path, replace: bool
) -> None:
    out = tmp_path / "out"
    first, second = (Process(out, letter, replace=replace) for letter in "xy")
    first.to("half")
    second.to("whole")
    assert second.end()[0] == 0
    assert (out / "weights").read_bytes() == second.weights
    status, errors = first.end()
    if replace:
        assert (status, errors) == (0, "")
        assert (out / "weights").read_bytes() == first.weights
    else:
        assert status == 1 and errors.startswith(f"{out} was made by another process meanwhile")
        assert (out / "weights").read_bytes() == second.weights
    assert names(out) == ["weights"]
    assert list(tmp_path.iterdir()) == [out]


def test_many_processes_that_make_one_folder_leave_one_of_theirs(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from ingot.plugins.whole import staged
for number in range(40):
    with staged(Path(sys.argv[1]), replace=True) as folder:
        for name in "abc":
            (folder / name).write_text(f"{sys.argv[2]} {number}")
"""
    out = tmp_path / "out"
    processes = [
        subprocess.Popen([sys.executable, "-c", code, out, name], stderr=subprocess.PIPE, text=True)
        for name in "xyz"
    ]
    for process in processes:
        assert process.communicate(timeout=LONGEST_WAIT)[1] == ""
        assert process.returncode == 0
    found = {(out / name).read_text() for name in names(out)}
    assert names(out) == ["a", "b", "c"] and len(found) == 1
    assert found.pop().endswith(" 39")
    assert list(tmp_path.iterdir()) == [out]


def _left_behind(work: Path, *, old: str | None = None, locked: bool = True) -> None:
    """What a process leaves that is killed while it makes a folder."""
    (work / NEW).mkdir(parents=True)
    (work / NEW / "a").write_text("half")
    if locked:
        (work / LOCK).touch()
    if old is not None:
        (work / OLD).mkdir()
        (work / OLD / "a").write_text(old)


def _aged(work: Path, seconds: float) -> None:
    then = time.time() - seconds
    for path in (*work.rglob("*"), work):
        os.utime(path, (then, then))


def test_removes_what_was_abandoned_and_nothing_else(tmp_path: Path) -> None:
    kept = [".out2.partial-12ab", "out.partial-12ab", ".out.partial-12ab.txt", ".outXpartial-12ab"]
    for name in [".out.partial-12ab", ".out.partial-12cd", *kept]:
        _left_behind(tmp_path / name)
    with (tmp_path / ".out.partial-12ef").open("w"), staged(tmp_path / "out", replace=True):
        assert set(kept) < set(names(tmp_path))
        assert not (tmp_path / ".out.partial-12ab").exists()
    assert names(tmp_path) == sorted([*kept, ".out.partial-12ef", "out"])


def test_keeps_what_another_process_holds(tmp_path: Path) -> None:
    work = tmp_path / ".out.partial-12ab"
    _left_behind(work, old="old")
    _aged(work, 10 * STALE)
    with (work / LOCK).open("r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        make(tmp_path / "out", "1")
        assert names(work) == sorted([NEW, OLD, LOCK])
    make(tmp_path / "out", "2")
    assert names(tmp_path) == ["out"]


def test_brings_back_what_was_there_after_a_kill_between_the_two_renames(tmp_path: Path) -> None:
    out = tmp_path / "out"
    _left_behind(tmp_path / ".out.partial-12ab", old="old")

    def fail() -> None:
        with staged(out, replace=True):
            raise ValueError("halfway")

    with pytest.raises(ValueError, match="halfway"):
        fail()
    assert (out / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("abandoned", [False, True])
def test_a_lock_is_given_back_before_its_folder_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abandoned: bool
) -> None:
    """NFS keeps a file that is open, and so its folder."""
    if abandoned:
        _left_behind(tmp_path / ".out.partial-12ab")
    free: list[Path] = []
    rmtree = shutil.rmtree

    def watched(path: Path, **options: Any) -> None:
        if (path / LOCK).exists():
            with (path / LOCK).open("r+b") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free.append(path)
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", watched)
    make(tmp_path / "out", "1")
    assert len(free) == 1 + abandoned
    assert names(tmp_path) == ["out"]


# --- file systems without locks


@pytest.fixture(params=[errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(_file: object, _operation: int) -> NoReturn:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuses)


@pytest.mark.usefixtures("no_locks")
def test_without_locks_only_a_day_without_a_write_is_abandoned(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with staged(out, replace=True) as folder:
        (folder / "a").write_text("first")
        work = folder.parent
        make(out, "second")
        assert folder.is_dir() and not (work / LOCK).exists()
        # Another process wrote for hours, and its newest file is what counts.
        _aged(work, 2 * STALE)
        (folder / "b").touch()
        make(out, "third")
        assert folder.is_dir()
    assert names(out) == ["a", "b"]
    _left_behind(work, old="old", locked=False)
    _aged(work, STALE - 60)
    make(out, "fourth")
    assert names(tmp_path) == [work.name, "out"]
    _aged(work, STALE + 60)
    make(out, "fifth")
    assert names(tmp_path) == ["out"]
    assert (out / "a").read_text() == "fifth"


def test_what_is_removed_while_it_is_made_never_appears(tmp_path: Path) -> None:
    """As by another machine that does not see the lock: half a folder would look whole."""
    out = tmp_path / "out"

    def removed(write_on: bool) -> None:
        with staged(out, replace=True) as folder:
            (folder / "a").write_text("1")
            (folder.parent / LOCK).unlink()
            _aged(folder.parent, 2 * STALE)
            remove_abandoned(tmp_path, "out")
            if write_on:
                (folder / "b").write_text("2")

    for write_on in (False, True):
        with pytest.raises(WriteError, match=r"was removed while \S+out was made in it") as caught:
            removed(write_on)
        assert "\n" not in str(caught.value)
        assert list(tmp_path.iterdir()) == []


def test_an_abandoned_folder_leaves_its_place_before_it_is_emptied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process may be alive after all, and would else put what is left of it in place."""
    work = tmp_path / ".out.partial-12ab"
    _left_behind(work)
    before: list[bool] = []
    rmtree = shutil.rmtree

    def watched(path: Path, **options: Any) -> None:
        before.append(work.exists())
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", watched)
    remove_abandoned(tmp_path, "out")
    assert before and not any(before)


# --- files


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    for text in ("one", "two"):
        with staged_file(path) as part:
            part.write_text(text)
            assert not path.exists() or path.read_text() == "one"
            # Beside it lies what a library puts there while it writes.
            part.with_name("beside").touch()
        assert path.read_text() == text
        assert names(path.parent) == ["file"]


def test_a_write_that_breaks_off_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")

    def breaks(_self: Path, _target: Path) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", breaks)
        with pytest.raises(WriteError, match=r"^cannot write \S*report.json: No space left"):
            write_whole(path, "new")
    assert names(tmp_path) == ["report.json"]
    assert path.read_text() == "old"
    write_whole(path, "née\n")
    assert path.read_bytes() == "née\n".encode()


def test_a_folder_that_is_a_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "a", tmp_path / "file" / "b" / "a"):
        with pytest.raises(WriteError, match=r"^cannot write [^\n]*\.$"):
            write_whole(path, "new")


def test_two_processes_write_one_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with staged_file(path) as first:
        first.write_text("first")
        write_whole(path, "second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert names(tmp_path) == ["file"]


# --- before any work


def check(out: Path, *read: Path, overwrite: bool = True) -> None:
    check_destination(out, overwrite=overwrite, mark=MARK, foreign="is none of ours", read=read)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder that is read, and could be replaced."""
    (tmp_path / "Source" / "part").mkdir(parents=True)
    (tmp_path / "Source" / MARK).touch()
    (tmp_path / "Source" / "weights").write_text("years")
    (tmp_path / "link").symlink_to("Source")
    return tmp_path / "Source"


@pytest.mark.parametrize(
    "out",
    [
        "Source",
        "Source/",
        "Source/out",
        "Source/not/there/yet",
        "Source/part/..",
        "link",
        "link/out",
        "link/../Source/out",
        "elsewhere/../Source/out",
        ".",
        "../{parent}",
    ],
)
def test_refuses_what_holds_or_lies_in_what_is_read(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    (tmp_path / MARK).touch()
    monkeypatch.chdir(tmp_path)
    place = out.format(parent=tmp_path.name)
    for destination in (Path(place), tmp_path / place):
        for read in (source, Path("Source"), Path("link")):
            with pytest.raises(WriteError, match="lie in one another"):
                check(destination, read)
    assert (source / "weights").read_text() == "years"


def test_refuses_what_holds_the_files_that_links_lead_to(source: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "weights").symlink_to("../Source/weights")
    with pytest.raises(WriteError, match="lie in one another"):
        check(source, linked)
    check(tmp_path / "out", linked)


def test_takes_what_lies_apart_from_what_is_read(source: Path, tmp_path: Path) -> None:
    for out in ("out", "Source2", "Sour", "new/out", "link2"):
        check(tmp_path / out, source)
    # A name that is no folder's, as of a family, may be the destination's own.
    check(tmp_path / "olmoe", Path("olmoe"), tmp_path / "olmoe")
    assert names(tmp_path) == ["Source", "link"]


UNMAKEABLE: dict[str, tuple[str, str]] = {
    "the root": ("/", "left alone"),
    "a file": ("Source/weights", "exists and is none of ours"),
    "below a file": ("Source/weights/out", "is a file; give another --out"),
    "a dangling link": ("dangling", "is a link to 'nowhere', which is not there"),
    "a circle of links": ("circle", "is a link to 'circle', which is not there"),
    "a long name": ("x" * 256, "cannot be made: File name too long"),
    "a long path": ("x/" * 4096, "cannot be made: File name too long"),
    "no name": ("a\0b", "is no path: "),
}


@pytest.mark.parametrize("kind", UNMAKEABLE)
def test_refuses_what_cannot_be_made(source: Path, tmp_path: Path, kind: str) -> None:
    place, said = UNMAKEABLE[kind]
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "circle").symlink_to("circle")
    before = names(tmp_path)
    for out in (Path("/"),) if place == "/" else (tmp_path / place,):
        with pytest.raises(WriteError, match=said) as caught:
            check(out)
        assert "\n" not in str(caught.value)
    assert names(tmp_path) == before


def test_refuses_what_may_not_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # For root every folder may be; a disk that is read-only has the same answer.
    monkeypatch.setattr(os, "access", lambda *_arguments: False)
    with pytest.raises(WriteError, match=f"{tmp_path} cannot be written to"):
        check(tmp_path / "new" / "out")
    with pytest.raises(WriteError, match=f"{tmp_path} cannot be written to"):
        check_file(tmp_path / "new" / "report.json")


def test_refuses_a_file_that_cannot_be_written(source: Path, tmp_path: Path) -> None:
    check_file(tmp_path / "new" / "report.json")
    check_file(source / "weights")
    for path, said in (
        (source, "it is a folder"),
        (source / "weights" / "report.json", "weights is a file"),
        (tmp_path / ("x" * 256), "File name too long"),
    ):
        with pytest.raises(WriteError, match=rf"^cannot write [^\n]*{said}\.$"):
            check_file(path)


def test_puts_back_what_a_kill_took_before_it_looks(tmp_path: Path) -> None:
    out = tmp_path / "out"
    _left_behind(tmp_path / ".out.partial-12ab", old="old")
    with pytest.raises(WriteError, match="out exists; give --overwrite"):
        check(out, overwrite=False)
    assert (out / "a").read_text() == "old"
    assert names(tmp_path) == ["out"]


REFUSALS: dict[str, tuple[type[Exception], tuple[Any, ...]]] = {
    "full": (OSError, (errno.ENOSPC, "No space left on device")),
    "over a quota": (OSError, (errno.EDQUOT, "Disk quota exceeded")),
    "too large": (OSError, (errno.EFBIG, "File too large")),
    "in Rust": (RuntimeError, ("I/O error: No space left on device (os error 28)",)),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_says_where_the_system_refused_to_write(tmp_path: Path, kind: str) -> None:
    refusal, arguments = REFUSALS[kind]
    out = tmp_path / "new" / "out"
    said = rf"^cannot write {out}: [A-Z][a-z ]+; make room, or give another place\.$"
    with pytest.raises(WriteError, match=said), staged(out, replace=False):
        raise refusal(*arguments)
    # Not even the folder that was made for it is left.
    assert names(tmp_path) == []


def test_leaves_what_could_not_be_read_to_who_read_it(tmp_path: Path) -> None:
    for error in (
        PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "weights")),
        ConnectionError("reset"),
    ):
        with pytest.raises(type(error)), staged(tmp_path / "out", replace=False):
            raise error


@pytest.mark.parametrize("file", [False, True], ids=["folder", "file"])
def test_a_place_without_room_for_anything_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: bool
) -> None:
    # As on a disk that is read-only, and in /proc.
    for number, said in ((errno.EROFS, "Read-only"), (errno.ENOENT, "No such file")):

        def refuse(path: Path, *_arguments: object, number: int = number, **_: object) -> NoReturn:
            raise OSError(number, os.strerror(number), str(path))

        monkeypatch.setattr(Path, "mkdir", refuse)
        work = staged_file(tmp_path / "out") if file else staged(tmp_path / "out", replace=True)
        with pytest.raises(WriteError, match=f"out: {said}"), work:
            pass
