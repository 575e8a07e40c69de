"""Numbers chosen on a calibration, against plain loops over the eager graph."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import MakeCheckpoint, MakeIngot
from oracle import relative_rms, tokens
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from torch import nn

from ingot.export.calibration import choose as choose_module
from ingot.export.calibration import effects as effects_module
from ingot.export.calibration.choose import choose
from ingot.export.calibration.effects import effects
from ingot.export.calibration.moments import Moments
from ingot.export.calibration.products import Products
from ingot.export.calibration.scan import scan
from ingot.export.calibration.tables import table_moments
from ingot.export.calibration.tokens import MOST, Calibration, read_calibration
from ingot.export.calibration.walk import Walk
from ingot.export.codecs.blocks import Blocks, Encoded, Floats
from ingot.export.codecs.coder import Coder, Nearest
from ingot.export.codecs.prepared import Prepared
from ingot.export.graph import Opened, Recipe
from ingot.export.ingot import Manifest
from ingot.export.request import ExportError
from ingot.graphs.checkpoint import Checkpoint, load_parameters, stack_height
from ingot.graphs.family import family_of
from ingot.graphs.layers import Model
from ingot.plugins.mamba2_scan import mamba2_scan
from ingot.runtime.loading import load

FAMILIES = ("granite", "jetmoe", "mamba2", "olmoe")
ROUTERS = ("gate.weight", "router.layer.weight")


def opened(checkpoint: Path) -> Opened:
    return Recipe("ort", "generate", "float32", weights="int4").open(Checkpoint.open(checkpoint))


def eager(checkpoint: Path) -> Model:
    """The whole model, its weights loaded."""
    found = Checkpoint.open(checkpoint)
    family = family_of(found)
    model = family.build(found.config, "generate", torch.float32, found.entries)
    load_parameters(model, found, family.weight_map(model, found, "generate"))
    return model


def run(model: Model, ids: np.ndarray) -> torch.Tensor:
    """Log-probabilities ``[B, T, V]``."""
    given = torch.from_numpy(ids)
    mask = torch.ones_like(given)
    past = tuple(torch.zeros(state.shape(len(ids), 0)) for state in model.states)
    with torch.inference_mode():
        logits: torch.Tensor = model(given, mask, mask.cumsum(-1) - 1, past).main
    return logits.double().log_softmax(-1)


def quantised(model: Model) -> list[str]:
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and "conv1d" not in name and not name.endswith(ROUTERS)
    ]


def store(model: Model, names: list[str], coder: Coder) -> None:
    """Put what is stored of some parameters in their place."""
    for name in names:
        parameter, blocks = model.get_parameter(name).data, coder.format(name)
        assert blocks is not None
        stack = stack_height(tuple(parameter.shape)) > 1
        for expert, matrix in enumerate(parameter if stack else parameter[None]):
            encoded = coder.encode(name, expert, matrix.numpy())
            matrix.copy_(torch.from_numpy(blocks.decode(encoded, matrix.shape[1])))


def sequences(count: int = 6, length: int = 32, vocab_size: int = 512) -> np.ndarray:
    return np.random.default_rng(5).integers(0, vocab_size, (count, length))


def seen_by_hooks(model: Model, ids: np.ndarray) -> dict[str, np.ndarray]:
    """``sum(x x^T)`` of every linear layer, in float64."""
    sums: dict[str, np.ndarray] = {}

    def hook(name: str, x: torch.Tensor) -> None:
        rows = x.flatten(0, -2).double().numpy()
        sums[name] = sums.get(name, 0) + rows.T @ rows

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda _module, given, name=name: hook(f"{name}.weight", given[0])
            )
    run(model, ids)
    return sums


@pytest.mark.parametrize("family", FAMILIES)
def test_sees_the_inputs_of_every_linear_layer(
    family: str, make_checkpoint: MakeCheckpoint
) -> None:
    model, ids, moments = eager(make_checkpoint(family)), sequences(), Moments()
    with Products(model, moments.see):
        run(model, ids)
    expected = seen_by_hooks(model, ids)
    assert expected
    for name, sums in expected.items():
        np.testing.assert_allclose(
            moments.of(name).numpy(), sums, rtol=1e-4, atol=1e-4 * sums.max()
        )
    stacks = {n for n, p in model.named_parameters() if stack_height(tuple(p.shape)) > 1}
    # Of the head the weight alone is a module's.
    assert set(moments.names()) == set(expected) | stacks | {model.head_table}


def test_sees_the_inputs_of_every_expert(make_checkpoint: MakeCheckpoint) -> None:
    """Against a loop over tokens, in float64."""
    model, ids, moments = eager(make_checkpoint("olmoe")), sequences(2, 16), Moments()
    block = model.get_submodule("model.layers.1.mlp")
    given: list[torch.Tensor] = []
    block.register_forward_pre_hook(lambda _module, args: given.append(args[0]))
    with Products(model, moments.see) as products:
        run(model, ids)
    rows = given[0].flatten(0, 1).double().numpy()
    gate, up_gate, down = (
        model.get_parameter(f"model.layers.1.mlp.{name}").detach().double().numpy()
        for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj")
    )
    into, between = np.zeros((8, 64, 64)), np.zeros((8, 32, 32))
    for x in rows:
        logits = gate @ x
        shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        for expert in np.argsort(-logits)[:2]:
            into[expert] += np.outer(x, x)
            both = up_gate[expert] @ x
            inner = both[:32] / (1 + np.exp(-both[:32])) * both[32:] * shares[expert]
            between[expert] += np.outer(inner, inner)
    name = "model.layers.1.mlp.experts."
    for leaf, expected in (("gate_up_proj", into), ("down_proj", between)):
        for expert in range(8):
            found = moments._sums.get((name + leaf, expert))
            if found is None:
                assert not expected[expert].any()
            else:
                largest = expected[expert].max()
                np.testing.assert_allclose(found, expected[expert], rtol=1e-4, atol=1e-5 * largest)
    assert (name + "gate_up_proj", name + "down_proj") in products.together
    assert len(down) == 8


def test_an_expert_that_saw_little_is_given_the_mean_of_its_stack() -> None:
    random = np.random.default_rng(0)
    moments, often = Moments(), random.standard_normal((400, 8)).astype(np.float32)
    moments.see("w", 0, torch.from_numpy(often))
    once = random.standard_normal((1, 8)).astype(np.float32)
    moments.see("w", 1, torch.from_numpy(once))
    mean = (often.T @ often + once.T @ once) / 401
    np.testing.assert_allclose(moments.of("w", 2).numpy(), mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        moments.of("w", 1).numpy(), once.T @ once + 2 * mean, rtol=1e-4, atol=1e-5
    )
    with pytest.raises(KeyError):
        moments.of("v")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_walk_gives_what_the_whole_model_gives(
    family: str, make_checkpoint: MakeCheckpoint
) -> None:
    checkpoint = make_checkpoint(family)
    walk, ids = Walk(opened(checkpoint)), sequences()
    with torch.inference_mode():
        walk.load(walk.tables)
        batches = list(walk.begin(ids))
        for number in range(len(walk.layers)):
            walk.load(walk.names(number))
            for batch in batches:
                batch.x, _ = walk.through(number, batch)
            walk.unload(walk.names(number))
        walk.load([walk.head])
        found = torch.cat([walk.logits(batch.x) for batch in batches]).log_softmax(-1)
    expected = run(eager(checkpoint), ids)
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=0, atol=2e-4)
    meta = [p.is_meta for name in walk.names(0) for p in [walk.model.get_parameter(name)]]
    assert all(meta)


@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_effects_are_those_of_one_weight_at_a_time(
    family: str, some: bool, make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against whole models with one weight rounded, all of them to the nearest number.

    Of fewer tokens too where that would be too much, and a few logits at a time.
    """
    nearest, fed = Nearest(Blocks(4, 32)), slice(None)
    if some:
        # Of each of the six sequences eight tokens.
        for name, value in (("MOST_PRODUCTS", 0), ("LEAST_TOKENS", 48), ("AT_ONCE", 7 * 512)):
            monkeypatch.setattr(effects_module, name, value)
        fed = slice(8)

    def plain(blocks: Blocks, rows: Floats, _moments: torch.Tensor) -> Encoded:
        return blocks.encode(rows)

    monkeypatch.setitem(choose_module.METHODS, "importance", plain)
    checkpoint, ids = make_checkpoint(family), sequences()
    found = effects(opened(checkpoint), [Blocks(4, 32)], "importance", ids)
    expected = run(eager(checkpoint), ids)
    assert sorted(name for group in found for name in group) == sorted(quantised(eager(checkpoint)))
    for group, (effect,) in ((group, each.values()) for group, each in found.items()):
        model = eager(checkpoint)
        store(model, list(group), nearest)
        divergences = (expected.exp() * (expected - run(model, ids))).sum(-1)
        divergence = divergences[:, fed].mean()
        assert effect == pytest.approx(float(divergence), rel=0.02, abs=1e-7), group


