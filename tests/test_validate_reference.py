"""Truth and floor: kept to the bit under a name of all they depend on, with the truth's experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from conftest import MakeIngot
from kinds import KINDS
from safetensors.torch import load_file, save_file

from ingot.export.ingot import Manifest
from ingot.export.progress import Stages
from ingot.graphs.checkpoint import Checkpoint
from ingot.graphs.family import family_of, find_family
from ingot.graphs.preset import preset_config, write_checkpoint
from ingot.validate.truth.cache import Cache, Recording
from ingot.validate.truth.eager import EagerSession
from ingot.validate.truth.inputs import Inputs, Plan, make_inputs
from ingot.validate.truth.recording import Layout, all_router_logits, main_run, places, record
from ingot.validate.truth.reference import Reference, References
from ingot.validate.truth.replay import choices

# Minutes of tracing; `make test-slow` runs them, and so does CI.
pytestmark = pytest.mark.slow

# Of each family, with all of its tasks.
TASKS = [(family, task) for family in KINDS for task in find_family(family).tasks]
SHORT = Plan(decode=3)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """``get(family, task)``: a tiny seeded one of two layers; read only."""
    made: dict[tuple[str, str], Path] = {}

    def get(family: str, task: str = "generate") -> Path:
        head = "generate" if task == "features" else task
        if (family, head) not in made:
            folder = tmp_path_factory.mktemp(family)
            found = find_family(family)
            write_checkpoint(folder, found, preset_config(found, "tiny"), task=head, seed=3)
            made[family, head] = folder
        return made[family, head]

    return get


Checkpoints = Callable[[str, str], Path]


def layout_of(reference: Reference) -> Layout:
    """As of an ingot's manifest, without an export."""
    model: Any = family_of(reference.checkpoint).build(reference.checkpoint.config, reference.task)
    shape = ("batch", "labels") if reference.task == "classify" else ("batch", "sequence", 1)
    main = SimpleNamespace(name=model.main_output, shape=shape)
    manifest: Any = SimpleNamespace(main_output=main.name, states=model.states, outputs=[main])
    return Layout(manifest, reference.states)


def inputs_of(reference: Reference, seed: int = 0, plan: Plan = SHORT) -> Inputs:
    return make_inputs(
        512, seed, plan, chunk_size=reference.chunk_size, stateful=bool(reference.states)
    )


def recorded(reference: Reference, inputs: Inputs | None = None) -> References:
    return reference.record(layout_of(reference), [inputs or inputs_of(reference)], Stages())[0]


def assert_same(one: Recording, other: Recording) -> None:
    """Names and their order, shapes, dtypes and bits."""
    assert [list(call) for call in one] == [list(call) for call in other]
    for call, same in zip(one, other, strict=True):
        for name, array in call.items():
            assert (array.dtype, array.shape) == (same[name].dtype, same[name].shape), name
            assert array.tobytes() == same[name].tobytes(), name


def forbid(*_arguments: Any, **_options: Any) -> NoReturn:
    raise AssertionError("eager PyTorch was run")


# --- what is kept


@pytest.mark.parametrize(
    ("family", "task", "precision"),
    [
        ("olmoe", "generate", "float32"),
        ("olmoe", "features", "float16"),
        ("mamba2", "generate", "bfloat16"),
        ("jetmoe", "classify", "float32"),
    ],
)
def test_gives_back_what_was_computed_to_the_bit(
    checkpoints: Checkpoints,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    task: str,
    precision: str,
) -> None:
    def reference(cache: Cache | None) -> Reference:
        checkpoint = Checkpoint.open(checkpoints(family, task))
        return Reference(checkpoint, task, precision, cache)

    computed = recorded(reference(None))
    stored = recorded(reference(Cache(tmp_path)))
    monkeypatch.setattr("ingot.validate.truth.reference.Layerwise", forbid)
    kept = recorded(reference(Cache(tmp_path)))
    for found in (stored, kept):
        assert_same(found.truth, computed.truth)
        assert_same(found.eager, computed.eager)
        assert found.expected is found.truth
    names = {name.partition(".")[0] for name in computed.truth[0]}
    assert "hidden_states" in names
    assert ("router_logits" in names) == (family != "mamba2")
    truth = {array.dtype for call in kept.truth for array in call.values()}
    assert truth == {np.dtype(np.float64 if precision == "float32" else np.float32)}
    assert {array.dtype for call in kept.eager for array in call.values()} == {np.dtype(np.float32)}
    # The reference without a cache has nothing else to take it from.
    with pytest.raises(AssertionError, match="eager PyTorch was run"):
        recorded(reference(None))


