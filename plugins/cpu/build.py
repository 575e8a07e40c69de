"""``python -m ingot.plugins.cpu.build``: the kernels for CPUs.

``libingot_cpu.so`` has a plain C interface; ``libingot_ort.so`` has the same kernels as custom
operators of ONNX Runtime. Highway (portable SIMD with dispatch at run time) and ONNX Runtime's
headers come from Debian's packages, which ``fetch_debian.sh`` unpacks into ``.tools``. A file is
compiled once for all that it includes; what was made of it is kept in ``build/cpu``.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click

from ingot.plugins.command_line import Command
from ingot.plugins.errors import IngotError
from ingot.plugins.whole import staged_file

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SOURCES = HERE / "src"
OPERATORS = HERE / "ort"
CHECK = HERE / "check"
LIB = HERE.parent / "lib"
# Each library, and the folders of what it is made of.
LIBRARIES = {"libingot_cpu.so": (SOURCES,), "libingot_ort.so": (SOURCES, OPERATORS)}
# The program that runs every kernel on every instruction set.
PROGRAM = "ingot_cpu_check"
OBJECTS = ROOT / "build" / "cpu"

HIGHWAY = ROOT / ".tools" / "highway"
ONNXRUNTIME = ROOT / ".tools" / "onnxruntime"
# What dispatch at run time needs of it; the rest is headers.
HIGHWAY_FILES = ("targets.cc", "abort.cc", "per_target.cc")
# Of Highway's instruction sets those that make a difference: VNNI is in AVX3_DL, and products of
# bfloat16, which AVX3_ZEN4 and AVX3_SPR add, would round activations.
TARGETS = (
    "-DHWY_WANT_AVX3_DL=1",
    "-DHWY_DISABLED_TARGETS=(HWY_SSSE3|HWY_SSE4|HWY_AVX3_ZEN4|HWY_AVX3_SPR|HWY_ALL_SVE)",
)
FLAGS = ("-std=c++17", "-O3", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-math-errno")
WARNINGS = ("-Wall", "-Wextra", "-Werror")


def find_highway() -> Path:
    """The folder of Highway's sources, fetched where it is not there.

    Raises:
        IngotError: it cannot be fetched.
    """
    return _fetched(HIGHWAY, "source", "highway", "highway-*/hwy/highway.h").parents[1]


def find_onnxruntime() -> Path:
    """The folder of ONNX Runtime's headers, fetched where it is not there.

    Raises:
        IngotError: it cannot be fetched.
    """
    pattern = "usr/include/onnxruntime/onnxruntime_cxx_api.h"
    return _fetched(ONNXRUNTIME, "binary", "libonnxruntime-dev", pattern).parent


def _fetched(folder: Path, kind: str, package: str, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if not found:
        fetch: list[str | Path] = [HERE / "fetch_debian.sh", folder, kind, package]
        done = subprocess.run(fetch, capture_output=True, text=True, check=False)
        found = sorted(folder.glob(pattern))
        if done.returncode or not found:
            raise IngotError(
                f"Debian's {package} could not be fetched: {done.stderr.strip()}; unpack it as "
                f"{folder / pattern}."
            )
    return found[-1]


def build(folder: Path = LIB, *, compiler: str = "g++", extra: Sequence[str] = ()) -> None:
    """Write the shared libraries; each appears whole or not at all.

    Args:
        folder: takes them.
        compiler: GCC's or Clang's C++ compiler.
        extra: flags for compiling and linking.

    Raises:
        IngotError: no compiler, no headers, or a file that does not compile.
    """
    objects = _compiled(compiler, extra, (SOURCES, OPERATORS))
    for name, folders in LIBRARIES.items():
        made = _of(objects, folders)
        _link(folder / name, [compiler, "-shared", *extra, *made, "-Wl,--no-undefined"])


def build_check(out: Path, *, compiler: str = "g++", extra: Sequence[str] = ()) -> None:
    """Write the program of ``check/``, which needs no other file; see ``build``."""
    folders = (SOURCES, CHECK)
    made = _of(_compiled(compiler, extra, folders), folders)
    _link(out, [compiler, *extra, *made])


def _compiled(compiler: str, extra: Sequence[str], folders: Sequence[Path]) -> dict[Path, Path]:
    """What was made of each file of ours in these folders, and of Highway's."""
    if shutil.which(compiler) is None:
        raise IngotError(f"{compiler} is missing; install it (Debian: apt-get install g++).")
    highway = find_highway()
    flags = (*FLAGS, *TARGETS, *extra, f"-isystem{highway}", f"-I{SOURCES}")
    files: dict[Path, Sequence[str]] = {highway / "hwy" / name: flags for name in HIGHWAY_FILES}
    for folder in folders:
        headers = (f"-isystem{find_onnxruntime()}",) if folder == OPERATORS else ()
        ours = sorted(folder.glob("*.cpp"))
        files |= dict.fromkeys(ours, (*flags, *WARNINGS, *headers))
    OBJECTS.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        made = pool.map(lambda each: _object(compiler, *each), files.items())
        return dict(zip(files, made, strict=True))


def _of(objects: Mapping[Path, Path], folders: Sequence[Path]) -> list[Path]:
    theirs = find_highway() / "hwy"
    return [made for path, made in objects.items() if path.parent in (*folders, theirs)]


def _link(out: Path, command: Sequence[str | Path]) -> None:
    with staged_file(out) as part:
        _run([*command, "-pthread", "-o", part])


def _object(compiler: str, source: Path, flags: Sequence[str]) -> Path:
    """A compiled file, kept by all that went into it."""
    whole = _run([compiler, *flags, "-E", source])
    key = hashlib.sha256(whole.encode() + "\0".join([compiler, *flags]).encode()).hexdigest()
    path = OBJECTS / f"{source.stem}-{key[:24]}.o"
    if not path.is_file():
        with staged_file(path) as part:
            _run([compiler, *flags, "-c", source, "-o", part])
    return path


def _run(command: Sequence[str | Path]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise IngotError(f"{command[0]} failed:\n{done.stderr}")
    return done.stdout


@click.command(cls=Command)
@click.option("--out", type=click.Path(path_type=Path), default=LIB, help="The libraries' folder.")
@click.option("--check", is_flag=True, help=f"Build the program {PROGRAM} in their place.")
@click.option("--compiler", default="g++", help="A cross compiler, for another processor.")
@click.option("--flag", "flags", multiple=True, help="One more flag, such as -fsanitize=thread.")
def main(out: Path, check: bool, compiler: str, flags: tuple[str, ...]) -> None:
    """Compile the kernels for CPUs."""
    if check:
        build_check(out / PROGRAM, compiler=compiler, extra=flags)
    else:
        build(out, compiler=compiler, extra=flags)
    for name in [PROGRAM] if check else LIBRARIES:
        click.echo(f"{out / name}: {(out / name).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
