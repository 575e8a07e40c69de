"""``python -m plugins.kernels.build``: every kernel compiled for every GPU, into one library.

Needs Triton and g++, neither a GPU nor a CUDA toolkit. What was compiled before is taken from a
cache by content, so a second build takes seconds.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click

from plugins.errors import IngotError
from plugins.kernels.host import Compiled, argument_letters, link
from plugins.kernels.table import COMPUTE_CAPABILITIES, Form
from plugins.library import PATH

FOLDER = Path(__file__).resolve().parents[2] / "build" / "kernels"


class BuildError(IngotError):
    """The kernels cannot be compiled here, or one of them is not fit to ship."""


@dataclass(frozen=True)
class Resources:
    """What one block of a compiled kernel takes.

    Attributes:
        registers: of a thread.
        spills: bytes a thread keeps in local memory for want of registers.
        shared_bytes: shared memory.
    """

    registers: int
    spills: int
    shared_bytes: int


def all_forms() -> dict[str, Form]:
    """Every form by name.

    Raises:
        BuildError: Triton is not installed.
    """
    try:
        from plugins.kernels import mamba2, moe
    except ImportError as error:
        raise BuildError(
            f"{error.name} is missing; install the extra that builds the GPU kernels with: "
            "pip install 'ingot[kernels]'"
        ) from error
    forms = [*moe.forms(), *mamba2.forms()]
    result = {form.name: form for form in forms}
    assert len(result) == len(forms), "two forms have one name"
    return result


def compile_form(form: Form, capability: int, folder: Path) -> tuple[Compiled, Resources]:
    """Compile one form for one compute capability, to a cubin in ``folder``.

    Raises:
        BuildError: Triton refuses it.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(form.signature)
    aligned = [
        (position,)
        for position, name in enumerate(form.function.arg_names)
        if form.signature.get(name, "").startswith("*") or name in form.multiples_of_16
    ]
    source = ASTSource(
        fn=form.function,
        signature={**form.signature, **dict.fromkeys(form.constants, "constexpr")},
        constexprs=dict(form.constants),
        attrs={position: [["tt.divisibility", 16]] for position in aligned},
    )
    assert form.function.arg_names[: len(names)] == names, f"{form.name}: constants come last"
    options = {
        "num_warps": form.num_warps,
        "num_stages": form.num_stages,
        # Its default changes between versions of Triton.
        "enable_fp_fusion": True,
    }
    try:
        made: Any = triton.compile(source, GPUTarget("cuda", capability, 32), options)
    except Exception as error:
        raise BuildError(
            f"Triton cannot compile {form.name} for sm_{capability}: {error}"
        ) from error
    metadata = made.metadata
    assert not metadata.global_scratch_size and not metadata.profile_scratch_size, form.name
    image = folder / f"{form.name}.sm_{capability}.cubin"
    image.write_bytes(made.asm["cubin"])
    letters = argument_letters(form.signature.values())
    compiled = Compiled(
        form.name,
        metadata.name,
        capability,
        32 * metadata.num_warps,
        metadata.shared,
        letters,
        image,
    )
    return compiled, _resources(image, metadata.shared)


def _resources(image: Path, shared_bytes: int) -> Resources:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run(
        [tool, "--dump-resource-usage", image], capture_output=True, text=True, check=True
    )
    registers, stack, local = (
        int(re.search(rf"\b{name}:(\d+)", done.stdout)[1])  # type: ignore[index]
        for name in ("REG", "STACK", "LOCAL")
    )
    return Resources(registers, stack + local, shared_bytes)


def compile_all(
    forms: Iterable[Form], capabilities: Iterable[int], folder: Path
) -> Iterator[tuple[Compiled, Resources]]:
    """Compile on all processors, yielding each kernel as it is done.

    Raises:
        BuildError: Triton refuses one, or runs as an interpreter.
    """
    # Triton's own cache, by content of the source, its constants, options and version.
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "cache"))
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise BuildError("TRITON_INTERPRET is set, which replaces the compiler; unset it.")
    folder.mkdir(parents=True, exist_ok=True)
    wanted = set(capabilities)
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("fork")) as pool:
        jobs = [
            pool.submit(_compile_named, form.name, capability, folder)
            for form in forms
            for capability in form.capabilities
            if capability in wanted
        ]
        try:
            for job in as_completed(jobs):
                yield job.result()
        finally:
            for job in jobs:
                job.cancel()


def _compile_named(name: str, capability: int, folder: Path) -> tuple[Compiled, Resources]:
    # A function of Triton cannot be sent to another process; its name can.
    return compile_form(all_forms()[name], capability, folder)


def build(
    out: Path = PATH,
    capabilities: Iterable[int] = COMPUTE_CAPABILITIES,
    folder: Path = FOLDER,
) -> list[tuple[Compiled, Resources]]:
    """Compile every form and link the library.

    Returns:
        What was linked, in the order of the forms.

    Raises:
        BuildError: a missing tool, a refused kernel, or a hot kernel that spills registers.
    """
    from rich.progress import Progress

    forms = all_forms()
    wanted = tuple(capabilities)
    done: list[tuple[Compiled, Resources]] = []
    with Progress(transient=True) as progress:
        total = sum(len(set(form.capabilities) & set(wanted)) for form in forms.values())
        bar = progress.add_task("compile kernels", total=total)
        for each in compile_all(forms.values(), wanted, folder):
            done.append(each)
            progress.advance(bar)
    spilled = [
        f"{compiled.name} for sm_{compiled.capability} ({resources.spills} bytes)"
        for compiled, resources in done
        if resources.spills and forms[compiled.name].hot
    ]
    if spilled:
        raise BuildError(f"registers are spilled in {', '.join(spilled)}; make the tiles smaller.")
    order = list(forms)
    done.sort(key=lambda each: (order.index(each[0].name), each[0].capability))
    link([compiled for compiled, _ in done], out, folder)
    return done


def report(done: list[tuple[Compiled, Resources]]) -> str:
    """Registers, spills and shared memory of each form, the most over its capabilities."""
    by_name: dict[str, list[Resources]] = {}
    for compiled, resources in done:
        by_name.setdefault(compiled.name, []).append(resources)
    width = max(map(len, by_name))
    lines = [f"{'kernel':{width}}  registers  spilled bytes  shared bytes"]
    for name, each in by_name.items():
        registers = max(r.registers for r in each)
        spills = max(r.spills for r in each)
        shared = max(r.shared_bytes for r in each)
        lines.append(f"{name:{width}}  {registers:9}  {spills:13}  {shared:12}")
    return "\n".join(lines)


@click.command()
@click.option(
    "--sm",
    "capabilities",
    type=click.Choice([str(c) for c in COMPUTE_CAPABILITIES]),
    multiple=True,
    help="Compute capability to compile for, such as 90; may be repeated. Default: all.",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default=PATH,
    show_default=True,
    help="The library to write.",
)
def main(capabilities: tuple[str, ...], out: Path) -> None:
    """Compile the GPU kernels and link them into one library."""
    try:
        done = build(out, [int(c) for c in capabilities] or COMPUTE_CAPABILITIES)
    except IngotError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    click.echo(report(done))
    click.echo(f"{out}: {len(done)} kernels, {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(prog_name="python -m plugins.kernels.build")
