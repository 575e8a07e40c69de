"""The recorder: right launches pass, and each kind of wrong one is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from ctypes import Structure, c_void_p
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from benchmarks.on_gpu import shapes
from ingot.plugins import check, torch_kernels
from ingot.plugins.causal_conv import causal_conv
from ingot.plugins.kernels.build import all_forms
from ingot.plugins.mamba2_scan import mamba2_scan
from ingot.plugins.moe_dispatch import moe_dispatch
from ingot.plugins.moe_linear import moe_linear

if TYPE_CHECKING:
    from ingot.plugins.kernels.record import Launch, RecordingLibrary


@pytest.fixture(scope="module")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> RecordingLibrary:
    from ingot.plugins.kernels.record import RecordingLibrary

    return RecordingLibrary(all_forms(), tmp_path_factory.mktemp("recorder"))


def test_every_small_case_launches_what_its_kernels_are_written_for(
    recorder: RecordingLibrary,
) -> None:
    recorder.launches.clear()
    for case in check.small_cases(recorder, "cpu"):
        case.kernel()
    for activation in ("silu", "relu"):
        check.causal_conv_case(recorder, "cpu", torch.float16, 3, 9, 16, 8, activation).kernel()
    # Every kernel but those for sizes that no small case has.
    used = {launch.form for launch in recorder.launches}
    functions = {form.function.__name__ for form in all_forms().values()}
    assert {all_forms()[name].function.__name__ for name in used} == functions


def test_an_empty_convolution_passes_its_state_on(recorder: RecordingLibrary) -> None:
    x, state = torch.zeros(2, 0, 16), torch.zeros(2, 16, 3)
    recorder.launches.clear()
    torch_kernels.call(causal_conv, recorder, x, state, torch.zeros(16, 1, 4), None, "silu")
    assert len(recorder.launches) == 1


def _one_launch(recorder: RecordingLibrary, monkeypatch: pytest.MonkeyPatch) -> Launch:
    """A launch of MoeLinear over its call, as the checks are given it."""
    from ingot.plugins.kernels import record

    seen: list[Launch] = []
    monkeypatch.setattr(record, "check_grid", seen.append)
    check.moe_linear_case(recorder, "cpu", torch.bfloat16, 1, 16, 8, 3, 2, False).kernel()
    monkeypatch.undo()
    return seen[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda launch: replace(launch, grid=(3, 1, 1)), r"launched on \(3, 1, 1\)"),
        (lambda launch: replace(launch, grid=(4, 2, 1)), r"launched on \(4, 2, 1\)"),
    ],
)
def test_refuses_another_grid(
    recorder: RecordingLibrary,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Launch], Launch],
    message: str,
) -> None:
    from ingot.plugins.kernels.record import RecordError, check_grid

    launch = _one_launch(recorder, monkeypatch)
    # Two choices, and eight features in tiles of four.
    assert launch.grid == (4, 1, 1)
    check_grid(launch)
    with pytest.raises(RecordError, match=message):
        check_grid(change(launch))


def test_refuses_a_pointer_outside_its_call(
    recorder: RecordingLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ingot.plugins.kernels.record import RecordError, check_pointers

    launch = _one_launch(recorder, monkeypatch)
    regions = [(address, 16) for address in launch.pointers.values()]
    check_pointers(launch, regions)
    for name in launch.pointers:
        moved = {**launch.pointers, name: launch.pointers[name] + (1 << 40)}
        with pytest.raises(RecordError, match=f"for {name}, outside its call"):
            check_pointers(replace(launch, pointers=moved), regions)
        with pytest.raises(RecordError, match="outside its call"):
            check_pointers(replace(launch, pointers={**launch.pointers, name: 0}), regions)


def test_a_changed_plan_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host layer that makes one block too few, compiled from a changed copy of its source."""
    from ingot.plugins.kernels import link
    from ingot.plugins.kernels.record import RecordError, RecordingLibrary

    sources = tmp_path / "csrc"
    sources.mkdir()
    for path in link.SOURCES.iterdir():
        text = path.read_text()
        if path.name == "mamba2.cpp":
            changed = text.replace("tiles(p.head_size, rows)}", "tiles(p.head_size, rows) - 1}")
            assert changed != text
            text = changed
        (sources / path.name).write_text(text)
    monkeypatch.setattr(link, "SOURCES", sources)
    wrong = RecordingLibrary(all_forms(), tmp_path / "built")
    case = check.mamba2_scan_case(wrong, "cpu", torch.bfloat16, 1, 1, 4, 32, 2, 32)
    with pytest.raises(RecordError, match=r"mamba2_step_bf16_n64 was launched on \(4, 1, 1\)"):
        case.kernel()


def _addresses(parameters: Structure) -> Structure:
    """Made-up device addresses, far enough apart for every tensor of the call."""
    pointers = [name for name, kind, *_ in parameters._fields_ if kind is c_void_p]
    for at, name in enumerate(pointers, start=1):
        setattr(parameters, name, at << 44)
    return parameters


def _released(dtype: int) -> Iterator[Structure]:
    """Calls at the sizes of released models, up to 16 rows of 8192 tokens."""
    for tokens in (1, 2, 16, 17, 300, 4096, 8192, 16 * 8192):
        for moe in shapes.moe("full"):
            yield moe_dispatch.structure(dtype=dtype, tokens=tokens, **moe.sizes)
        for linear in shapes.linear("full"):
            yield moe_linear.structure(dtype=dtype, tokens=tokens, **linear.sizes)
    for batch, tokens in ((1, 1), (16, 1), (1, 129), (1, 8192), (16, 8192), (1, 1 << 20)):
        for scan in shapes.scans("full"):
            yield mamba2_scan.structure(
                dtype=dtype, batch=batch, tokens=tokens, dt_max=1.0, **scan.sizes
            )
            yield causal_conv.structure(
                dtype=dtype, batch=batch, tokens=tokens, channels=scan.channels, width=scan.width
            )


@pytest.mark.parametrize("dtype", [0, 2], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
def test_every_released_size_is_taken_and_stays_in_its_tensors(
    recorder: RecordingLibrary, monkeypatch: pytest.MonkeyPatch, capability: int, dtype: int
) -> None:
    """Also where a call is cut into slices, whose grids are not those of the whole call."""
    from ingot.plugins.kernels import record

    monkeypatch.setattr(record, "check_grid", lambda _launch: None)
    recorder.set_capability(capability)
    for parameters in _released(dtype):
        size = recorder.workspace_bytes(parameters)
        assert size < 1 << 30, parameters
        recorder.launches.clear()
        recorder.run(_addresses(parameters), 1 << 56, size, None)
        assert recorder.launches
    recorder.set_capability(90)
