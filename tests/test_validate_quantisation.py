"""What storing the weights costs: the figures of transformers, and red for what is broken."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeCheckpoint, MakeIngot
from oracle import KEPT
from packed_cases import CASES
from proof import stored
from safetensors import safe_open
from traces import Traces
from transformers import AutoModelForCausalLM, AutoTokenizer

from ingot.export.codecs.blocks import Blocks
from ingot.export.ingot import WEIGHTS, Manifest
from ingot.export.progress import Stages
from ingot.graphs.checkpoint import Checkpoint
from ingot.graphs.merge import open_checkpoint
from ingot.plugins.cpu.library import CpuLibrary
from ingot.validate.distribution import Distribution
from ingot.validate.quantisation import Divergence, LayerError, Limits, Quantisation
from ingot.validate.report.words import headline
from ingot.validate.result import ROUNDED, Report
from ingot.validate.run import examine, validate_ingot
from ingot.validate.truth.inputs import QUICK
from ingot.validate.truth.reference import Reference

TEXT = np.random.default_rng(5).integers(0, 512, 90)


def validated(ingot: Path, checkpoint: Path, **options: Any) -> Report:
    opened = Checkpoint.open(checkpoint)
    reference = Reference.of_ingot(ingot, Manifest.read(ingot), opened)
    return validate_ingot(ingot, reference, plan=QUICK, **options)


def log_probabilities(checkpoint: Path, change: Callable[[torch.Tensor], Any] | None) -> Any:
    """Of transformers in float32 over the text ``[n, V]``, with its matrices changed."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if change is not None and parameter.dim() > 1 and not name.endswith(KEPT):
            rows = parameter.data.reshape(-1, parameter.shape[-1])
            parameter.data = change(rows).reshape(parameter.shape)
    with torch.inference_mode():
        return model(torch.from_numpy(TEXT)[None]).logits[0].double().log_softmax(-1)


def in_blocks(blocks: Blocks) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(rows: torch.Tensor) -> torch.Tensor:
        columns = rows.shape[1]
        return torch.from_numpy(blocks.decode(blocks.encode(rows.numpy()), columns).copy())

    return change


@pytest.fixture(scope="module")
def fast(tiny: Path, make_ingot: MakeIngot) -> Path:
    return make_ingot(tiny, "ort", weights="int4", accuracy="fast", symmetric=False)


@pytest.fixture(scope="module")
def report(fast: Path, tiny: Path) -> Report:
    return validated(fast, tiny, text=TEXT)


@pytest.mark.parametrize("weights", ["int4", "bf16"])
def test_a_text_costs_what_transformers_says(
    weights: str, tiny: Path, make_ingot: MakeIngot, request: pytest.FixtureRequest
) -> None:
    if weights == "int4":
        found = request.getfixturevalue("report").quantisation
        changed = log_probabilities(tiny, in_blocks(Blocks(4, 32, symmetric=False)))
    else:
        ingot = make_ingot(tiny, "ort", weights="bf16")
        found = validated(ingot, tiny, text=TEXT).quantisation
        changed = log_probabilities(tiny, lambda rows: rows.bfloat16().float())
    original = log_probabilities(tiny, None)
    kl = torch.nn.functional.kl_div(changed, original, log_target=True, reduction="none").sum(-1)
    text = found.text.found
    np.testing.assert_allclose(text.kl, np.sort(kl.numpy()), rtol=1e-3, atol=1e-9)
    agree = (original.argmax(-1) == changed.argmax(-1)).double().mean()
    assert text.top1_agreement == pytest.approx(float(agree), abs=1e-9)
    following = torch.from_numpy(TEXT[1:])[:, None]
    for side, perplexity in ((changed, text.perplexity), (original, text.truth_perplexity)):
        expected = (-side[:-1].gather(1, following)).mean().exp()
        assert perplexity == pytest.approx(float(expected), rel=1e-5)
    p = original.exp()
    knows = (p * (original - p.mean(0).log())).sum(-1).mean()
    assert found.text.information == pytest.approx(float(knows), rel=1e-4)


