"""``python -m ingot.plugins.kernels.build``: every kernel compiled for every GPU, into one library.

Needs Triton and g++, neither a GPU nor a CUDA toolkit; and nothing else, so that a machine with
PyTorch alone can build. What was compiled before is taken from a cache by content, so that a second
build takes seconds.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ingot.plugins.command_line import ended, terminable
from ingot.plugins.errors import IngotError, install_hint
from ingot.plugins.kernels import ptxas, wgmma
from ingot.plugins.kernels.form import COMPUTE_CAPABILITIES, Form
from ingot.plugins.kernels.link import Compiled, argument_letters, link
from ingot.plugins.library import PATH, Library
from ingot.plugins.registry import OPERATORS
from ingot.plugins.whole import check_file

FOLDER = Path(__file__).resolve().parents[2] / "build" / "kernels"
TUNE_PATH = PATH.parent / "tune" / PATH.name

# Bytes a thread that a kernel may spill and still be shipped. ptxas 12.8 and 12.9 put one register
# on the stack once, outside the loop, in four forms that have registers left; that costs nothing.
FREE_SPILLS = 8


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
    """Every shipped form by name.

    Raises:
        BuildError: Triton is not installed.
    """
    return _by_name([form for file in _kernel_files() for form in file.forms()])


def tuning_forms() -> dict[str, Form]:
    """Every form by name that is compared with the shipped ones on a card, and not shipped.

    Raises:
        BuildError: Triton is not installed.
    """
    return _by_name([form for file in _kernel_files() for form in file.tuning_forms()])


def plan_constants() -> dict[str, int]:
    """What the plans in ``plugins/csrc`` know of the forms, by the names that it has there.

    Raises:
        BuildError: Triton is not installed.
    """
    return {name: value for file in _kernel_files() for name, value in file.PLAN_CONSTANTS.items()}


def _kernel_files() -> tuple[Any, ...]:
    names = dict.fromkeys(operator.kernels for operator in OPERATORS.values())
    try:
        return tuple(import_module(f"ingot.plugins.kernels.{name}") for name in names)
    except ImportError as error:
        raise BuildError(
            f"{error.name} is missing; install the extra that builds the GPU kernels with: "
            f"{install_hint('kernels')}"
        ) from error


def _by_name(forms: list[Form]) -> dict[str, Form]:
    result = {form.name: form for form in forms}
    assert len(result) == len(forms), "two forms have one name"
    return result


def compile_form(
    form: Form, capability: int, folder: Path, ptxas_choice: str = "default"
) -> tuple[Compiled, Resources]:
    """Compile one form for one compute capability, to a cubin in ``folder``.

    Args:
        form: the form.
        capability: major times ten plus minor.
        folder: takes the cubin.
        ptxas_choice: one of ``ptxas.CHOICES``.

    Raises:
        BuildError: Triton refuses it.
        IngotError: there is no ptxas.
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
    tool = ptxas.choose(ptxas_choice, capability)
    try:
        with ptxas.used(tool):
            made: Any = triton.compile(source, GPUTarget("cuda", capability, 32), options)
    except Exception as error:
        raise BuildError(
            f"Triton cannot compile {form.name} for sm_{capability}: {error}"
        ) from error
    metadata = made.metadata
    assert not metadata.global_scratch_size and not metadata.profile_scratch_size, form.name
    # Named by its ptxas too, lest a library that is linked again find one of another inside.
    image = folder / f"{form.name}.sm_{capability}.{tool.version}.cubin"
    image.write_bytes(made.asm["cubin"])
    # Disassembling takes longer than all else where the cubin comes from the cache.
    if "wgmma" in made.asm["ptx"] and wgmma.concerned(capability, tool.version):
        found = wgmma.hazards(_cuobjdump(image, "-sass"))
        if found:
            raise BuildError(
                f"ptxas {tool.version} may have spoiled {form.name} for sm_{capability}: "
                f"{found[0]}; compile with --ptxas newer."
            )
    letters = argument_letters(form.signature.values())
    compiled = Compiled(
        form.name,
        metadata.name,
        capability,
        32 * metadata.num_warps,
        metadata.shared,
        letters,
        image,
        tool.version,
    )
    return compiled, _resources(image, metadata.shared)


