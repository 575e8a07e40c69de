"""Ingots that earlier versions wrote: opened, and run to the numbers they had."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner

from ingot.export.cli import main
from ingot.export.ingot import SCHEMA_VERSION, Manifest
from ingot.runtime.generate import generate
from ingot.runtime.loading import load

DATA = Path(__file__).parent / "data"
INGOTS = sorted(path.parent for path in DATA.glob("schema*/*/ingot.json"))
NAMED = pytest.mark.parametrize("folder", INGOTS, ids=lambda folder: folder.name)


def _case(folder: Path) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Token ids ``[1, T]``, and the logits of each, or of the whole ``[1, labels]``."""
    case = json.loads(folder.with_suffix(".json").read_text())
    return np.array([case["input_ids"]]), np.array(case["logits"])


def test_there_is_an_ingot_of_every_schema() -> None:
    schemas = {
        json.loads((folder / "ingot.json").read_text())["schema_version"] for folder in INGOTS
    }
    assert schemas == set(range(1, SCHEMA_VERSION + 1))
    assert len(INGOTS) >= 4


@NAMED
def test_gives_the_numbers_it_had(folder: Path) -> None:
    ids, expected = _case(folder)
    session = load(folder)
    limit = 5e-3 if session.manifest.precision == "float16" else 5e-6
    session.reset(1, ids.shape[1])
    if session.manifest.task == "classify":
        found = session.step(ids, np.ones_like(ids))
    else:
        pieces = [slice(0, 4), *(slice(at, at + 1) for at in range(4, ids.shape[1]))]
        found = np.concatenate(
            [session.step(ids[:, piece], np.ones_like(ids[:, piece])) for piece in pieces], axis=1
        )[0]
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < limit * np.abs(expected).max()


@NAMED
def test_is_whole_and_can_be_inspected(folder: Path) -> None:
    manifest = Manifest.read(folder)
    manifest.check_files(folder)
    assert manifest.verdict == "passed"
    result = CliRunner().invoke(main, ["inspect", str(folder)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert manifest.model_type in result.output


@NAMED
def test_generates_greedily_what_its_logits_say(folder: Path) -> None:
    ids, expected = _case(folder)
    session = load(folder)
    if session.manifest.task != "generate":
        return
    (first, *_) = generate(session, ids.tolist(), max_new_tokens=1)
    assert list(first) == [int(expected[-1].argmax())]
