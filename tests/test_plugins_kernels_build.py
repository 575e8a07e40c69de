"""Compiling kernels ahead of time, and what the library says where it cannot run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ingot.plugins.device import has_gpu
from ingot.plugins.kernels import build
from ingot.plugins.kernels.build import Resources, all_forms, report
from ingot.plugins.kernels.form import Form
from ingot.plugins.kernels.link import Compiled, argument_letters
from ingot.plugins.library import Library, LibraryError
from ingot.plugins.moe_linear import moe_linear

if TYPE_CHECKING:
    from ingot.plugins.kernels.interpret import InterpretedLibrary

# Compiles one form for two devices, and links them; Triton's interpreter is not for here.
BUILD = """
import json, sys
from pathlib import Path
from ingot.plugins.kernels import build
from ingot.plugins.kernels.link import link

out, name = Path(sys.argv[1]), sys.argv[2]
form = build.all_forms()[name]
made = list(build.compile_all([form], (80, 90), out / "kernels"))
cubins = [compiled for compiled, _ in made]
link(cubins, build.plan_constants(), out / "libingot_kernels.so", out / "kernels")
print(json.dumps({c.capability: [r.registers, r.spills, c.threads] for c, r in made}))
"""

# What the command does with that form alone.
COMMAND = """
import sys
from functools import partial
from pathlib import Path
from ingot.plugins.kernels import build

out, name = Path(sys.argv[1]), sys.argv[2]
form = build.all_forms()[name]
build.all_forms = lambda: {name: form}
build.build = partial(build.build, folder=out / "kernels")
sys.exit(build.main(["--sm", "80", "--sm", "90", "--out", str(out / "libingot_kernels.so")]))
"""


def python(code: str, *arguments: str | Path, **environment: str) -> Any:
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**clean, **environment},
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    done = python(BUILD, folder, "mamba2_step_bf16_n128", TRITON_CACHE_DIR=str(folder / "cache"))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == {"80", "90"}
    for registers, spills, threads in found.values():
        assert 16 < registers <= 255 and spills == 0 and threads % 32 == 0
    return folder


def test_the_library_has_the_cubins_of_each_device(built: Path) -> None:
    for capability in (80, 90):
        (image,) = (built / "kernels").glob(f"mamba2_step_bf16_n128.sm_{capability}.*.cubin")
        cubin = image.read_bytes()
        assert cubin[:4] == b"\x7fELF"
        assert cubin in (built / "libingot_kernels.so").read_bytes()


@pytest.mark.skipif(has_gpu(), reason="a GPU is here")
def test_says_in_one_sentence_that_there_is_no_driver(built: Path) -> None:
    library = Library(built / "libingot_kernels.so")
    message = r"the CUDA driver cannot be opened \(libcuda.so.1: .*\); install NVIDIA's driver\."
    with pytest.raises(LibraryError, match=message):
        library.prepare()
    tokens = moe_linear.structure(
        dtype=0, top_k=1, experts=2, tokens=1, in_features=4, out_features=4, x=16, expert_ids=16
    )
    tokens.weight = tokens.y = 16
    with pytest.raises(LibraryError, match="CUDA driver"):
        library.run(tokens, None, 0, None)


def test_a_second_build_compiles_nothing_and_says_what_made_the_first(built: Path) -> None:
    before = sorted((built / "cache").rglob("*.cubin"))
    assert len(before) == 2
    times = [path.stat().st_mtime_ns for path in before]
    done = python(COMMAND, built, "mamba2_step_bf16_n128", TRITON_CACHE_DIR=str(built / "cache"))
    assert done.returncode == 0, done.stderr
    *_, library, line = done.stdout.splitlines()
    assert library.startswith(f"{built / 'libingot_kernels.so'}: 2 kernels, ")
    card = r"ptxas 12\.9\.\d+ driver R525"
    assert re.fullmatch(rf"triton \d+\.\d+\.\d+; 8\.0 {card}; 9\.0 {card}", line)
    after = sorted((built / "cache").rglob("*.cubin"))
    assert after == before and [path.stat().st_mtime_ns for path in after] == times


def test_refuses_to_compile_in_the_interpreter(tmp_path: Path) -> None:
    done = python(BUILD, tmp_path, "mamba2_step_bf16_n128", TRITON_INTERPRET="1")
    assert "BuildError: TRITON_INTERPRET is set" in done.stderr


def test_a_spilling_hot_kernel_is_an_error(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from ingot.plugins.kernels import build
out = Path(sys.argv[1])
form = next(iter(build.all_forms().values()))
compiled = build.Compiled(form.name, "k", 90, 128, 0, "p", out, "12.9.86")
build.compile_all = lambda *_: iter([(compiled, build.Resources(255, 16, 0))])
build.build(out / "x.so", (90,), out)
"""
    done = python(code, tmp_path)
    assert "registers are spilled in" in done.stderr and "(16 bytes)" in done.stderr
    assert not (tmp_path / "x.so").exists()


