"""The table of weights in fewer bits: what is fed, what is put side by side, and a whole run."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import MakeCheckpoint
from safetensors.numpy import save_file
from tokenizer_shapes import byte_level

from benchmarks import weights
from benchmarks.on_weights.figures import Scores
from benchmarks.on_weights.ingots import Format, at_the_bytes_of
from benchmarks.on_weights.table import OURS, THEIRS, Row, equal_bytes_table, kinds_table
from benchmarks.on_weights.text import windows_of
from benchmarks.pinned import FetchError, Package
from ingot.plugins.errors import IngotError

TEXT = "the quick brown fox jumps over the lazy dog, thrice; cafe au lait for 120 guests. " * 40


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    byte_level().save(str(path))
    return path


def test_windows_are_pieces_of_the_text_that_do_not_overlap(tokenizer: Path) -> None:
    text = "".join(f"{n} guests, " for n in range(300))
    ids = byte_level().encode(text).ids
    found = windows_of(text, tokenizer, 16, 5)
    assert found.shape == (5, 16)
    places = [next(i for i in range(len(ids)) if ids[i : i + 16] == row.tolist()) for row in found]
    assert places == sorted(places) and min(np.diff(places)) >= 16
    # Not the beginning alone.
    assert places[0] == 0 and places[-1] > len(ids) - 32


def test_refuses_a_text_without_an_error_of_its_mean(tokenizer: Path) -> None:
    with pytest.raises(IngotError, match="two windows of 512 are the least"):
        windows_of(TEXT[:600], tokenizer, 512, 8)


def scores(kl: list[float]) -> Scores:
    """Of one token a window."""
    by_window = np.array(kl)[:, None]
    return Scores(by_window, np.ones_like(by_window, bool), by_window)


def row(
    program: str, name: str, size: int, kl: list[float], exact: float = 1.0, **kinds: int
) -> Row:
    """Args:
    exact: how many times ``kl`` the divergence is with float32 activations.
    """
    both = scores(kl), scores([exact * value for value in kl])
    return Row(program, name, Path(name), size, size, *both, Counter(kinds))


def test_the_best_of_no_more_bytes_stands_beside_each_format() -> None:
    rows = [
        row(OURS, "large", 101, [0.0, 0.0]),
        row(OURS, "good", 90, [0.1, 0.3]),
        row(OURS, "small", 60, [0.4, 0.8], exact=0.5),
        row(THEIRS, "Q4_K_M", 100, [0.2, 0.5], Q4_K=80, Q6_K=20),
        row(THEIRS, "Q2_K", 50, [2.0, 3.0], Q2_K=50),
        row(THEIRS, "Q4_0", 65, [0.2, 0.5], Q4_0=65),
    ]
    lines = list(equal_bytes_table(rows))[2:]
    assert lines[2].split(" | ")[3:5] == ["small, exact", "60 (-7.7%)"]
    # Each window's difference is -0.1 and -0.2: their error is far below that of either mean.
    assert lines[0].split(" | ")[3:] == ["good", "90 (-10.0%)", "0.2 ± 0.1", "-0.15 ± 0.05 |"]
    assert "none is as small" in lines[1] and "Q2_K" in lines[1]
    assert list(kinds_table(rows))[2:] == [
        "| Q4_K_M | Q4_K 80.0%, Q6_K 20.0% |",
        "| Q2_K | Q2_K 100.0% |",
        "| Q4_0 | Q4_0 100.0% |",
    ]


def test_a_format_is_read_from_fields_of_an_export() -> None:
    said = "weights=int4 block=64 symmetric=false adapter=/somewhere/lora"
    found = Format.parse(said)
    assert found.name == "weights int4 block 64 symmetric false adapter lora"
    assert found.options == {
        "weights": "int4",
        "block": 64,
        "symmetric": False,
        "adapter": "/somewhere/lora",
    }
    assert found.exact is not None
    assert found.exact.options == {**found.options, "accuracy": "exact"}
    assert found.exact.exact is None and Format("bf16", {"weights": "bf16"}).exact is None
    assert Format.parse("calibration=a/b.txt").options == {"calibration": Path("a/b.txt")}
    with pytest.raises(IngotError, match="bloc is no field of an export"):
        Format.parse("weights=int4 bloc=64")


def test_a_budget_takes_all_bytes_that_it_may_and_no_more(tmp_path: Path) -> None:
    """Of 256 numbers of 4 bits, beside a norm of 64; what scales take is in the budget."""
    weights: dict[str, np.ndarray] = {
        "proj.weight": np.zeros((4, 2, 16), np.uint8),
        "proj.weight.scales": np.zeros((4, 2), np.float32),
        "proj.weight.zero_points": np.zeros((4, 1), np.uint8),
        "norm.weight": np.zeros(64, np.float32),
    }
    save_file(weights, tmp_path / "weights.safetensors")
    for size in (450, 467):
        found = at_the_bytes_of("Q4_K_M", size, tmp_path, Path("text"))
        assert found.name == "int4 at the bytes of Q4_K_M"
        taken = [(found.options["bits"] + more) * 256 / 8 + 64 * 4 for more in (0, 0.001)]
        assert taken[0] <= size < taken[1]


def test_another_file_than_was_pinned_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a-1.whl").write_bytes(b"pinned")
    known = hashlib.sha256(b"pinned").hexdigest()
    assert Package("a", "1", "a-1.whl", known).fetch(tmp_path) == tmp_path / "a-1.whl"
    (tmp_path / "a-1.whl").write_bytes(b"another")
    with pytest.raises(FetchError, match="in place of"):
        Package("a", "1", "a-1.whl", known).fetch(tmp_path)


def test_what_is_kept_is_of_these_weights_alone(tmp_path: Path) -> None:
    checkpoint = tmp_path / "olmoe"
    checkpoint.mkdir()
    found = []
    for value in (0.0, 1.0, 0.0):
        save_file({"w": np.array([value])}, checkpoint / "model.safetensors")
        found.append(weights.kept_as(checkpoint))
    assert found[0] == found[2] != found[1] and found[0].startswith("olmoe-")


@pytest.mark.slow
def test_fewer_bytes_are_further_from_transformers(
    make_checkpoint: MakeCheckpoint, tokenizer: Path, tmp_path: Path
) -> None:
    checkpoint, text, out = make_checkpoint("granite"), tmp_path / "text", tmp_path / "out.json"
    (checkpoint / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    text.write_text(TEXT)
    asked = ["--model", checkpoint, "--text", text, "--length", "24", "--windows", "3"]
    asked += ["--without-llama-cpp", "--work", tmp_path / "work", "--threads", "1", "--out", out]
    asked += ["--only", "fp32|bf16|64 asymmetric"]
    done = CliRunner().invoke(weights.main, [str(part) for part in asked])
    assert done.exit_code == 0, done.output
    (model,) = json.loads(out.read_text())["models"]
    found = {row["format"]: row for row in model["formats"]}
    order = ["fp32", "bf16", "int8 64 asymmetric", "int4 64 asymmetric"]
    assert sorted(found, key=lambda name: -found[name]["bytes"]) == order
    assert sorted(found, key=lambda name: found[name]["kl_exact"]) == order
    assert found["fp32"]["kl"] < 1e-9 and found["fp32"]["bits_per_weight"] == pytest.approx(
        32, 0.01
    )
    # Of float32 nothing is rounded, and of bfloat16 no activation.
    assert all(found[name]["kl"] == found[name]["kl_exact"] for name in order[:2])
    assert all(found[name]["kl"] != found[name]["kl_exact"] for name in order[2:])
