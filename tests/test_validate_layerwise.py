"""Layer by layer over all calls at once: the numbers of the session, in the memory of one layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy_hybrid
from kinds import KINDS, every_family
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from ingot.graphs.checkpoint import Checkpoint
from ingot.graphs.family import find_family
from ingot.graphs.merge import open_checkpoint
from ingot.graphs.preset import preset_config, write_checkpoint
from ingot.validate.truth import layerwise, stacks
from ingot.validate.truth.cache import Recording
from ingot.validate.truth.eager import EagerSession
from ingot.validate.truth.inputs import make_inputs
from ingot.validate.truth.layerwise import Array, Fed, Layerwise, Side
from ingot.validate.truth.orders import BODIES
from ingot.validate.truth.reference import Reference
from ingot.validate.truth.replay import Replay
from ingot.validate.truth.stacks import Stacks

TASKS = [(family, task) for family in KINDS for task in find_family(family).tasks]
PRECISIONS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Path]]:
    """``get(family, task)``: a tiny seeded one; read only."""
    made: dict[tuple[str, str], Path] = {}

    def get(family: str, task: str = "generate") -> Path:
        head = "generate" if task == "features" else task
        if (family, head) not in made:
            folder = tmp_path_factory.mktemp(family)
            found = toy_hybrid.FAMILY if family == "toy_hybrid" else find_family(family)
            write_checkpoint(folder, found, preset_config(found, "tiny"), task=head, seed=3)
            made[family, head] = folder
        return made[family, head]

    with toy_hybrid.registered():
        yield get


def calls_of(decode: int = 3, seed: int = 0, stateful: bool = True) -> list[Fed]:
    """A padded prefill and some more tokens."""
    inputs = make_inputs(512, seed, chunk_size=8, stateful=stateful)
    steps = inputs.steps[: decode + 1]
    return [Fed(inputs.input_ids[:, c], inputs.attention_mask[:, c]) for _, c in steps]


def stepped(session: EagerSession, calls: Sequence[Fed]) -> Recording:
    """What a session gives call by call."""
    session.reset(len(calls[0].input_ids), 64)
    result = []
    with Replay() as replay:
        for call in calls:
            replay.choose(call.chosen)
            main = session.step(call.input_ids, call.attention_mask)
            name = session.model.main_output
            result.append({name: main, **session.state(), **session.tapped})
    return result


def everything(_run: int, _number: int, _name: str, array: Array) -> Array:
    return array


def assert_same(found: Recording, wanted: Recording) -> None:
    """Names and their order, shapes, dtypes and bits."""
    assert [list(call) for call in found] == [list(call) for call in wanted]
    for got, want in zip(found, wanted, strict=True):
        for name, array in want.items():
            assert (got[name].dtype, got[name].shape) == (array.dtype, array.shape), name
            assert got[name].tobytes() == array.tobytes(), name


def assert_like_a_session(
    checkpoint: Checkpoint, task: str, precision: torch.dtype, calls: Sequence[Fed]
) -> None:
    session = EagerSession(checkpoint, task, precision=precision, streamed=False)
    graph = Layerwise(checkpoint, task, precision)
    # Two runs at once, and a second time: no state goes from one to another.
    other = calls_of(1, seed=5, stateful=bool(graph.states))
    for _ in range(2):
        ((found, second),) = graph.run([Side([calls, other], everything)])
        assert_same(found, stepped(session, calls))
        assert_same(second, stepped(session, other))


@pytest.mark.parametrize("family", every_family("toy_hybrid"))
def test_gives_what_a_session_gives_to_the_bit(
    checkpoints: Callable[..., Path], family: str
) -> None:
    checkpoint = Checkpoint.open(checkpoints(family))
    assert_like_a_session(checkpoint, "generate", torch.float32, calls_of())


@pytest.mark.parametrize("family", every_family("toy_hybrid"))
def test_knows_which_layer_each_hidden_state_leaves(
    checkpoints: Callable[..., Path], family: str
) -> None:
    checkpoint = Checkpoint.open(checkpoints(family))
    session = EagerSession(checkpoint, "generate", streamed=False)
    seen: dict[int, Array] = {}

    def entering(_layer: Any, arguments: Any) -> None:
        seen.setdefault(-1, arguments[0].numpy())

    def leaving(layer: int) -> Callable[..., None]:
        return lambda _layer, _arguments, output: seen.update({layer: output[0].numpy()})

    layers = [layer for layer, _ in session.model.decoder.by_layer()]
    layers[0].register_forward_pre_hook(entering)
    for number, layer in enumerate(layers):
        layer.register_forward_hook(leaving(number))
    (found,) = stepped(session, calls_of(0))
    hidden = [name for name in found if name.startswith("hidden_states.")]
    same = {
        name: layer
        for name in hidden
        for layer, array in seen.items()
        if found[name].tobytes() == array.astype(found[name].dtype).tobytes()
    }
    # The last has been through the final norm, and no layer gives it.
    assert set(hidden) - set(same) == {hidden[-1]}
    reference = Reference(checkpoint, "generate")
    assert {n: layer for n, layer in reference.layers.items() if n in hidden} == same
    assert reference.layer_count == len(layers)


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("family", "task"), [*TASKS, ("toy_hybrid", "generate"), ("toy_hybrid", "features")]
)
def test_gives_it_of_every_task_and_precision(
    checkpoints: Callable[..., Path], family: str, task: str, precision: torch.dtype
) -> None:
    checkpoint = Checkpoint.open(checkpoints(family, task))
    calls = calls_of(stateful=task != "classify")
    assert_like_a_session(checkpoint, task, precision, calls)


def test_takes_the_head_in_blocks_of_the_vocabulary(
    checkpoints: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(checkpoints("granite"))
    graph = Layerwise(checkpoint, "generate", torch.float64)
    ((whole,),) = graph.run([Side([calls_of()], everything)])
    rows: list[int] = []
    head = graph._model.head

    def counted(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        logits = head(x, mask)
        rows.append(logits.shape[-1])
        return logits

    monkeypatch.setattr(layerwise, "HEAD_BLOCK", 100 * 64 * 8)
    monkeypatch.setattr(graph._model, "head", counted)
    ((blocks,),) = graph.run([Side([calls_of()], everything)])
    assert set(rows) == {100, 12}
    for one, other in zip(whole, blocks, strict=True):
        np.testing.assert_allclose(other["logits"], one["logits"], rtol=1e-12, atol=1e-14)


def test_computes_the_logits_of_the_tokens_that_are_wanted(
    checkpoints: Callable[..., Path],
) -> None:
    graph = Layerwise(Checkpoint.open(checkpoints("olmoe")), "generate", torch.float64)
    calls = calls_of(0)
    wanted = np.zeros(calls[0].input_ids.shape, dtype=np.bool_)
    wanted[0, [3, -1]] = True
    cut = [Fed(calls[0].input_ids, calls[0].attention_mask, wanted=wanted)]
    ((whole,), (part,)) = (graph.run([Side([each], everything)])[0] for each in (calls, cut))
    logits = part[0].pop("logits")
    expected = np.where(wanted[..., None], whole[0].pop("logits"), 0)
    np.testing.assert_allclose(logits, expected, rtol=1e-12, atol=1e-14)
    assert_same(part, whole)


def test_forces_the_experts_of_each_router_and_call(checkpoints: Callable[..., Path]) -> None:
    checkpoint = Checkpoint.open(checkpoints("jetmoe"))
    graph = Layerwise(checkpoint, "generate")
    random = np.random.default_rng(0)

    def forced(call: Fed) -> Fed:
        tokens, routers = call.input_ids.size, sum(graph._model.config.facts.routers)
        masks = [random.random((tokens, 4)).argsort(axis=1) < 2 for _ in range(routers)]
        return Fed(call.input_ids, call.attention_mask, masks)

    free = calls_of()
    calls = [forced(call) for call in free]
    session = EagerSession(checkpoint, "generate", streamed=False)
    ((found, unforced),) = graph.run([Side([calls, free], everything)])
    assert_same(found, stepped(session, calls))
    assert_same(unforced, stepped(session, free))
    assert found[0]["logits"].tobytes() != unforced[0]["logits"].tobytes()


def test_reads_a_layer_once_and_drops_it(
    checkpoints: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(checkpoints("granite"))
    graph = Layerwise(checkpoint, "generate", torch.float64)
    read: list[str] = []
    of_checkpoint = checkpoint.read

    def counted(name: str) -> torch.Tensor:
        read.append(name)
        return of_checkpoint(name)

    held: list[set[str]] = []

    def keep(_run: int, _number: int, _name: str, _array: Array) -> None:
        parameters = graph._model.named_parameters()
        held.append({n.split(".")[2] for n, p in parameters if "layers" in n and not p.is_meta})

    monkeypatch.setattr(checkpoint, "read", counted)
    graph.run([Side([calls_of(), calls_of(2)], keep)] * 2)
    layers = [name for name in read if ".layers." in name]
    assert len(layers) == len(set(layers)) > 0
    assert max(map(len, held)) == 1
    assert all(parameter.is_meta for parameter in graph._model.parameters())


def in_bfloat16(folder: Path, out: Path) -> Path:
    """A copy that is stored in bfloat16."""
    weights = load_file(folder / "model.safetensors")
    halves = {name: weight.to(torch.bfloat16) for name, weight in weights.items()}
    save_file(halves, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text((folder / "config.json").read_text())
    return out


class Widened(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the dtypes of the stacks that operators are given, and what they widen of them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stacks: set[torch.dtype] = set()
        self.widened = 0
        self._inside = False

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function in BODIES:
            self.stacks |= {each.dtype for each in args if isinstance(each, torch.nn.Parameter)}
            self._inside = True
            with self:
                result = BODIES[function](*args, **(kwargs or {}))
            self._inside = False
            return result
        if self._inside and function is torch.ops.aten.to.dtype:
            self.widened += args[0].dtype != args[1] and args[0].ndim == 2
        return function(*args, **(kwargs or {}))


def of_jetmoe(folder: Path, precision: torch.dtype) -> tuple[Widened, Checkpoint, Recording]:
    """What is widened of a checkpoint in bfloat16, over several runs of two sides; one run."""
    checkpoint, seen = Checkpoint.open(folder), Widened()
    graph = Layerwise(checkpoint, "generate", precision)
    side = Side([calls_of(), calls_of(2)], everything, lambda: seen)
    (found, _), _ = graph.run([side, side])
    return seen, checkpoint, found


def wide_stack(checkpoint: Checkpoint) -> int:
    """Bytes of a layer's stacks in float64."""
    entries = checkpoint.entries.items()
    names = [name for name, each in entries if ".0." in name and len(each.shape) == 3]
    return sum(8 * math.prod(checkpoint.entries[name].shape) for name in names)