def test_keeps_tensors_of_no_tokens(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = Reference(Checkpoint.open(checkpoints("olmoe", "generate")), "generate")
    inputs = inputs_of(reference)
    mask = inputs.attention_mask.copy()
    mask[:, -2] = 0
    nothing = replace(inputs, attention_mask=mask)
    computed = recorded(reference, nothing)
    assert {len(array) for array in computed.truth[-2].values()} == {0}
    reference.cache = Cache(tmp_path)
    recorded(reference, nothing)
    again = Reference(reference.checkpoint, "generate", cache=reference.cache)
    monkeypatch.setattr("ingot.validate.truth.reference.Layerwise", forbid)
    assert_same(recorded(again, nothing).truth, computed.truth)


def test_each_thing_it_depends_on_has_a_truth_of_its_own(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, cache = checkpoints("olmoe", "generate"), Cache(tmp_path / "cache")

    def new(
        folder: Path = folder,
        task: str = "generate",
        precision: str = "float32",
        **changes: Any,
    ) -> int:
        """How many recordings this adds."""
        before = set(cache.folder.glob("*.safetensors"))
        reference = Reference(Checkpoint.open(folder), task, precision, cache)
        inputs = make_inputs(512, changes.pop("seed", 0), changes.pop("plan", SHORT))
        recorded(reference, replace(inputs, **changes))
        return len(set(cache.folder.glob("*.safetensors")) - before)

    usual = make_inputs(512, 0, SHORT)
    # The truth, eager under its experts, and its noise.
    assert new() == 3
    assert new() == 0
    assert new(seed=1) == 3
    assert new(plan=Plan(decode=4)) == 3
    # The same ids, of which the first call has two more.
    assert new(prefill=usual.prefill + 2) == 3
    assert new(attention_mask=np.ones_like(usual.attention_mask)) == 3
    assert new(stateful=False) == 3
    # float32 of itself is not float32 under the experts of float64.
    assert new(precision="float16") == 3
    # Of bfloat16 the truth is that of float16.
    assert new(precision="bfloat16") == 2
    assert new(task="features") == 3
    assert new(folder=_changed(folder, tmp_path / "weights")) == 3
    for name, value in (("code_digest", lambda: "x"), ("torch.__version__", "9")):
        with monkeypatch.context() as patch:
            patch.setattr(f"ingot.validate.truth.reference.{name}", value)
            assert new() == 3
    assert new() == 0


def _changed(folder: Path, out: Path) -> Path:
    """A copy with one element of one weight changed."""
    out.mkdir()
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][5] *= 1.5
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text((folder / "config.json").read_text())
    return out


# --- the hash


@pytest.mark.parametrize(("family", "task"), TASKS)
def test_the_hash_is_what_an_export_writes(
    checkpoints: Checkpoints,
    make_ingot: MakeIngot,
    family: str,
    task: str,
) -> None:
    folder = checkpoints(family, task)
    written = Manifest.read(make_ingot(folder, "onnx", task=task)).source["sha256"]
    assert Reference(Checkpoint.open(folder), task).hash(Stages()) == written
    # Whatever was read before, and in whatever order.
    loaded = Reference(Checkpoint.open(folder), task)
    loaded.session(torch.float32, Stages())
    assert loaded.hash(Stages()) == written


def test_the_hash_reads_each_weight_once(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, stages = checkpoints("olmoe", "generate"), Stages()
    reference = Reference(Checkpoint.open(folder), "generate")
    found = reference.hash(stages)
    assert (reference.hash(stages), len(found)) == (found, 64)
    assert [stage.name for stage in stages.finished] == ["hash checkpoint"]
    loaded = Reference(Checkpoint.open(folder), "generate")
    loaded.session(torch.float64, stages)
    assert loaded.hash(stages) == found
    assert [stage.name for stage in stages.finished][1:] == ["load eager float64"]
    # And adds them up once, however many recordings are named by it.
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "digest", None)
        assert reference.hash(stages) == found
    changed = Checkpoint.open(_changed(folder, tmp_path / "changed"))
    assert Reference(changed, "generate").hash(stages) != found


# --- the truth's experts


@pytest.fixture
def near(checkpoints: Checkpoints, tmp_path: Path) -> Checkpoint:
    """A router with two experts that half precision can hardly tell apart."""
    folder = checkpoints("olmoe", "generate")
    weights = load_file(folder / "model.safetensors")
    router = weights["model.layers.0.mlp.gate.weight"]
    router[6] = router[1] * (1 + 2.0**-13)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    return Checkpoint.open(tmp_path)


def _error(truth: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Of each token."""
    return np.asarray(np.abs(found - truth).max(-1) / np.abs(truth).max(-1))


def test_eager_uses_the_truths_experts(near: Checkpoint) -> None:
    reference = Reference(near, "generate", "float16")
    layout, inputs = layout_of(reference), inputs_of(reference, plan=Plan(prefill=61, decode=8))
    found = reference.record(layout, [inputs], Stages())[0]
    session = EagerSession(near, "generate", precision=torch.float16)
    free = record(session, layout, inputs)
    # By row, where the first token lies whose experts rounding changed.
    first = [10**9] * len(inputs.input_ids)
    flips = 0
    top_k = reference.routers.top_k
    for number, call in enumerate(main_run(inputs)):
        truth, eager, own = found.truth[number], found.eager[number], free[number]
        differ = [
            (choices(want, top_k) != choices(got, top_k)).any(-1)
            for want, got in zip(all_router_logits(truth), all_router_logits(own), strict=True)
        ]
        at = places(inputs, call)
        for row, position in at[differ[0] | differ[1]]:
            first[row] = min(first[row], position)
        kept = np.array([position < first[row] for row, position in at])
        for name, array in eager.items():
            error = np.abs(array[kept] - own[name][kept])
            # Other sums beside it, in the batches of its experts.
            assert error.max(initial=0.0) <= 2e-3 * np.abs(own[name]).max(), name
        # What the first router turned shows behind its layer, and replayed it is rounding alone.
        flipped, behind = differ[0], "hidden_states.1"
        flips += int(flipped.sum())
        assert (_error(truth[behind], eager[behind]) < 0.004).all()
        assert (_error(truth[behind], own[behind])[flipped] > 0.01).all()
    assert flips > 0
    # Nothing is forced on the truth, nor on whoever runs the session next.
    exact = EagerSession(near, "generate", precision=torch.float32)
    assert_same(record(exact, layout, inputs), found.truth)
    used = reference.session(torch.float16, Stages())
    assert_same(record(used, layout, inputs), free)
