"""The operators on the kernels, as an eager graph on a GPU has them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from ctypes import Structure
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from activations import ACTIVATIONS
from conftest import MakeCheckpoint
from oracle import relative_rms, tokens

from ingot.graphs.checkpoint import Checkpoint, load_parameters
from ingot.graphs.family import family_of
from ingot.plugins import torch_kernels
from ingot.plugins.causal_conv import causal_conv
from ingot.plugins.library import Library, LibraryError
from ingot.plugins.mamba2_scan import mamba2_scan
from ingot.plugins.moe_dispatch import moe_dispatch
from ingot.plugins.moe_linear import moe_linear
from ingot.plugins.operator import Operator, OperatorError
from ingot.plugins.registry import OPERATORS
from ingot.validate.truth.eager import EagerSession

if TYPE_CHECKING:
    from ingot.plugins.kernels.interpret import InterpretedLibrary

# Never closed: PyTorch has no way to take a kernel back, and leaving the context would turn those
# of the CPU on for every test that follows in this process.
OFF = contextlib.ExitStack()


@pytest.fixture(scope="module")
def registered(device: InterpretedLibrary) -> InterpretedLibrary:
    torch_kernels.register(device, "cpu")
    # Off, outside the tests that turn them on.
    OFF.enter_context(switched(on=False))
    return device


@contextlib.contextmanager
def switched(*, on: bool, device_type: str = "cpu") -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for operator in OPERATORS.values():
            stack.enter_context(operator.custom_op.set_kernel_enabled(device_type, on))
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


@pytest.mark.parametrize("activation", ACTIVATIONS)
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


def test_registering_prepares_the_current_device(registered: InterpretedLibrary) -> None:
    # A context into which nothing is loaded.
    registered.set_capability(90)
    torch_kernels.register(registered, "cpu")
    try:
        # A first call while a graph is captured; nothing can be loaded then.
        registered.driver.fake_driver_capture(1)
        ids = torch.zeros(1, 1, dtype=torch.int64)
        with switched(on=True):
            assert moe_linear(torch.ones(1, 4), ids, torch.ones(1, 4, 4)).eq(4).all()
    finally:
        registered.set_capability(90)


def test_prepares_a_device_in_its_own_context(
    device: InterpretedLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    @contextlib.contextmanager
    def entered(where: torch.device) -> Iterator[None]:
        done.append(f"enter {where}")
        yield
        done.append("leave")

    monkeypatch.setattr(torch.cuda, "init", lambda: done.append("init"))
    monkeypatch.setattr(torch.cuda, "device", entered)
    monkeypatch.setattr(device, "prepare", lambda: done.append("prepare"))
    torch_kernels.prepare(device, torch.device("cuda", 1))
    assert done == ["init", "enter cuda:1", "prepare", "leave"]
    torch_kernels.prepare(device, torch.device("cpu"))
    assert done[4:] == ["prepare"]


Call = Callable[..., object]


def calls(library: Library) -> dict[str, tuple[Call, list[torch.Tensor]]]:
    """Each operator's call on several tokens, and its tensors."""
    random = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random)

    def on_kernels(operator: Operator, *mixed: Any, new_state: torch.Tensor | None = None) -> Any:
        attributes, tensors = mixed[: len(operator.attributes)], mixed[len(operator.attributes) :]
        return torch_kernels.call(operator, library, *tensors, *attributes, new_state=new_state)

    ids = torch.tensor([[0, 1], [1, 0], [1, 1]])
    a, d, dt_bias = -torch.rand(2, generator=random), normal(2), normal(2)
    scanned = [normal(1, 3, 2, 5), normal(1, 3, 2), a, normal(1, 3, 1, 6), normal(1, 3, 1, 6)]
    scanned += [d, dt_bias, normal(1, 2, 5, 6), torch.ones(1, 3)]
    return {
        "moe_dispatch": (
            partial(on_kernels, moe_dispatch, 2, True, "silu"),
            [normal(3, 5), normal(3, 4), normal(4, 14, 5), normal(4, 5, 7)],
        ),
        "moe_linear": (
            partial(on_kernels, moe_linear),
            [normal(3, 5), ids, normal(2, 7, 5)],
        ),
        "mamba2_scan": (partial(on_kernels, mamba2_scan, 1, 0.0, 9.0), scanned),
        "causal_conv": (
            partial(on_kernels, causal_conv, "silu"),
            [normal(1, 3, 5), normal(1, 5, 3), normal(5, 1, 4), normal(5)],
        ),
    }