def test_effects_in_other_formats_follow_from_the_measured_one(
    trained: Callable[[str], Path], trained_text: str
) -> None:
    """Against their own measurements, of a model whose small changes have small effects."""
    checkpoint = trained("mamba2")
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    ids = np.array(tokenizer.encode(trained_text).ids)[:2048].reshape(-1, 128)
    formats = (Blocks(4, 128), Blocks(4, 32), Blocks(8, 64))
    found = effects(opened(checkpoint), formats, "gptq", ids)
    measured = {each: effects(opened(checkpoint), [each], "gptq", ids) for each in formats[1:]}
    for group, each in found.items():
        assert list(each) == list(formats)
        for blocks in formats[1:]:
            own = measured[blocks][group][blocks]
            assert each[blocks] == pytest.approx(own, rel=0.2), (group, blocks)
        # The bits are worth far more than the blocks.
        assert each[Blocks(8, 64)] < 0.02 * each[Blocks(4, 32)] < 0.02 * each[Blocks(4, 128)]


@pytest.mark.parametrize("family", ["olmoe", "granite"])
def test_some_rows_and_experts_stand_for_all(
    family: str, make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, ids = make_checkpoint(family), sequences(8)
    formats = (Blocks(4, 64), Blocks(4, 32))
    whole = effects(opened(checkpoint), formats, "importance", ids)
    monkeypatch.setattr(effects_module, "ROWS", 16)
    monkeypatch.setattr(effects_module, "EXPERTS", 3)
    some = effects(opened(checkpoint), formats, "importance", ids)
    for group, (measured, other) in ((group, each.values()) for group, each in whole.items()):
        assert list(some[group].values()) == pytest.approx([measured, other], rel=0.25), group
        assert other < measured
    assert some != whole


@pytest.mark.parametrize("family", FAMILIES)
def test_chosen_numbers_diverge_less_than_nearest_ones(
    family: str, make_checkpoint: MakeCheckpoint
) -> None:
    checkpoint, nearest = make_checkpoint(family), Nearest(Blocks(4, 32))
    tables = Walk(opened(checkpoint)).tables
    # Tables are no better for it, and hide the rest in so small a model.
    formats = Nearest(Blocks(4, 32), dict.fromkeys(tables, Blocks(8, 32)))
    coder = choose(opened(checkpoint), formats, "gptq", sequences(64))
    ids, divergence = sequences(4, 48)[:, ::-1].copy(), []
    expected = run(eager(checkpoint), ids)
    for each in (formats, coder):
        model = eager(checkpoint)
        store(model, quantised(model), each)
        divergence.append(float((expected.exp() * (expected - run(model, ids))).sum(-1).mean()))
    # Random routers with other inputs choose other experts, whatever the numbers are.
    assert divergence[1] < (0.97 if family == "jetmoe" else 0.9) * divergence[0]
    assert coder.format("model.norm.weight") == nearest.format("model.norm.weight")


def test_prepared_numbers_are_handed_out_row_by_row() -> None:
    random = np.random.default_rng(2)
    format_ = Blocks(4, 32, symmetric=False)
    prepared = Prepared(Nearest(format_))
    given = {}
    for expert in range(3):
        rows = random.standard_normal((7, 70)).astype(np.float32)
        # Not what the nearest numbers would be.
        given[expert] = rows, format_.encode(rows * 2)
        prepared.add("w", expert, *given[expert])
    for expert, (rows, encoded) in given.items():
        order = random.permutation(7)
        found = prepared.encode("w", expert, rows[order])
        np.testing.assert_array_equal(found.data, encoded.data[order])
        np.testing.assert_array_equal(found.scales, encoded.scales[order])
        assert encoded.zero_points is not None and found.zero_points is not None
        np.testing.assert_array_equal(found.zero_points, encoded.zero_points[order])
    other = random.standard_normal((2, 32)).astype(np.float32)
    np.testing.assert_array_equal(prepared.encode("v", 0, other).data, format_.encode(other).data)
    assert prepared.format("w") == format_


# Of the others a change makes routers choose other experts, which no derivative knows of.
@pytest.mark.parametrize("family", ["granite", "mamba2"])
def test_moments_of_a_table_say_what_a_small_change_of_it_costs(
    family: str, make_checkpoint: MakeCheckpoint
) -> None:
    """The mean KL of a table with noise added is half of the noise's variance times their trace."""
    checkpoint, ids = make_checkpoint(family), sequences(64)
    moments = table_moments(opened(checkpoint), ids)
    np.testing.assert_allclose(moments.numpy(), moments.T.numpy(), rtol=0, atol=1e-3)
    model = eager(checkpoint)
    expected = run(model, ids)
    (name,) = Walk(opened(checkpoint)).tables
    table = model.get_parameter(name).data
    deviation = 1e-3 * float(table.std())
    noise = torch.from_numpy(np.random.default_rng(1).standard_normal(table.shape)).float()
    table += deviation * noise
    divergence = float((expected.exp() * (expected - run(model, ids))).sum(-1).mean())
    assert divergence == pytest.approx(0.5 * deviation**2 * float(moments.trace()), rel=0.1)


@pytest.mark.parametrize("family", ["granite", "mamba2"])
def test_a_table_that_is_chosen_diverges_less_than_the_nearest(
    family: str, make_checkpoint: MakeCheckpoint
) -> None:
    checkpoint = make_checkpoint(family)
    (table,) = Walk(opened(checkpoint)).tables
    formats, ids, divergence = Nearest(None, {table: Blocks(4, 32)}), sequences(4, 48), []
    expected = run(eager(checkpoint), ids)
    for coder in (formats, choose(opened(checkpoint), formats, "gptq", sequences(128))):
        model = eager(checkpoint)
        store(model, [table], coder)
        divergence.append(float((expected.exp() * (expected - run(model, ids))).sum(-1).mean()))
    assert divergence[1] < 0.85 * divergence[0]


@pytest.mark.parametrize("length", [1, 32, 75])
def test_the_scan_that_is_differentiated_is_the_operator(length: int) -> None:
    random = torch.Generator().manual_seed(length)
    batch, heads, size, groups, states = 2, 6, 8, 3, 5

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random)

    mask = torch.ones(batch, length)
    mask[1, : length // 3] = 0
    given = (
        drawn(batch, length, heads, size),
        drawn(batch, length, heads),
        -drawn(heads).exp(),
        drawn(batch, length, groups, states),
        drawn(batch, length, groups, states),
        drawn(heads),
        drawn(heads),
        drawn(batch, heads, size, states),
        mask,
    )
    expected = mamba2_scan.eager(*given, 8, 0.0, float("inf"))
    for own, other in zip(scan(*given, 8, 0.0, float("inf")), expected, strict=True):
        np.testing.assert_allclose(own.numpy(), other.numpy(), rtol=0, atol=2e-4)


def calibration(path: Path, tokenizer: str | None = None) -> Calibration:
    return read_calibration(path, 512, 64, lambda name: path.parent / name, tokenizer)


def test_reads_token_ids_of_three_kinds_of_file(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 512, 700)
    (tmp_path / "a.json").write_text(json.dumps([ids[:300].tolist(), [ids[300:].tolist()]]))
    np.save(tmp_path / "a.npy", ids.reshape(7, 100).astype(np.int32))
    save_file({"ids": ids.astype(np.uint16)}, tmp_path / "a.safetensors")
    for path in sorted(tmp_path.iterdir()):
        found = calibration(path)
        np.testing.assert_array_equal(found.sequences, ids[:640].reshape(10, 64))
        assert found.tokens == 640
        assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    np.save(tmp_path / "long.npy", np.zeros(2 * MOST, np.int64))
    assert calibration(tmp_path / "long.npy").tokens == MOST


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"[1, 2]", "has 2 tokens; give at least 256"),
        ("a.json", b'[1, "x"]', "holds no array of token ids"),
        ("a.json", b"[1", "holds no array of token ids"),
        ("a.json", json.dumps([1.5] * 300).encode(), "holds no array of token ids"),
        ("a.json", json.dumps([600] * 300).encode(), "the token id 600, and the model's are 0 to"),
        ("a.json", json.dumps([-1] * 300).encode(), "the token id -1"),
        ("a.npy", b"\x93NUMPY", "holds no array of token ids"),
        ("a.safetensors", b"x", "holds no array of token ids"),
        ("a.txt", b"a text", "the checkpoint has no tokenizer; give token ids"),
        ("b.txt", None, "cannot be read"),
    ],
)
def test_refuses_what_is_no_calibration(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ExportError, match=message):
        calibration(tmp_path / name)


