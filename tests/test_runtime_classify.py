"""The classifier's command and function, against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import MakeIngot
from oracle import relative_rms
from transformers import JetMoeForSequenceClassification

from ingot.export.cli import export_command
from ingot.graphs.family import find_family
from ingot.graphs.preset import preset_config, write_checkpoint
from ingot.runtime.classify import classify, probabilities
from ingot.runtime.cli import classify_command
from ingot.runtime.loading import load
from ingot.runtime.session import SessionError

PROMPTS = [[11, 205, 7, 300, 42], [8, 99], [501, 3, 17, 250]]
NAMES = {"0": "no", "1": "yes", "2": "perhaps"}


def checkpoint(folder: Path, **config: Any) -> Path:
    folder.mkdir()
    family = find_family("jetmoe")
    merged = {**preset_config(family, "tiny"), **config}
    write_checkpoint(folder, family, merged, task="classify", seed=3)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("classifier") / "named", id2label=NAMES)


@pytest.fixture(scope="module")
def ingot(folder: Path, make_ingot: MakeIngot) -> Path:
    return make_ingot(folder, "ort", task="classify")


@torch.no_grad()
def expected(folder: Path) -> np.ndarray:
    model: Any = JetMoeForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    rows = [model(torch.tensor([prompt])).logits[0].numpy() for prompt in PROMPTS]
    return np.stack(rows)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(classify_command, [str(argument) for argument in arguments])


def test_scores_prompts_of_different_length_as_transformers_does_each(
    folder: Path, ingot: Path
) -> None:
    found = classify(load(ingot), PROMPTS)
    assert found.shape == (3, 3)
    assert relative_rms(expected(folder), found) < 1e-4


def test_prints_a_line_for_each_prompt_likeliest_first(folder: Path, ingot: Path) -> None:
    prompts = [part for prompt in PROMPTS for part in ("--prompt-ids", ",".join(map(str, prompt)))]
    result = run(ingot, *prompts)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    scores = torch.softmax(torch.from_numpy(expected(folder)), -1).numpy()
    for line, row in zip(lines, scores, strict=True):
        words = line.split()
        order = np.argsort(-row)
        assert words[::2] == [NAMES[str(n)] for n in order]
        np.testing.assert_allclose([float(word) for word in words[1::2]], row[order], atol=1e-4)


def test_prints_the_number_of_a_regression(tmp_path: Path, make_ingot: MakeIngot) -> None:
    folder = checkpoint(tmp_path / "one", num_labels=1)
    ingot = make_ingot(folder, "onnx", task="classify")
    result = run(ingot, "--prompt-ids", "11,205,7,300,42")
    model: Any = JetMoeForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        score = model(torch.tensor(PROMPTS[:1])).logits.item()
    label, printed = result.stdout.split()
    assert label == "LABEL_0" and float(printed) == pytest.approx(score, abs=2e-4)


def test_probabilities_do_not_overflow() -> None:
    found = probabilities(np.array([[1e4, 0.0], [-1e4, -1e4]], dtype=np.float32))
    np.testing.assert_array_equal(found, [[1.0, 0.0], [0.5, 0.5]])


def test_refuses_an_ingot_of_another_task(tiny_ort: Path) -> None:
    with pytest.raises(SessionError, match=r"'generate' and cannot classify; .* --task classify"):
        classify(load(tiny_ort), PROMPTS)


def test_answers_a_mistake_with_one_line(ingot: Path) -> None:
    for arguments, named in (
        ([], "one of --prompt, --prompt-ids"),
        (["--prompt-ids", "1,512"], "token id 512"),
        (["--prompt", "text"], "tokenizer.json"),
        (["--prompt-ids", ",".join(["1"] * 513)], "context of 512"),
    ):
        result = run(ingot, *arguments)
        assert result.exit_code == 2
        assert result.stderr.startswith("error: ")
        assert named in result.stderr
        assert len(result.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_preset_makes_its_own_classifier(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--model", "jetmoe", "--preset", "tiny", "--task", "classify", "--out", str(out)]
    result = CliRunner().invoke(export_command, arguments)
    assert result.exit_code == 0, result.output
    manifest = json.loads((out / "ingot.json").read_text())
    assert manifest["validation"]["verdict"] == "passed"
    covered = manifest["validation"]["coverage"]
    assert covered["covered"] == covered["parts"] > 0
    # Nine lengths at least; and each with the truth's experts, where four routers and three hidden
    # states are compared as well.
    assert manifest["validation"]["stages"] > 9 + 9
    assert manifest["validation"]["compared"] > 9 + 9 * (1 + 4 + 3)
    assert manifest["states"] == []
    assert manifest["labels"] == ["LABEL_0", "LABEL_1"]
    # The model without its classifier's head is another checkpoint.
    assert (tmp_path / "checkpoints" / "jetmoe-tiny-seed0-classify").is_dir()


@pytest.mark.parametrize(
    "prompts", [[[1.0, 2.0]], [["1"]], [[True]], [1, 2], None, ["12"], [[2**63]], np.ones((1, 2))]
)
def test_refuses_prompts_that_are_no_token_ids(ingot: Path, prompts: Any) -> None:
    with pytest.raises(SessionError, match=r"token ids|in no vocabulary"):
        classify(load(ingot), prompts)


def test_scores_arrays_of_ids(ingot: Path) -> None:
    session = load(ingot)
    arrays = [np.array(prompt, np.int32) for prompt in PROMPTS]
    np.testing.assert_array_equal(classify(session, arrays), classify(session, PROMPTS))
