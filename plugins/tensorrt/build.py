"""``python -m plugins.tensorrt.build``: the C++ plugins for TensorRT, ``libingot_trt.so``.

The library holds the kernels too, so that it is all that an engine needs, also inside its file.

Needs TensorRT's C++ headers, which no package registry has, but not its libraries. Engines of
``plugins.tensorrt.python_plugins`` can be built and run without it.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import click

from ingot.plugins import library
from ingot.plugins.errors import IngotError
from ingot.plugins.kernels.build import FOLDER
from ingot.plugins.kernels.host import SOURCES, run_compiler

PATH = library.PATH.with_name("libingot_trt.so")
SOURCE = Path(__file__).resolve().parent / "plugins.cpp"

NO_TENSORRT = (
    "skipped libingot_trt.so: TensorRT's header NvInfer.h is missing; unpack NVIDIA's TensorRT "
    "archive (https://developer.nvidia.com/tensorrt) and set TENSORRT_ROOT to its folder, or "
    "install NVIDIA's package libnvinfer-headers-dev."
)
NO_CUDA = (
    "skipped libingot_trt.so: CUDA's header cuda_runtime_api.h is missing; install the CUDA "
    "toolkit and set CUDA_HOME to its folder."
)


def find_headers() -> Path | None:
    """The folder of ``NvInfer.h``; with TENSORRT_ROOT set, only that of this TensorRT."""
    root = os.environ.get("TENSORRT_ROOT")
    if root:
        return _first_with("NvInfer.h", Path(root) / "include")
    system = Path("/usr/include")
    return _first_with("NvInfer.h", system / f"{platform.machine()}-linux-gnu", system)


def find_cuda_headers(tensorrt: Path) -> Path | None:
    """The folder of ``cuda_runtime_api.h``, which TensorRT's headers include."""
    folders = [Path("/usr/local/cuda/include"), tensorrt]
    home = os.environ.get("CUDA_HOME")
    if home:
        folders.insert(0, Path(home) / "include")
    # Triton, which compiles the kernels, brings CUDA's headers along.
    triton = find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "include")
    return _first_with("cuda_runtime_api.h", *folders)


def _first_with(name: str, *folders: Path) -> Path | None:
    return next((folder for folder in folders if (folder / name).is_file()), None)


def kernels_inside() -> list[str | Path]:
    """What puts the host layer and the compiled kernels into the library.

    Raises:
        IngotError: they have not been compiled.
    """
    made = [FOLDER / "forms.cpp", FOLDER / "images.S"]
    if not all(path.is_file() for path in made):
        raise IngotError(
            "the GPU kernels are not compiled; do it first with: python -m plugins.kernels.build"
        )
    return [*sorted(SOURCES.glob("*.cpp")), *made, "-ldl"]


def build(out: Path, tensorrt: Path, cuda: Path, kernels: Sequence[str | Path]) -> None:
    """Compile and link the plugins.

    Args:
        out: the library to write.
        tensorrt: folder of ``NvInfer.h``.
        cuda: folder of ``cuda_runtime_api.h``.
        kernels: sources or linker flags that bring the functions of ``ingot_kernels.h``.

    Raises:
        IngotError: no compiler, or one that refuses.
    """
    if shutil.which("g++") is None:
        raise IngotError("g++ is missing; install it (Debian: apt-get install g++).")
    run_compiler(
        SOURCE,
        f"-I{SOURCES}",
        # Warnings are about our code alone.
        *("-isystem", tensorrt, "-isystem", cuda),
        *kernels,
        "-Wl,--no-undefined",
        out=out,
    )


@click.command()
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default=PATH,
    show_default=True,
    help="The library to write.",
)
def main(out: Path) -> None:
    """Compile the TensorRT plugins, where TensorRT's headers are."""
    tensorrt = find_headers()
    if tensorrt is None:
        click.echo(NO_TENSORRT)
        return
    cuda = find_cuda_headers(tensorrt)
    if cuda is None:
        click.echo(NO_CUDA)
        return
    try:
        build(out.resolve(), tensorrt, cuda, kernels_inside())
    except IngotError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    click.echo(f"{out}: with the headers of {tensorrt}")


if __name__ == "__main__":
    main(prog_name="python -m plugins.tensorrt.build")
