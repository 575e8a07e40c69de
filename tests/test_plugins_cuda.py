"""The operators on the kernels, as an eager graph on a GPU has them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import MakeCheckpoint
from oracle import relative_rms, tokens

from graphs.checkpoint import Checkpoint, load_parameters
from graphs.family import family_of
from graphs.state import BATCH
from plugins import cuda
from plugins.causal_conv import causal_conv
from plugins.library import Library
from plugins.mamba2_scan import mamba2_scan
from plugins.moe_dispatch import ACTIVATIONS, moe_dispatch
from plugins.moe_linear import moe_linear
from validate.eager import EagerSession

if TYPE_CHECKING:
    from plugins.kernels.interpret import InterpretedLibrary

OPERATORS = (causal_conv, moe_dispatch, moe_linear, mamba2_scan)


# Never closed: PyTorch has no way to take a kernel back, and leaving the context would turn those
# of the CPU on for every test that follows in this process.
OFF = contextlib.ExitStack()


@pytest.fixture(scope="module")
def registered(device: InterpretedLibrary) -> InterpretedLibrary:
    cuda.register(device, "cpu")
    # Off, outside the tests that turn them on.
    OFF.enter_context(switched(on=False))
    return device


@contextlib.contextmanager
def switched(*, on: bool, device_type: str = "cpu") -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for operator in OPERATORS:
            stack.enter_context(operator.set_kernel_enabled(device_type, on))
        yield


@pytest.mark.parametrize("family", ["olmoe", "jetmoe", "mamba2"])
def test_an_eager_graph_on_the_kernels_computes_the_same(
    registered: InterpretedLibrary, make_checkpoint: MakeCheckpoint, family: str
) -> None:
    """A prefill of three padded rows and two decode steps through the whole model."""
    session = EagerSession(Checkpoint.open(make_checkpoint(family)), "generate")
    ids, mask = tokens(512)

    def run() -> list[Any]:
        session.reset(*ids.shape)
        results = []
        for columns in (slice(0, 13), slice(13, 14), slice(14, 15)):
            logits = session.step(ids[:, columns], mask[:, columns])
            results.append(logits[mask[:, columns] != 0])
        return results

    expected = run()
    registered.launches.clear()
    with switched(on=True):
        actual = run()
    assert len(registered.launches) > 10
    forms = [launch.form for launch in registered.launches]
    convolutions = [form for form in forms if form.startswith("mamba2_conv_")]
    # Two layers, in a prefill and two steps.
    of_prefill, of_steps = ["mamba2_conv_fp32_many_w4"] * 2, ["mamba2_conv_fp32_one_w4"] * 4
    assert convolutions == (of_prefill + of_steps if family == "mamba2" else [])
    for want, got in zip(expected, actual, strict=True):
        assert 0 < relative_rms(want, got) < 1e-5


@pytest.mark.parametrize("activation", [*ACTIVATIONS, "identity"])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("batch", "tokens"), [(2, 0), (0, 3), (2, 1), (1, 2), (2, 5)])
def test_a_convolution_on_its_kernel_is_the_reference(
    registered: InterpretedLibrary, batch: int, tokens: int, biased: bool, activation: str
) -> None:
    """Without tokens the state is passed on, and without rows there is nothing to compute."""
    random = torch.Generator().manual_seed(tokens)
    shapes = ((batch, 7, tokens), (batch, 7, 3), (7, 1, 4), (7, 2))
    x, state, weight, biases = (torch.randn(shape, generator=random) for shape in shapes)
    # Neither x nor the bias lies in memory as the kernel reads it.
    bias = biases[:, 0] if biased else None
    arguments = (x.transpose(1, 2), state, weight, bias, activation)
    expected = causal_conv(*arguments)
    registered.launches.clear()
    with switched(on=True):
        found = causal_conv(*arguments)
    assert len(registered.launches) == (batch > 0)
    for want, got in zip(expected, found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert got.is_contiguous() and want.is_contiguous()
    assert torch.equal(found[1], expected[1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["olmoe", "jetmoe", "mamba2"])
def test_an_eager_graph_on_the_gpu_computes_the_same(
    make_checkpoint: MakeCheckpoint, family: str, dtype: torch.dtype
) -> None:
    """On the card: the kernels and the reference, both against float64."""
    cuda.register(Library())
    checkpoint = Checkpoint.open(make_checkpoint(family))
    found = family_of(checkpoint)
    ids, mask = (torch.from_numpy(array).cuda() for array in tokens(512))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    def run(compute: torch.dtype, *, on_kernels: bool) -> torch.Tensor:
        model: Any = found.build(checkpoint.config, "generate", compute)
        load_parameters(model, checkpoint, found.weight_map(model, checkpoint, "generate"))
        model = model.cuda()
        past = tuple(
            torch.zeros(
                [len(ids) if d == BATCH else 0 if isinstance(d, str) else d for d in s.input_shape],
                dtype=s.dtype(compute),
                device="cuda",
            )
            for s in model.states
        )
        with switched(on=on_kernels, device_type="cuda"), torch.no_grad():
            main: torch.Tensor = model(ids, mask, positions, past).main[mask != 0]
        return main.double()

    def error(got: torch.Tensor) -> float:
        return float((got - truth).square().mean().sqrt() / truth.square().mean().sqrt())

    truth = run(torch.float64, on_kernels=False)
    floor = error(run(dtype, on_kernels=False))
    assert error(run(dtype, on_kernels=True)) < 3 * floor + 1e-6