def test_a_candidate_that_cannot_be_used_whole_is_left_out_and_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    refuses, spills = "moe_down_m64n64_bf16_b64w4s4", "mamba2_outputs_bf16_aligned_b64w8s3"

    def compile_all(
        forms: Iterable[Form], *_: object
    ) -> Iterator[tuple[Compiled, build.Resources]]:
        refused = _[-1]
        for form in forms:
            if form.name == refuses:
                assert isinstance(refused, dict)
                refused[form.name] = "Triton cannot compile it"
                continue
            compiled = Compiled(form.name, "k", 90, 128, 0, "p", tmp_path, "12.9.86")
            yield compiled, Resources(64, 16 * (form.name == spills), 0)

    linked: list[str] = []
    monkeypatch.setattr(build, "compile_all", compile_all)
    monkeypatch.setattr(build, "link", lambda made, *_: linked.extend(each.name for each in made))
    done, left_out = build.build_to_tune(tmp_path / "x.so", (90,), tmp_path)
    assert left_out == {
        "tile 64x64 b64w4s4": "Triton cannot compile it",
        "scan b64w8s3": f"{spills} spills 16 bytes",
    }
    assert linked == [compiled.name for compiled, _ in done]
    whole = {*all_forms(), *build.tuning_forms()}
    gone = {name for name in whole if name.endswith(("m64n64_bf16_b64w4s4", "aligned_b64w8s3"))}
    assert len(gone) == 3 + 2 and set(linked) == whole - gone


def test_candidates_have_the_names_that_the_host_layer_looks_up() -> None:
    from ingot.plugins.kernels import mamba2, moe

    shipped = all_forms()
    names = []
    for rows, columns, variant in moe.tuning_tiles():
        for use in ("gate_up", "down", "linear"):
            name = f"moe_{use}_m{rows}n{columns}_bf16"
            if variant:
                names.append(f"{name}_{variant}")
            else:
                assert 90 in shipped[name].capabilities
    plain, hopper, *others = mamba2.tuning_variants()
    assert plain == ""
    for use in ("states", "outputs"):
        assert shipped[f"mamba2_{use}_bf16_aligned_{hopper}"].capabilities == (90,)
        names += [f"mamba2_{use}_bf16_aligned_{variant}" for variant in others]
    assert set(names) == build.tuning_forms().keys() and not set(names) & shipped.keys()


def test_a_candidate_differs_from_what_is_shipped_as_its_name_says() -> None:
    shipped = all_forms()
    for name, form in build.tuning_forms().items():
        base, variant = name.rsplit("_", 1)
        sizes = dict(re.findall(r"([a-z])(\d+)", variant))
        like = shipped[re.sub(r"m\d+n\d+", "m64n64", base)]
        constants = dict(like.constants)
        if tile := re.search(r"_m(\d+)n(\d+)_", name):
            constants |= {"ROWS": int(tile[1]), "COLUMNS": int(tile[2]), "BLOCK": int(sizes["b"])}
        else:
            constants["BLOCK_K"] = int(sizes["b"])
        assert form.constants == constants, name
        assert (form.num_warps, form.num_stages) == (int(sizes["w"]), int(sizes["s"]))
        assert (form.function, form.signature) == (like.function, like.signature)
        assert form.multiples_of_16 == like.multiples_of_16
        assert form.capabilities == (90,) and form.hot


@pytest.mark.parametrize(
    ("variant", "stands_in_for"),
    [
        (
            "b64w8s3",
            {"mamba2_states_bf16_aligned_b64w8s2", "mamba2_outputs_bf16_aligned_b64w8s2"},
        ),
        ("b128w4s3", {"moe_gate_up_m64n64_bf16", "moe_down_m64n64_bf16"}),
    ],
)
def test_a_candidate_computes_what_the_shipped_form_does(
    device: InterpretedLibrary,
    monkeypatch: pytest.MonkeyPatch,
    variant: str,
    stands_in_for: set[str],
) -> None:
    import torch

    from ingot.plugins import check

    candidates = build.tuning_forms()
    named = {name: f"{name.removesuffix('_b64w8s2')}_{variant}" for name in stands_in_for}
    forms = {name: candidates[candidate] for name, candidate in named.items()}
    monkeypatch.setattr(device, "forms", all_forms() | forms)
    device.launches.clear()
    bf16 = torch.bfloat16
    case = (
        check.moe_dispatch_case(device, "cpu", bf16, 40, 16, 16, 3, 2)
        if "moe_down_m64n64_bf16" in stands_in_for
        else check.mamba2_scan_case(device, "cpu", bf16, 1, 70, 1, 16, 1, 16)
    )
    assert max(case.errors(case.outputs())) < check.LIMITS[bf16]
    assert {form.name for form in forms.values()} <= {each.form for each in device.launches}


def test_every_form_is_declared_soundly() -> None:
    forms = all_forms() | build.tuning_forms()
    assert len(forms) > 50
    for form in forms.values():
        names = list(form.signature)
        assert form.function.arg_names == [*names, *form.constants], form.name
        assert form.multiples_of_16 <= set(names)
        assert set(argument_letters(form.signature.values())) <= set("pif")


def test_reports_the_most_over_the_devices() -> None:
    def of(capability: int) -> Compiled:
        return Compiled("a_kernel", "k", capability, 128, 0, "p", Path(), "12.9.86")

    text = report([(of(80), Resources(40, 0, 512)), (of(90), Resources(64, 8, 256))])
    header, line = text.splitlines()
    assert header.split() == ["kernel", "registers", "spilled", "bytes", "shared", "bytes"]
    assert line.split() == ["a_kernel", "64", "8", "512"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "is missing; build the GPU kernels with: make plugins"), (b"no", "is not a library")],
)
def test_refuses_what_is_no_library(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "libingot_kernels.so"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LibraryError, match=message):
        Library(path)


def test_refuses_a_place_that_cannot_be_written_before_it_compiles(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as end:
        build.main(["--out", str(tmp_path / "file" / "x.so")])
    assert end.value.code == 2
    assert capsys.readouterr().err.endswith(f"{tmp_path / 'file'} is a file.\n")
