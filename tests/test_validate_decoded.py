"""The truth's weights where an ingot has blocks: what the codec makes of the checkpoint's."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from conftest import MakeCheckpoint, MakeIngot
from oracle import KEPT
from proof import stored
from safetensors.torch import load_file

from ingot.export.codecs.blocks import Blocks
from ingot.export.ingot import Manifest
from ingot.graphs.checkpoint import Checkpoint
from ingot.plugins.errors import IngotError
from ingot.validate.truth import decoded
from ingot.validate.truth.reference import Reference
from ingot.validate.truth.stored import StoredCheckpoint

FAMILIES = ("granite", "jetmoe", "mamba2", "olmoe")
# No block fills a row, nor an expert's rows.
UNEVEN = {"hidden_size": 72, "intermediate_size": 50, "vocab_size": 251}
Quantised = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="module")
def quantised(make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot) -> Quantised:
    """A checkpoint and its ingot in whole numbers, made once; read only."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(
        family: str, config: dict[str, Any] | None = None, **request: Any
    ) -> tuple[Path, Path]:
        key = f"{family} {config} {request}"
        if key not in made:
            checkpoint = make_checkpoint(family, **(config or {}))
            asked = {"weights": "int4", "accuracy": "exact", **request}
            made[key] = checkpoint, make_ingot(checkpoint, "ort", **asked)
        return made[key]

    return make


def reference(checkpoint: Path, ingot: Path) -> Reference:
    return Reference.of_ingot(ingot, Manifest.read(ingot), Checkpoint.open(checkpoint))


def stored_checkpoint(checkpoint: Path, ingot: Path) -> StoredCheckpoint:
    found = reference(checkpoint, ingot)._weights
    assert isinstance(found, StoredCheckpoint)
    return found


@pytest.mark.parametrize(
    ("bits", "size", "symmetric", "uneven"),
    [(4, 32, True, False), (4, 64, False, True), (8, 32, False, True), (8, 128, True, False)],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_read_as_it_is_stored(
    family: str,
    bits: Literal[4, 8],
    size: Literal[32, 64, 128],
    symmetric: bool,
    uneven: bool,
    quantised: Quantised,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A few rows at a time.
    monkeypatch.setattr(decoded, "AT_ONCE", 1000)
    config = {} if not uneven or family == "mamba2" else UNEVEN
    request = {"weights": f"int{bits}", "block": size, "symmetric": symmetric}
    checkpoint, ingot = quantised(family, config, **request)
    read, blocks = stored_checkpoint(checkpoint, ingot), Blocks(bits, size, symmetric)
    assert read.decoded.blocks == dict.fromkeys(read.decoded.stored, size)
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        right = tensor
        if tensor.dim() > 1 and not name.endswith(KEPT):
            rows = tensor.numpy().reshape(-1, tensor.shape[-1])
            wide = blocks.decode(blocks.encode(rows), rows.shape[1])
            right = torch.from_numpy(np.array(wide)).reshape(tensor.shape)
            assert read.dtype(name) == torch.float32 and name in read.decoded.stored
        torch.testing.assert_close(read.read(name), right, rtol=0, atol=0)
        if tensor.dim() == 3 and tensor.shape[1] > 1:
            row = tensor.shape[0] - 1
            torch.testing.assert_close(read.read_row(name, row), right[row], rtol=0, atol=0)


def test_what_is_kept_of_one_format_is_not_taken_for_another(quantised: Quantised) -> None:
    keys = set()
    for request in (
        {},
        {"block": 64},
        {"symmetric": False},
        {"weights": "int8"},
    ):
        checkpoint, ingot = quantised("granite", **request)
        keys.add(stored_checkpoint(checkpoint, ingot).key)
    assert len(keys) == 4
    # Other kernels over the same numbers have the same truth.
    checkpoint, ingot = quantised("granite")
    _, fast = quantised("granite", accuracy="fast")
    assert stored_checkpoint(checkpoint, ingot).key == stored_checkpoint(checkpoint, fast).key
    assert stored_checkpoint(checkpoint, ingot).digest() == Checkpoint.digest(
        stored_checkpoint(checkpoint, ingot).base
    )


@pytest.mark.parametrize("ending", ["", ".scales"])
def test_one_bit_more_is_another_truth(ending: str, quantised: Quantised, tmp_path: Path) -> None:
    checkpoint, ingot = quantised("granite")
    other = Path(shutil.copytree(ingot, tmp_path / "other"))

    def one_bit(array: np.ndarray) -> None:
        array.reshape(-1).view(np.uint8)[40] ^= 1

    name = "model.layers.1.mlp.up_proj.weight"
    stored.weight(name + ending, one_bit)(other)
    right, wrong = (stored_checkpoint(checkpoint, each) for each in (ingot, other))
    assert right.key != wrong.key
    assert not torch.equal(right.read(name), wrong.read(name))


def test_refuses_numbers_that_are_not_what_the_graph_says(
    quantised: Quantised, tmp_path: Path
) -> None:
    checkpoint, ingot = quantised("granite")
    other = Path(shutil.copytree(ingot, tmp_path / "other"))

    def blocks_of_64(edit: Any) -> None:
        for each in edit.nodes("MatMulNBits")[0].attribute:
            if each.name == "block_size":
                each.i = 64

    stored.graph(blocks_of_64)(other)
    with pytest.raises(IngotError, match="cannot be decoded: its numbers are"):
        reference(checkpoint, other)