def _cuobjdump(image: Path, option: str) -> str:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    # It looks for nvdisasm on the path.
    path = os.pathsep.join((str(tools), os.environ.get("PATH", "")))
    done = subprocess.run(
        [tools / "cuobjdump", option, image],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PATH": path},
    )
    return done.stdout


def _resources(image: Path, shared_bytes: int) -> Resources:
    printed = _cuobjdump(image, "--dump-resource-usage")
    registers, stack, local = (
        int(re.search(rf"\b{name}:(\d+)", printed)[1])  # type: ignore[index]
        for name in ("REG", "STACK", "LOCAL")
    )
    return Resources(registers, stack + local, shared_bytes)


def compile_all(
    forms: Iterable[Form],
    capabilities: Iterable[int],
    folder: Path,
    ptxas_choice: str = "default",
    refused: dict[str, str] | None = None,
) -> Iterator[tuple[Compiled, Resources]]:
    """Compile on all processors, yielding each kernel as it is done.

    Args:
        forms: what to compile.
        capabilities: for which of the forms' own.
        folder: takes the cubins.
        ptxas_choice: one of ``ptxas.CHOICES``.
        refused: takes the name of each form that Triton refuses, and why. Without it, that is an
            error.

    Raises:
        BuildError: Triton refuses one, or runs as an interpreter.
        IngotError: there is no ptxas.
    """
    # Triton's own cache, by content of the source, its constants, options and version.
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "cache"))
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise BuildError("TRITON_INTERPRET is set, which replaces the compiler; unset it.")
    folder.mkdir(parents=True, exist_ok=True)
    wanted = set(capabilities)
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("fork")) as pool:
        jobs = {
            pool.submit(_compile_named, form.name, capability, folder, ptxas_choice): form.name
            for form in forms
            for capability in form.capabilities
            if capability in wanted
        }
        try:
            for job in as_completed(jobs):
                try:
                    yield job.result()
                except BuildError as error:
                    if refused is None:
                        raise
                    refused[jobs[job]] = str(error)
        finally:
            for job in jobs:
                job.cancel()


def _compile_named(
    name: str, capability: int, folder: Path, ptxas_choice: str
) -> tuple[Compiled, Resources]:
    # A function of Triton cannot be sent to another process; its name can.
    form = all_forms().get(name) or tuning_forms()[name]
    return compile_form(form, capability, folder, ptxas_choice)


def build(
    out: Path = PATH,
    capabilities: Iterable[int] = COMPUTE_CAPABILITIES,
    folder: Path = FOLDER,
    ptxas_choice: str = "default",
) -> list[tuple[Compiled, Resources]]:
    """Compile every shipped form and link the library.

    Returns:
        What was linked, in the order of the forms.

    Raises:
        BuildError: a refused kernel, or a hot kernel that spills registers.
        IngotError: a missing tool.
    """
    done = _compile_shipped(tuple(capabilities), folder, ptxas_choice)
    _link(done, out, folder)
    return done


def build_to_tune(
    out: Path = TUNE_PATH,
    capabilities: Iterable[int] = COMPUTE_CAPABILITIES,
    folder: Path = FOLDER,
    ptxas_choice: str = "default",
) -> tuple[list[tuple[Compiled, Resources]], dict[str, str]]:
    """Compile the shipped forms and the candidates of the tuning, and link a library of both.

    Returns:
        What was linked, in the order of the forms; and each candidate that was left out, with the
        reason: one of its forms does not compile, or spills registers.

    Raises:
        BuildError: a refused kernel, or a hot kernel that spills registers, of the shipped ones.
        IngotError: a missing tool.
    """
    wanted = tuple(capabilities)
    done = _compile_shipped(wanted, folder, ptxas_choice)
    forms = tuning_forms()
    refused: dict[str, str] = {}
    candidates = _compile_shown(forms, wanted, folder, ptxas_choice, refused)
    for compiled, resources in candidates:
        if resources.spills > FREE_SPILLS:
            refused[compiled.name] = f"{compiled.name} spills {resources.spills} bytes"
    left_out = {forms[name].candidate: reason for name, reason in refused.items()}
    done += [each for each in candidates if forms[each[0].name].candidate not in left_out]
    _link(done, out, folder)
    return done, left_out


