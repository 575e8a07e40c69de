"""The gate: silent where nothing got worse, and one sentence for each thing that did."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_validate_report import failing_report, make_report, with_tensor

from ingot.validate.gate import KL_FLOOR, GateError, gated, read_baseline, save_baseline
from ingot.validate.result import Distribution, Report, Routing

SPREAD = {"logits": 0.02, "key": 0.0, "value": 0.0, "kl": 0.1, "top1": 0.0, "routing": 0.0}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A baseline of the passing report."""
    result = tmp_path / "new" / "baseline.json"
    save_baseline(make_report(), result, SPREAD)
    return result


def gate(report: Report, path: Path) -> list[str]:
    """What got worse since a baseline, one sentence each."""
    return list(gated(report, read_baseline(path, report.schema_version), path).worse)


def distribution(**changes: Any) -> Distribution:
    found = make_report().distribution
    assert found is not None
    return replace(found, **changes)


def test_as_good_as_last_time(path: Path) -> None:
    assert gate(make_report(), path) == []
    assert gate(make_report(seconds=99.0, ingot="/elsewhere"), path) == []
    assert [p.name for p in path.parent.iterdir()] == ["baseline.json"]


def test_baseline_is_the_same_each_time(path: Path) -> None:
    before = path.read_bytes()
    save_baseline(make_report(), path, SPREAD)
    assert path.read_bytes() == before


def test_better_and_new_is_fine(path: Path) -> None:
    found = make_report()
    better = replace(found, tensors=tuple(replace(t, error=0.0) for t in found.tensors))
    extra = replace(found.tensors[0], stage="decode 9")
    routing = {mode: Routing((1.0,) * 4, ()) for mode in ("free", "replayed", "third")}
    assert gate(replace(better, tensors=(*better.tensors, extra), routing=routing), path) == []


@pytest.mark.parametrize(("index", "kind"), [(0, "logits"), (3, "key")])
def test_a_score_may_rise_by_three_spreads_and_the_floor(path: Path, index: int, kind: str) -> None:
    tensor = make_report().tensors[index]
    assert (tensor.kind, tensor.floor is not None) == (kind, True)
    score, floor = tensor.score or 0.0, tensor.floor or 0.0
    limit = (score * (1 + 3 * SPREAD[kind]) + 0.05) * floor
    assert gate(with_tensor(make_report(), index, error=limit * 0.999), path) == []
    (problem,) = gate(with_tensor(make_report(), index, error=limit * 1.001), path)
    assert problem.startswith(f"prefill, {tensor.name}: score ")
    assert f"was {score:.3g} " in problem