def test_a_right_ingot_passes_and_both_errors_are_told_apart(report: Report) -> None:
    assert (report.failures, report.verdict) == ([], "passed")
    found = report.quantisation
    assert found is not None and found.plain is not None and found.recorded is not None
    # Scales of least error cost less than the simplest.
    assert 0.4 < (found.times or math.nan) < 1
    assert [(each.layer, each.normed) for each in found.layers] == [
        *((-1, False), (0, False), (1, True))
    ]
    assert all(0.05 < each.error < (each.plain or 0) < 0.3 for each in found.layers)
    kinds = {(each.layer, each.kind, each.matrices) for each in found.weights}
    assert {(1, "mlp.experts.down_proj", 8), (None, "lm_head", 1)} <= kinds
    assert all(0.06 < each.error < (each.plain or 0) < 0.12 for each in found.weights)
    assert len(found.routing) == 2 and all(0.7 < share < 1 for share in found.routing)
    # The kernel's own figures are of another size, with its rounding and without.
    assert report.distribution is not None
    assert report.distribution.kl_mean < 0.1 * found.recorded.found.kl_mean
    exact = [each for each in report.worst.values() if not each.rounded]
    rounded = [each for each in report.worst.values() if each.rounded]
    assert len(exact) == len(rounded) == 5
    assert all((each.error or 1) < 1e-5 for each in exact)
    assert all((each.error or 1) > 1e-3 and (each.score or 9) < 1.5 for each in rounded)
    assert report.activations is not None and report.activations.twin


def test_nothing_is_said_where_nothing_is_lost(tiny: Path, tiny_ort: Path) -> None:
    assert validated(tiny_ort, tiny).quantisation is None


def doubled(ingot: Path, folder: Path, ending: str) -> Path:
    """A copy with twice the scales of some weight."""
    wrong = Path(shutil.copytree(ingot, folder / "wrong"))
    stored.weight(ending, lambda scales: 2 * scales)(wrong)
    return wrong


def test_a_weight_with_twice_its_scales_is_no_fault_of_a_kernel(
    fast: Path, tiny: Path, tmp_path: Path, traces: Traces
) -> None:
    wrong = doubled(fast, tmp_path, "layers.0.self_attn.o_proj.weight.scales")
    found = validated(wrong, tiny)
    (problem,) = found.failures
    assert found.failures == found.costly and found.verdict == "failed"
    assert problem.startswith("quantisation: int4 costs a median KL of ")
    assert "times what plain rounding to int4 costs" in problem
    assert "it begins at layer 0, whose hidden state is off by " in problem
    assert "computes what its weights say" in headline(found)
    # The place is not looked for: no node is wrong. That the scale is not right is seen as well.
    opened = Checkpoint.open(tiny)
    reference = Reference.of_ingot(wrong, Manifest.read(wrong), opened)
    whole = examine(wrong, reference, Stages(), plan=QUICK, capture=traces)
    assert problem in whole.failures
    assert any(each.startswith("weights: ") for each in whole.failures)


def test_the_user_may_accept_what_it_costs(fast: Path, tiny: Path, tmp_path: Path) -> None:
    wrong = doubled(fast, tmp_path, "layers.0.self_attn.o_proj.weight.scales")
    assert validated(wrong, tiny, max_kl=5.0).failures == []
    (problem,) = validated(fast, tiny, max_kl=1e-3).failures
    assert "the limit that was given is 0.001" in problem and "--max-kl" in problem


def test_a_checkpoints_own_numbers_cost_nothing(
    make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint("granite", num_hidden_layers=1, tie_word_embeddings=False)
    packed = CASES["gptq"](checkpoint, tmp_path).packed
    ingot = make_ingot(packed, "ort", weights="checkpoint", accuracy="exact")
    reference = Reference.of_ingot(ingot, Manifest.read(ingot), open_checkpoint(packed))
    found = validate_ingot(ingot, reference, plan=QUICK)
    assert found.failures == []
    assert found.quantisation is not None and found.quantisation.recorded is not None
    assert found.quantisation.recorded.found.kl_max == 0
    assert all(each.worst == 0 for each in found.quantisation.weights)


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["int4", "int8"])
@pytest.mark.parametrize("family", ["granite", "jetmoe", "mamba2", "olmoe"])
def test_limits_hold_of_trained_models_and_show_one_layer_with_twice_its_scales(
    family: str,
    weights: str,
    trained: Callable[[str], Path],
    make_ingot: MakeIngot,
    tmp_path: Path,
) -> None:
    checkpoint = trained(family)
    ingot = make_ingot(checkpoint, "ort", weights=weights, accuracy="fast")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    sample = (checkpoint.parent / "sample.txt").read_text()
    text = np.array(tokenizer(sample)["input_ids"][:512])
    right = validated(ingot, checkpoint, text=text)
    assert (right.verdict, right.failures) == ("passed", [])
    assert right.quantisation is not None and right.quantisation.text is not None
    assert right.quantisation.text.share < (0.02 if weights == "int4" else 2e-4)
    assert all((each.score or 9) < 2 for each in right.worst.values() if each.rounded)
    with safe_open(ingot / WEIGHTS, "np") as file:
        names = [name for name in file.keys() if ".1." in name and name.endswith(".scales")]  # noqa: SIM118
    wrong = Path(shutil.copytree(ingot, tmp_path / "wrong"))
    for name in names:
        stored.weight(name, lambda scales: 2 * scales)(wrong)
    found = validated(wrong, checkpoint)
    assert found.costly == found.failures and len(found.costly) >= 1