def test_widens_the_experts_of_a_layer_once_for_all_calls(
    checkpoints: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = in_bfloat16(checkpoints("jetmoe"), tmp_path)
    made: list[Stacks] = []
    read = Stacks.read

    def noted(self: Stacks, *arguments: Any) -> torch.Tensor:
        made.append(self)
        return read(self, *arguments)

    monkeypatch.setattr(Stacks, "read", noted)
    seen, checkpoint, found = of_jetmoe(folder, torch.float64)
    assert seen.stacks == {torch.float64}
    assert seen.widened == 0
    # Four stacks in each of two layers, in the memory of one layer.
    assert len(made) == 8
    assert len({id(each) for each in made}) == 1
    assert sum(each.nbytes for each in made[0]._held.values()) == wide_stack(checkpoint)
    session = EagerSession(checkpoint, "generate", precision=torch.float64, streamed=False)
    assert_same(found, stepped(session, calls_of()))


def test_keeps_stacks_for_which_there_is_no_room_as_they_are_stored(
    checkpoints: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = in_bfloat16(checkpoints("jetmoe"), tmp_path)
    session = EagerSession(
        Checkpoint.open(folder), "generate", precision=torch.float64, streamed=False
    )
    some = {torch.float64, torch.bfloat16}
    for room, dtypes in ((wide_stack(Checkpoint.open(folder)) - 1, some), (0, {torch.bfloat16})):
        monkeypatch.setattr(stacks, "MOST_WIDE", room)
        seen, _, found = of_jetmoe(folder, torch.float64)
        assert seen.stacks == dtypes
        assert seen.widened > 0
        assert_same(found, stepped(session, calls_of()))


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["jetmoe", "olmoe"])
def test_rounds_experts_to_half_precision_before_it_widens_them(
    checkpoints: Callable[..., Path], family: str, precision: torch.dtype
) -> None:
    assert_like_a_session(Checkpoint.open(checkpoints(family)), "generate", precision, calls_of())


@pytest.mark.slow
@pytest.mark.parametrize("precision", [torch.float64, torch.float16])
def test_reads_the_weights_with_the_adapter_in_them(
    checkpoints: Callable[..., Path], tmp_path: Path, precision: torch.dtype
) -> None:
    from adapters import make_adapter

    (tmp_path / "base").mkdir()
    base = in_bfloat16(checkpoints("jetmoe"), tmp_path / "base")
    parameters = ["mlp.input_linear.weight", "mlp.output_linear.weight", "embed_tokens.weight"]
    config: dict[str, Any] = {"target_modules": ["kv_proj"], "target_parameters": parameters}
    adapter = make_adapter(base, tmp_path / "adapter", **config)
    checkpoint = open_checkpoint(base, adapter)
    assert_like_a_session(checkpoint, "generate", precision, calls_of())