OPERATIONS = ("moe_dispatch", "moe_linear", "mamba2_scan", "causal_conv")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_call_runs_in_the_context_of_its_tensors(
    device: InterpretedLibrary, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside: list[torch.device] = []
    during: list[list[torch.device]] = []
    run = device.run

    @contextlib.contextmanager
    def on(where: torch.device) -> Iterator[None]:
        inside.append(where)
        yield
        inside.pop()

    def noted(*arguments: Any) -> None:
        during.append(list(inside))
        run(*arguments)

    monkeypatch.setattr(torch_kernels, "_on", on)
    monkeypatch.setattr(device, "run", noted)
    call, tensors = calls(device)[operation]
    call(*tensors)
    assert during == [[torch.device("cpu")]] and inside == []


def test_the_context_of_a_cuda_device_is_made_current(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[torch.device] = []

    def entering(device: torch.device) -> contextlib.nullcontext[None]:
        entered.append(device)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "device", entering)
    with torch_kernels._on(torch.device("cuda", 1)), torch_kernels._on(torch.device("cpu")):
        assert entered == [torch.device("cuda", 1)]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_refuses_tensors_of_several_devices(device: InterpretedLibrary, operation: str) -> None:
    call, tensors = calls(device)[operation]
    for number in range(len(tensors)):
        mixed = [t.to("meta") if i == number else t for i, t in enumerate(tensors)]
        with pytest.raises(LibraryError) as caught:
            call(*mixed)
        message = "a call of a kernel got tensors on cpu and meta; move all to one device."
        assert str(caught.value) == message


@pytest.mark.parametrize("operation", OPERATIONS)
def test_refuses_shapes_that_disagree_in_every_call(
    device: InterpretedLibrary, operation: str
) -> None:
    call, tensors = calls(device)[operation]
    call(*tensors)
    last = tensors[-1]
    longer = torch.zeros(*last.shape[:-1], last.shape[-1] + 1)
    for _ in range(2):
        with pytest.raises(OperatorError, match=r" got \d+ for dimension "):
            call(*tensors[:-1], longer)
        with pytest.raises(OperatorError, match="of rank 7; it is "):
            call(*tensors[:-1], last.reshape(*last.shape, *[1] * (7 - last.ndim)))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_call_has_a_structure_of_its_own(
    device: InterpretedLibrary, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    """Calls of the same sizes, as threads make them, do not see each other's addresses."""
    made: list[Structure] = []
    monkeypatch.setattr(torch_kernels, "_run", lambda _library, given, _x: made.append(given))
    call, tensors = calls(device)[operation]
    others = [tensor.clone() for tensor in tensors]
    call(*tensors)
    call(*others)
    operator = next(each for each in OPERATORS.values() if each.snake == operation)
    member = operator.pointers[0]
    assert [getattr(each, member) for each in made] == [tensors[0].data_ptr(), others[0].data_ptr()]


def test_attributes_count_where_shapes_repeat(device: InterpretedLibrary) -> None:
    _, tensors = calls(device)["causal_conv"]
    for activation in ("silu", "identity", "silu"):
        found, _ = torch_kernels.call(causal_conv, device, *tensors, activation)
        expected, _ = causal_conv.eager(*tensors, activation)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers, one element behind a multiple of 16 bytes; dense all the same."""
    memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    view = memory[1:].view(tensor.shape)
    assert view.is_contiguous() and view.data_ptr() % 16
    return view.copy_(tensor)


def spread(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers, not dense."""
    return tensor.repeat_interleave(2, -1)[..., ::2]


def outputs(result: Any) -> list[torch.Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("moved", [shifted, spread])
def test_takes_tensors_wherever_they_begin(
    device: InterpretedLibrary, operation: str, moved: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    call, tensors = calls(device)[operation]
    expected = outputs(call(*tensors))
    found = outputs(call(*map(moved, tensors)))
    for want, got in zip(expected, found, strict=True):
        assert torch.equal(want, got)


@pytest.mark.parametrize("operation", ["mamba2_scan", "causal_conv"])
@pytest.mark.parametrize("moved", [shifted, spread])
def test_writes_the_new_state_wherever_it_is(
    device: InterpretedLibrary, operation: str, moved: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    call, tensors = calls(device)[operation]
    y, state = outputs(call(*tensors))
    wanted = moved(torch.zeros_like(state))
    found = outputs(call(*tensors, new_state=wanted))
    assert torch.equal(found[0], y)
    assert found[1] is wanted and torch.equal(wanted, state)


def test_copies_outlive_the_call_that_reads_them(
    device: InterpretedLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy that is freed early is overwritten by the next one, which here is the workspace."""
    call, tensors = calls(device)["causal_conv"]
    expected, _ = outputs(call(*tensors))
    run = torch_kernels._run

    def after_others(library: Library, parameters: Structure, x: torch.Tensor) -> None:
        taken = [torch.full((5,), torch.nan) for _ in range(100)]
        run(library, parameters, x)
        del taken

    monkeypatch.setattr(torch_kernels, "_run", after_others)
    found, _ = outputs(call(*map(spread, tensors)))
    assert torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["olmoe", "jetmoe", "mamba2"])
def test_an_eager_graph_on_the_gpu_computes_the_same(
    make_checkpoint: MakeCheckpoint, family: str, dtype: torch.dtype
) -> None:
    """On the card: the kernels and the reference, both against float64."""
    torch_kernels.register(Library())
    checkpoint = Checkpoint.open(make_checkpoint(family))
    found = family_of(checkpoint)
    ids, mask = (torch.from_numpy(array).cuda() for array in tokens(512))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    def run(compute: torch.dtype, *, on_kernels: bool) -> torch.Tensor:
        model: Any = found.build(checkpoint.config, "generate", compute)
        load_parameters(model, checkpoint, found.weight_map(model, checkpoint, "generate"))
        model = model.cuda()
        past = tuple(
            torch.zeros(s.shape(len(ids), 0), dtype=getattr(torch, s.dtype), device="cuda")
            for s in (state.cast(str(compute).removeprefix("torch.")) for state in model.states)
        )
        with switched(on=on_kernels, device_type="cuda"), torch.no_grad():
            main: torch.Tensor = model(ids, mask, positions, past).main[mask != 0]
        return main.double()

    def error(got: torch.Tensor) -> float:
        return float((got - truth).square().mean().sqrt() / truth.square().mean().sqrt())

    truth = run(torch.float64, on_kernels=False)
    floor = error(run(dtype, on_kernels=False))
    assert error(run(dtype, on_kernels=True)) < 3 * floor + 1e-6