def test_a_kind_without_a_spread_takes_the_largest(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    save_baseline(make_report(), path, {"logits": 0.02, "key": 0.1})
    value = make_report().tensors[2]
    assert value.kind == "value" and value.error is not None
    assert gate(with_tensor(make_report(), 2, error=value.error * 1.3), path) == []
    save_baseline(make_report(), path, {})
    assert len(gate(with_tensor(make_report(), 2, error=value.error * 1.3), path)) == 1


@pytest.mark.parametrize("error", [math.nan, math.inf])
def test_an_error_that_is_no_number_is_worse(path: Path, error: float) -> None:
    (problem,) = gate(with_tensor(make_report(), 0, error=error), path)
    assert "prefill, logits: score" in problem


def test_an_error_that_rose_with_its_floor_is_worse(path: Path) -> None:
    tensor = make_report().tensors[0]
    assert tensor.error is not None and tensor.floor is not None
    both = with_tensor(make_report(), 0, error=tensor.error * 2, floor=tensor.floor * 2)
    (problem,) = gate(both, path)
    assert problem.startswith("prefill, logits: error ")


def test_a_tensor_without_a_finite_score_is_gated_by_its_error(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    for floor in (0.0, None):
        found = with_tensor(make_report(), 0, error=1e-9, floor=floor)
        save_baseline(found, path, SPREAD)
        assert gate(found, path) == []
        assert len(gate(with_tensor(found, 0, error=1.1e-9), path)) == 1


def test_a_score_that_vanished_is_worse(path: Path) -> None:
    (problem,) = gate(with_tensor(make_report(), 0, floor=None), path)
    assert "no score any more" in problem


def test_the_set_of_tensors_may_not_shrink(path: Path) -> None:
    found = make_report()
    (problem,) = gate(replace(found, tensors=found.tensors[1:]), path)
    assert problem == "the set of compared tensors shrank: without prefill logits"
    (problem,) = gate(replace(found, tensors=found.tensors[:7]), path)
    assert problem.endswith(
        "decode 1 logits, decode 1 present.0.key, decode 1 present.0.value and 53 more"
    )
    (problem,) = gate(with_tensor(found, 0, error=None, floor=None), path)
    assert problem == "the set of compared tensors shrank: without prefill logits"


def test_a_report_that_failed_is_a_problem(path: Path) -> None:
    problems = gate(failing_report(), path)
    assert problems[0].startswith("the validation itself failed: prefill, present.1.key: score")
    assert problems[0].endswith("(and 2 more)")
    (problem,) = gate(with_tensor(make_report(), 0, problem="bad"), path)
    assert problem == "the validation itself failed: prefill, logits: bad"


def test_divergences_may_not_rise(path: Path) -> None:
    found = distribution()
    scaled = [distribution(kl=tuple(k * factor for k in found.kl)) for factor in (1.29, 1.31)]
    assert gate(make_report(distribution=scaled[0]), path) == []
    problems = gate(make_report(distribution=scaled[1]), path)
    assert [problem.split()[0] for problem in problems] == ["kl_mean", "kl_p99", "kl_max"]
    one = distribution(kl=(*found.kl[:-1], found.kl[-1] * 2))
    assert any(p.startswith("kl_max") for p in gate(make_report(distribution=one), path))
    assert gate(make_report(distribution=distribution(kl=(math.nan,) * 200)), path)


def test_divergences_of_nothing_have_room_for_rounding(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    save_baseline(make_report(distribution=distribution(kl=(-1e-17,) * 200)), path, SPREAD)
    assert gate(make_report(distribution=distribution(kl=(0.9 * KL_FLOOR,) * 200)), path) == []
    assert gate(make_report(distribution=distribution(kl=(2 * KL_FLOOR,) * 200)), path)


def test_top1_may_not_fall_but_near_ties_may_turn(path: Path) -> None:
    tied = distribution(top1_agreement=0.98, near_ties=4)
    assert gate(make_report(distribution=tied), path) == []
    (problem,) = gate(make_report(distribution=distribution(top1_agreement=0.99)), path)
    assert problem.startswith("top-1 agreement, near-ties aside, 99.50%, was 100.00%")


@pytest.mark.parametrize("missing", [None, distribution(kl=(), tokens=0)])
def test_distributions_may_not_vanish(path: Path, missing: Distribution | None) -> None:
    (problem,) = gate(make_report(distribution=missing), path)
    assert problem == "next-token distributions are not compared any more"


def test_distributions_may_not_be_of_fewer_tokens(path: Path) -> None:
    found = distribution(tokens=100, near_ties=0, top1_agreement=1.0)
    assert gate(make_report(distribution=found), path) == [
        "distributions of 100 tokens are compared, was 200"
    ]


def test_a_baseline_without_distributions_gates_none(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    save_baseline(make_report(distribution=None, routing={}), path, SPREAD)
    assert gate(make_report(), path) == []


def test_routing_may_not_agree_less(path: Path) -> None:
    free, replayed = make_report().routing["free"], make_report().routing["replayed"]
    worse = Routing((1.0, 0.995, 0.99), free.flips)
    (problem,) = gate(make_report(routing={"free": worse, "replayed": replayed}), path)
    assert problem.startswith("routing (free), router 2: agreement 99.00%, was 99.50%")
    (problem,) = gate(make_report(routing={"free": free}), path)
    assert problem == "routing (replayed) of 0 routers is compared, was 3"
    (problem,) = gate(make_report(routing={"free": free, "replayed": Routing((1.0,), ())}), path)
    assert problem == "routing (replayed) of 1 routers is compared, was 3"


def test_shares_have_their_spread(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    save_baseline(make_report(), path, {**SPREAD, "top1": 0.01, "routing": 0.01})
    found = make_report(
        distribution=distribution(top1_agreement=0.97),
        routing={"free": Routing((0.975,) * 3, ()), "replayed": Routing((0.975,) * 3, ())},
    )
    assert gate(found, path) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schema_version": 2}, "has schema version 1 and the report 2"),
        ({"model_type": "jetmoe"}, "model_type was olmoe and is jetmoe"),
        ({"target": "trt"}, "target was ort and is trt"),
        ({"precision": "bfloat16"}, "precision was float32 and is bfloat16"),
        ({"against": "onnx"}, "against was eager PyTorch, float64 and is onnx"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"reason": "no GPU"}, "reason was not given and is no GPU"),
    ],
)
def test_a_baseline_of_something_else_is_void(
    path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(
        GateError, match=r"^[^\n]*; save a new one with --save-baseline\.$"
    ) as found:
        gate(make_report(**changes), path)
    assert said in str(found.value)


def test_another_environment_is_void_and_named_in_one_sentence(path: Path) -> None:
    environment = {"onnxruntime": "1.32.0", "torch": "2.13.0", "gpu": "H200"}
    with pytest.raises(GateError, match="in another environment") as found:
        gate(make_report(environment=environment), path)
    message = str(found.value)
    assert "gpu was not given and is H200, machine was x86_64, 16 cores and is not given" in message
    assert "onnxruntime was 1.31.1 and is 1.32.0" in message
    assert "torch" not in message


def test_the_ingot_and_the_host_may_differ(path: Path) -> None:
    environment = {**make_report().environment, "ingot": "0.2.0", "hostname": "runner-7"}
    assert gate(make_report(environment=environment), path) == []


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (failing_report(), "a report that failed is no baseline: prefill"),
        (make_report(tensors=()), "nothing was compared"),
        (with_tensor(make_report(), 0, error=math.nan), "prefill, logits: an error of nan"),
    ],
)
def test_not_every_report_is_a_baseline(tmp_path: Path, found: Report, said: str) -> None:
    with pytest.raises(GateError, match=said):
        save_baseline(found, tmp_path / "baseline.json", SPREAD)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("spread", [-0.1, math.nan, math.inf])
def test_a_spread_is_a_number(tmp_path: Path, spread: float) -> None:
    with pytest.raises(GateError, match="run-to-run spread"):
        save_baseline(make_report(), tmp_path / "baseline.json", {"logits": spread})


def test_no_baseline_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(GateError, match=r"^there is no baseline [^\n]*\.$"):
        gate(make_report(), tmp_path / "none.json")
    with pytest.raises(GateError, match=r"^cannot read the baseline [^\n]*: Is a directory\.$"):
        gate(make_report(), tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[1]", b"null", b"{}"]
)
def test_a_file_that_is_no_baseline_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "baseline.json"
    path.write_bytes(content)
    with pytest.raises(GateError, match=r"^the baseline [^\n]* is damaged: [^\n]*\.$"):
        gate(make_report(), path)


def drop(*names: str) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        for name in names[:-1]:
            data = data[name]
        del data[names[-1]]

    return change


def put(value: Any, *names: str) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        for name in names[:-1]:
            data = data[name]
        data[names[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        *[(drop(name), f"lacks '{name}'") for name in ("tensors", "spread", "routing", "identity")],
        (drop("environment"), "lacks 'environment'"),
        (drop("distribution"), "lacks 'distribution'"),
        (drop("distribution", "kl_p99"), "lacks 'kl_p99'"),
        (drop("identity", "seed"), "lacks 'seed'"),
        (drop("tensors", "prefill", "logits", "score"), "lacks 'score'"),
        (put({}, "tensors"), "it holds no tensors"),
        (put({"prefill": {}}, "tensors"), "it holds no tensors"),
        (put([], "tensors"), "'tensors' is not an object"),
        (put([], "tensors", "prefill"), "'prefill' is not an object"),
        (put(1, "tensors", "prefill", "logits"), "'prefill, logits' is not an object"),
        (put("1", "tensors", "prefill", "logits", "score"), "'1' of 'prefill, logits' is not a"),
        (put(True, "tensors", "prefill", "logits", "error"), "True of 'prefill, logits'"),
        (put(math.nan, "tensors", "prefill", "logits", "error"), "nan of 'prefill, logits' is out"),
        (put(math.inf, "spread", "kl"), "inf of 'kl' is out of range"),
        (put(-1.0, "spread", "kl"), "-1.0 of 'kl' is out of range"),
        (put(1.0, "routing", "free"), "'routing' is not a list for each mode"),
        (put([None], "routing", "free"), "None of 'free' is not a number"),
        (put(10**400, "spread", "kl"), "000 of 'kl' is out of range"),
        (put("x" * 10**6, "spread", "kl"), "x' of 'kl' is not a number"),
        (put([1] * 10**5, "tensors", "y" * 10**5), "y' is not an object"),
    ],
)
def test_a_damaged_baseline_is_one_sentence(
    path: Path, change: Callable[[dict[str, Any]], None], said: str
) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(GateError, match=r"^the baseline [^\n]* is damaged: [^\n]*\.$") as found:
        gate(make_report(), path)
    assert said in str(found.value) and len(str(found.value)) < 600


def test_a_write_that_breaks_off_leaves_the_old_baseline(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = path.read_bytes()

    def breaks(_self: Path, _target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", breaks)
    with pytest.raises(Exception, match="No space left on device"):
        save_baseline(make_report(seconds=1.0), path, {})
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["baseline.json"]