def test_reads_a_text_by_the_tokenizer(tmp_path: Path) -> None:
    from tokenizers import models, pre_tokenizers

    words = {word: number for number, word in enumerate(["<unk>", "to", "be", "or", "not"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    (tmp_path / "a.txt").write_text("to be or not to be\n" * 100, encoding="utf-8")
    expected = np.array([1, 2, 3, 4, 1, 2] * 100)[: 600 // 64 * 64].reshape(-1, 64)
    np.testing.assert_array_equal(
        calibration(tmp_path / "a.txt", tokenizer.to_str()).sequences, expected
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    np.testing.assert_array_equal(calibration(tmp_path / "a.txt").sequences, expected)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe" * 1000)
    with pytest.raises(ExportError, match="is no text in UTF-8"):
        calibration(tmp_path / "a.txt")


@pytest.mark.parametrize(
    "family",
    [
        "olmoe",
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("granite", "jetmoe", "mamba2")),
    ],
)
def test_an_ingot_has_the_numbers_that_were_chosen(
    family: str, make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot, tmp_path: Path
) -> None:
    """Its logits are those of the eager model over them; and a second export is equal in bytes."""
    checkpoint, file = make_checkpoint(family), tmp_path / "ids.npy"
    np.save(file, sequences(16))
    request = {
        "weights": "int4",
        "block": 32,
        "accuracy": "exact",
        "calibration": file,
        "bits": 6.0,
    }
    ingots = [make_ingot(checkpoint, "ort", **request) for _ in range(2)]
    for name in ("weights.safetensors", "model.onnx", "ingot.json"):
        assert (ingots[0] / name).read_bytes() == (ingots[1] / name).read_bytes(), name
    said = Manifest.read(ingots[0]).quantization
    assert said is not None and said.method == "gptq" and said.block == 32
    assert said.calibration["tokens"] == 512 and said.calibration["budget"] == 6.0
    assert set(said.bits.values()) == {8} and len(said.bits) < len(said.calibration["effects"])
    values = list(said.calibration["effects"].values())
    assert values == sorted(values, reverse=True) and values[-1] >= 0

    formats = Nearest(Blocks(4, 32), dict.fromkeys(said.bits, Blocks(8, 32)))
    given = read_calibration(file, 512, 512, lambda name: tmp_path / name, None)
    coder = choose(opened(checkpoint), formats, "gptq", given.sequences)
    model = eager(checkpoint)
    store(model, quantised(model), coder)
    ids, mask = tokens(512)
    session = load(ingots[0], allow_failed=True)
    session.reset(len(ids), ids.shape[1])
    found = np.asarray(session.step(ids, mask))
    for row, real in enumerate(mask):
        expected = run(model, ids[row : row + 1, real != 0])[0].numpy()
        own = F.log_softmax(torch.from_numpy(found[row, real != 0]).double(), -1).numpy()
        assert relative_rms(expected, own) < 1e-5


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"weights": "bf16", "calibration": "x.txt"}, "--calibration goes with --weights int8"),
        ({"weights": "int4", "bits": 4.5}, "--bits chooses by what the model computes"),
        ({"weights": "int4", "method": "gptq"}, "--method chooses by what the model computes"),
        ({"weights": "int4", "calibration": "none.txt"}, "--calibration .*none.txt is no file"),
        ({"weights": "int8", "calibration": "x.txt", "bits": 8.5}, "give --weights int4"),
        (
            {"weights": "int4", "calibration": "x.txt", "bits": 4.5, "task": "features"},
            "--task features has none",
        ),
        ({"weights": "int4", "calibration": "x.txt", "bits": float("nan")}, "must be a number"),
    ],
)
def test_refuses_options_that_do_not_go_together(
    request_: dict[str, object], message: str, tmp_path: Path, make_ingot: MakeIngot
) -> None:
    (tmp_path / "x.txt").write_text("x", encoding="utf-8")
    if "calibration" in request_:
        request_ = {**request_, "calibration": tmp_path / str(request_["calibration"])}
    with pytest.raises(ExportError, match=message):
        make_ingot(Path("olmoe"), "ort", preset="tiny", **request_)
