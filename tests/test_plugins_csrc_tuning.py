"""Candidates in place of the host layer's choices."""

from __future__ import annotations

from collections.abc import Iterator
from ctypes import Structure
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from ingot.plugins import check, torch_kernels
from ingot.plugins.library import Library, LibraryError

if TYPE_CHECKING:
    from ingot.plugins.kernels.interpret import InterpretedLibrary

BF16 = torch.bfloat16


@pytest.fixture
def tunable(device: InterpretedLibrary) -> Iterator[InterpretedLibrary]:
    device.launches.clear()
    yield device
    device.tune()


def moe_case(device: InterpretedLibrary, dtype: torch.dtype = BF16) -> check.Case:
    return check.moe_dispatch_case(device, "cpu", dtype, 40, 16, 16, 3, 2)


def scan_case(device: InterpretedLibrary, dtype: torch.dtype = BF16) -> check.Case:
    return check.mamba2_scan_case(device, "cpu", dtype, 1, 260, 2, 8, 1, 8)


def launched(device: InterpretedLibrary, case: check.Case) -> dict[str, tuple[int, int, int]]:
    """Forms and grids of a case, whose result is checked."""
    device.launches.clear()
    assert max(case.errors(case.outputs())) < check.LIMITS[case.dtype]
    return {launch.form: launch.grid for launch in device.launches}


def test_a_tile_and_a_chunk_are_taken(tunable: InterpretedLibrary) -> None:
    tunable.tune(tile=(128, 128), chunk=256)
    assert "moe_gate_up_m128n128_bf16" in launched(tunable, moe_case(tunable))
    assert launched(tunable, scan_case(tunable))["mamba2_times_bf16"] == (1, 2, 1)
    # Float32 has one choice of each.
    assert "moe_gate_up_m64n32_fp32" in launched(tunable, moe_case(tunable, torch.float32))
    scan = launched(tunable, scan_case(tunable, torch.float32))
    assert scan["mamba2_times_fp32"] == (1, 5, 1)


def test_without_arguments_the_tables_are_back(tunable: InterpretedLibrary) -> None:
    tunable.tune(tile=(128, 128), chunk=256)
    tunable.tune()
    assert "moe_gate_up_m64n64_bf16" in launched(tunable, moe_case(tunable))
    assert launched(tunable, scan_case(tunable))["mamba2_times_bf16"] == (1, 3, 1)


def test_a_variant_without_a_form_is_refused(tunable: InterpretedLibrary) -> None:
    def refusal(case: check.Case) -> str:
        with pytest.raises(LibraryError) as caught:
            case.kernel()
        return str(caught.value)

    tunable.tune(tile_variant="fast", scan_variant="wide")
    assert "no kernel moe_gate_up_m64n64_bf16_fast in this library" in refusal(moe_case(tunable))
    assert "no kernel mamba2_states_bf16_any_wide in this" in refusal(scan_case(tunable))
    # The others have none, nor has float32.
    assert "moe_gate_up_m64n32_fp32" in launched(tunable, moe_case(tunable, torch.float32))
    assert "mamba2_outputs_fp32_any" in launched(tunable, scan_case(tunable, torch.float32))


def test_compiled_candidates_run(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ingot.plugins.kernels.build import all_forms
    from ingot.plugins.kernels.interpret import InterpretedLibrary

    forms = {name: form for name, form in all_forms().items() if "bf16" in name or "fp" not in name}
    for name, form in list(forms.items()):
        if "_m64n64_" in name:
            forms[f"{name}_v"] = replace(form, name=f"{name}_v")
            low = name.replace("m64", "m32")
            forms[low] = replace(form, name=low, constants={**form.constants, "ROWS": 32})
        if name.startswith(("mamba2_states_", "mamba2_outputs_")):
            forms[f"{name}_w"] = replace(form, name=f"{name}_w")
    device = InterpretedLibrary(forms, tmp_path_factory.mktemp("variants"))
    device.tune(tile=(64, 64), tile_variant="v", chunk=64, scan_variant="w")
    moe = launched(device, moe_case(device))
    assert {"moe_gate_up_m64n64_bf16_v", "moe_down_m64n64_bf16_v", "moe_combine_bf16"} <= set(moe)
    scan = launched(device, scan_case(device))
    assert {"mamba2_states_bf16_any_w", "mamba2_outputs_bf16_any_w"} <= set(scan)
    assert "mamba2_products_bf16_any" in scan
    linear = check.moe_linear_case(device, "cpu", BF16, 40, 16, 16, 3, 2, False)
    assert "moe_linear_m64n64_bf16_v" in launched(device, linear)

    def run(library: Library, parameters: Structure, x: torch.Tensor) -> None:
        size = library.workspace_bytes(parameters)
        workspace = torch.full((size + 4096,), 255, dtype=torch.uint8)
        library.run(parameters, workspace.data_ptr(), size, None)
        assert bool((workspace[size:] == 255).all()), "written behind the workspace"

    # So many that the table of low tiles takes a unit of the workspace more than that of tall ones.
    monkeypatch.setattr(torch_kernels, "_run", run)
    device.tune(tile=(32, 64))
    many = check.moe_dispatch_case(device, "cpu", BF16, 96, 16, 16, 15, 2)
    assert "moe_gate_up_m32n64_bf16" in launched(device, many)


def test_a_tile_without_a_form_is_refused(tunable: InterpretedLibrary) -> None:
    tunable.tune(tile=(32, 256))
    with pytest.raises(LibraryError, match="no kernel moe_gate_up_m32n256_bf16 in this library"):
        moe_case(tunable).kernel()


@pytest.mark.parametrize(
    ("candidate", "message"),
    [
        # The forms of 16 rows search their choices themselves; here they would miss some.
        (
            {"tile": (16, 32)},
            "tile_rows is 16; it must be a power of two between 32 and 256, or 0 for the built-in "
            "choice.",
        ),
        ({"tile": (64, 40)}, "tile_columns is 40; it must be a power of two between 16 and 256"),
        ({"tile": (64, 0)}, "one side of a tile is 0; set tile_rows and tile_columns both or"),
        ({"chunk": 96}, "chunk is 96; it must be a multiple of 64 between 64 and 512, or 0 for"),
        ({"chunk": 576}, "chunk is 576; it must be a multiple of 64 between 64 and 512"),
        ({"chunk": -64}, "chunk is -64; it must be a multiple of 64 between 64 and 512"),
        ({"slice_tokens": 8}, "slice_tokens is 8; it must be a multiple of 16 between 16 and"),
        ({"scan_bytes": -1}, "scan_bytes is -1; it must be a multiple of 256 between 256 and"),
    ],
)
def test_refusals(tunable: InterpretedLibrary, candidate: dict[str, Any], message: str) -> None:
    tunable.tune(chunk=256)
    with pytest.raises(LibraryError) as caught:
        tunable.tune(**candidate)
    assert message in str(caught.value)
    # What was set before still is.
    assert launched(tunable, scan_case(tunable))["mamba2_times_bf16"] == (1, 2, 1)