def distribution(kl: float, top1: float = 0.9) -> Distribution:
    return Distribution(100, (kl,) * 100, top1, 0)


def features(**changes: Any) -> Quantisation:
    """Of a model without logits."""
    return replace(costs(), recorded=None, plain=None, **changes)


def costs(kl: float = 0.1, plain: float = 0.1, **changes: Any) -> Quantisation:
    """In a model that knows two nats of the next token."""
    found = Quantisation(
        "int4",
        Limits(0.25, 1.5),
        Divergence(distribution(kl), 2.0),
        Divergence(distribution(plain), 2.0),
        layers=(LayerError(-1, False, 0.1, 0.1), LayerError(0, False, 0.2, 0.1)),
    )
    return replace(found, **changes)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (costs(), None),
        (costs(0.149), None),
        (costs(0.151), "1.51 times what plain rounding to int4 costs"),
        (costs(0.151, 0.11), None),
        (costs(0.151, limits=Limits(0.25, 1.5, max_kl=0.2)), None),
        (costs(0.151, limits=Limits(0.25, 1.5, max_kl=0.1)), "that was given is 0.1"),
        (costs(0.499, 0.5), None),
        (costs(0.501, 0.5), "the limit of int4 is 0.5, 25% of what the model knows"),
        (costs(math.nan), "costs KL nan nats"),
        # A text decides where there is one.
        (costs(0.501, 0.5, text=Divergence(distribution(0.1), 2.0)), None),
        (costs(text=Divergence(distribution(0.6), 2.0)), "nats over the given text"),
        # What is next to nothing is no fault, in nats or beside plain rounding.
        (costs(0.5, 0.5, limits=Limits(0.1, 1.5, nats=0.501)), None),
        (costs(0.5, 0.5, limits=Limits(0.1, 1.5, nats=0.499)), "the limit of int4 is 0.499; "),
        (costs(0.1, 0.01, limits=Limits(0.25, 1.5, negligible=0.101)), None),
        (costs(0.1, 0.01, limits=Limits(0.25, 1.5, negligible=0.099)), "10 times what plain"),
        (costs(plain=0.0), "inf times what plain rounding"),
        (costs(0.0, 0.0), None),
        (costs(recorded=Divergence(distribution(0.1, 0.2), 2.0)), "20.0% of the likeliest tokens"),
        (costs(recorded=Divergence(distribution(0.1, 0.45), 2.0)), None),
        (features(), "moves the last hidden state by 0.2 of its size"),
        (features(layers=()), None),
        (features(limits=Limits(0.25, 2.5)), None),
    ],
)
def test_says_what_is_beyond_its_limit(found: Quantisation, said: str | None) -> None:
    if said is None:
        assert found.problems == ()
    else:
        assert any(said in each for each in found.problems), found.problems
        assert not any(each.endswith(".") for each in found.problems)


def test_the_summary_is_strict_json_with_limits(report: Report) -> None:
    said = report.summary()
    text = json.dumps(said["quantisation"], allow_nan=False)
    found = json.loads(text)
    assert found["stored"] == "int4" and 0 < found["kl_mean"] < found["kl_limit"]
    assert found["plain_kl_mean"] > found["kl_mean"] and found["perplexity"] > 1
    assert said["activations"]["twin"] is True
    assert said["logits_error"] < 1e-5 < said["logits_rounded_error"]
    assert any(tensor.stage.endswith(ROUNDED) for tensor in report.tensors)


def test_of_bfloat16_with_rounded_activations_the_graph_is_held_to_float32(
    make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot, cpu_library: CpuLibrary
) -> None:
    checkpoint = make_checkpoint("olmoe", dtype=torch.bfloat16)
    asked = {"kernels": "ingot", "weights": "checkpoint", "accuracy": "fast"}
    ingot = make_ingot(checkpoint, "ort", **asked)
    found = validated(ingot, checkpoint)
    assert (found.verdict, found.failures) == ("passed", [])
    said = found.summary()
    assert said["activations"] == {"blocks": (), "twin": True, "why": "", "to": "bfloat16"}
    assert said["logits_error"] < 1e-5 < 1e-3 < said["logits_rounded_error"]
    assert all((each.score or 9) < 2 for each in found.worst.values() if each.rounded)