def _link(done: list[tuple[Compiled, Resources]], out: Path, folder: Path) -> None:
    # plugins/tensorrt/build.py links what was made for PATH once more: no other library may put
    # itself in its place.
    made_in = folder if out.absolute() == PATH else folder / "aside"
    link([compiled for compiled, _ in done], plan_constants(), out, made_in)


def _compile_shipped(
    capabilities: tuple[int, ...], folder: Path, ptxas_choice: str
) -> list[tuple[Compiled, Resources]]:
    forms = all_forms()
    done = _compile_shown(forms, capabilities, folder, ptxas_choice)
    spilled = [
        f"{compiled.name} for sm_{compiled.capability} ({resources.spills} bytes)"
        for compiled, resources in done
        if resources.spills > FREE_SPILLS and forms[compiled.name].hot
    ]
    if spilled:
        raise BuildError(f"registers are spilled in {', '.join(spilled)}; make the tiles smaller.")
    return done


def _compile_shown(
    forms: dict[str, Form],
    capabilities: tuple[int, ...],
    folder: Path,
    ptxas_choice: str,
    refused: dict[str, str] | None = None,
) -> list[tuple[Compiled, Resources]]:
    """``compile_all`` in the order of the forms, with a bar where there is what draws one."""
    done = compile_all(forms.values(), capabilities, folder, ptxas_choice, refused)
    total = sum(len(set(form.capabilities) & set(capabilities)) for form in forms.values())
    try:
        from rich.progress import track
    except ImportError:
        print(f"compile {total} kernels", flush=True)
        result = list(done)
    else:
        result = list(track(done, "compile kernels", total, transient=True))
    order = list(forms)
    return sorted(result, key=lambda each: (order.index(each[0].name), each[0].capability))


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


def main(arguments: list[str] | None = None) -> int:
    """Compile the GPU kernels and link them into one library."""
    parser = argparse.ArgumentParser(
        "python -m ingot.plugins.kernels.build", description=main.__doc__
    )
    parser.add_argument(
        "--sm",
        action="append",
        type=int,
        choices=COMPUTE_CAPABILITIES,
        help="compute capability to compile for, such as 90; may be repeated (default: all)",
    )
    parser.add_argument(
        "--ptxas",
        choices=ptxas.CHOICES,
        default="default",
        help="which of Triton's two ptxas assembles: older makes what drivers from R525 (R570 for "
        "10.0 and 12.0) load, newer what needs R580; default is older up to 9.0, newer above",
    )
    parser.add_argument(
        "--tune",
        action="store_true",
        help="compile also the candidates that benchmarks/gpu.py compares with what is shipped",
    )
    parser.add_argument(
        "--out", type=Path, help=f"the library to write (default: {PATH}; with --tune {TUNE_PATH})"
    )
    options = parser.parse_args(arguments)
    capabilities = options.sm or COMPUTE_CAPABILITIES
    out = options.out or (TUNE_PATH if options.tune else PATH)
    left_out: dict[str, str] = {}
    with ended(), terminable():
        check_file(out)
        if options.tune:
            done, left_out = build_to_tune(out, capabilities, ptxas_choice=options.ptxas)
        else:
            done = build(out, capabilities, ptxas_choice=options.ptxas)
        line = Library(out.absolute()).build_line
        print(report(done))
        for candidate, reason in left_out.items():
            print(f"left out {candidate}: {reason}")
        print(f"{out}: {len(done)} kernels, {out.stat().st_size / 1e6:.1f} MB")
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
