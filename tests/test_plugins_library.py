"""The structures of the calls against the header they mirror, as the C compiler lays it out."""

from __future__ import annotations

import re
import subprocess
from ctypes import Structure, sizeof

import pytest

from ingot.plugins import library
from ingot.plugins.activations import ACTIVATIONS
from ingot.plugins.kernels.link import SOURCES
from ingot.plugins.library import CALLS, Tuning
from ingot.plugins.operator import DTYPES

HEADER = SOURCES / "ingot_kernels.h"


STRUCTURES: tuple[type[Structure], ...] = (*CALLS, Tuning)


def c_name(structure: type[Structure]) -> str:
    return "ingot_tuning" if structure is Tuning else CALLS[structure].c_call + "_params"


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What a C program says of sizes, offsets and constants; C, so that the header is plain C."""
    wanted = [f"sizeof({c_name(s)})" for s in STRUCTURES]
    wanted += [f"offsetof({c_name(s)}, {name})" for s in STRUCTURES for name, *_ in s._fields_]
    wanted += [f"INGOT_{name}" for name in ("KERNELS_VERSION", *DTYPES, *ACTIVATIONS)]
    wanted = [re.sub(r"^INGOT_.*", lambda m: m[0].upper(), each) for each in wanted]
    lines = "\n".join(f'printf("{each}=%d\\n", (int){each});' for each in wanted)
    folder = tmp_path_factory.mktemp("header")
    code = f"#include <stdio.h>\n#include <ingot_kernels.h>\nint main(void) {{ {lines} return 0; }}"
    (folder / "sizes.c").write_text(code)
    flags = ["-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", f"-I{SOURCES}"]
    subprocess.run(["gcc", *flags, folder / "sizes.c", "-o", folder / "sizes"], check=True)
    done = subprocess.run([folder / "sizes"], capture_output=True, text=True, check=True)
    pairs = (line.rsplit("=", 1) for line in done.stdout.splitlines())
    return {name: int(value) for name, value in pairs}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_structures_are_laid_out_as_in_c(
    structure: type[Structure], laid_out: dict[str, int]
) -> None:
    name = c_name(structure)
    assert sizeof(structure) == laid_out[f"sizeof({name})"]
    for field, *_ in structure._fields_:
        assert getattr(structure, field).offset == laid_out[f"offsetof({name}, {field})"], field


def test_every_field_of_the_header_is_mirrored() -> None:
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
    for structure in STRUCTURES:
        body = re.search(rf"typedef struct {c_name(structure)} \{{(.*?)\}}", text, re.DOTALL)
        assert body is not None
        declared = re.findall(r"\*?(\w+)\s*[,;]", body[1])
        assert declared == [field for field, *_ in structure._fields_]


def test_constants_are_those_of_the_header(laid_out: dict[str, int]) -> None:
    assert laid_out["INGOT_KERNELS_VERSION"] == library.VERSION
    numbers = {name: activation.number for name, activation in ACTIVATIONS.items()}
    for name, value in {**DTYPES, **numbers}.items():
        assert laid_out[f"INGOT_{name.upper()}"] == value
