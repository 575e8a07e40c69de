"""The gate: silent where nothing got worse, and one sentence for each thing that did."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_validate_costs import stored_report
from test_validate_report import covered_report, failing_report, make_report, with_tensor

from ingot.validate.baseline import GateError, Spread, read_baseline, save_baseline
from ingot.validate.coverage import Experts
from ingot.validate.gate import KL_FLOOR, gated
from ingot.validate.result import ROUNDED, Distribution, Report, Routing, TensorResult

RUN = {"logits": 0.02, "key": 0.0, "value": 0.0, "kl": 0.1, "top1": 0.0, "routing": 0.0}
SPREAD = Spread(RUN)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A baseline of the passing report."""
    result = tmp_path / "new" / "baseline.json"
    save_baseline(make_report(), result, SPREAD)
    return result


def gate(report: Report, path: Path) -> list[str]:
    """What got worse since a baseline, one sentence each."""
    return list(gated(report, read_baseline(path), path).worse)


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
    more = replace(better, tensors=(*better.tensors, extra), routing=routing)
    newer = {**found.environment, "ingot": "0.2.0"}
    assert gate(replace(more, environment=newer), path) == []


@pytest.mark.parametrize(("index", "kind"), [(0, "logits"), (3, "key")])
def test_a_score_may_rise_by_three_spreads_and_the_floor(path: Path, index: int, kind: str) -> None:
    tensor = make_report().tensors[index]
    assert (tensor.kind, tensor.floor is not None) == (kind, True)
    score, floor = tensor.score or 0.0, tensor.floor or 0.0
    limit = (score * (1 + 3 * RUN[kind]) + 0.05) * floor
    assert gate(with_tensor(make_report(), index, error=limit * 0.999), path) == []
    (problem,) = gate(with_tensor(make_report(), index, error=limit * 1.001), path)
    assert problem.startswith(f"prefill, {tensor.name}: score ")
    assert f"was {score:.3g} " in problem


def test_a_kind_without_a_spread_takes_the_largest(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    save_baseline(make_report(), path, Spread({"logits": 0.02, "key": 0.1}))
    value = make_report().tensors[2]
    assert value.kind == "value" and value.error is not None
    assert gate(with_tensor(make_report(), 2, error=value.error * 1.3), path) == []
    save_baseline(make_report(), path, Spread())
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
    save_baseline(make_report(), path, Spread({**RUN, "top1": 0.01, "routing": 0.01}))
    found = make_report(
        distribution=distribution(top1_agreement=0.97),
        routing={"free": Routing((0.975,) * 3, ()), "replayed": Routing((0.975,) * 3, ())},
    )
    assert gate(found, path) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
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


def test_the_ingot_may_differ(path: Path) -> None:
    environment = {**make_report().environment, "ingot": "0.2.0"}
    assert gate(make_report(environment=environment), path) == []


# --- another plan, other calls, less coverage


def test_another_plan_is_void_and_named(path: Path) -> None:
    with pytest.raises(
        GateError, match=r"of another plan: it fed standard and this is quick; "
    ) as e:
        gate(make_report(plan="quick"), path)
    assert "\n" not in str(e.value)


def as_replayed(report: Report, stage: str) -> list[TensorResult]:
    """The tensors of a call under the name they have with the truth's experts."""
    return [replace(t, stage=f"{stage}, replayed") for t in report.tensors if t.stage == stage]


def test_a_baseline_without_a_call_of_its_plan_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    found = make_report()
    cut = replace(found, tensors=tuple(t for t in found.tensors if t.stage != "decode 5"))
    save_baseline(cut, path, SPREAD)
    with pytest.raises(GateError, match=r"lacks decode 5, which its plan has, so it was cut"):
        gate(found, path)
    # Another Ingot may feed more, under the same name.
    newer = replace(found, environment={**found.environment, "ingot": "9.9"})
    assert gate(newer, path) == []
    # Where flips left nothing of a call, it is there with the truth's experts.
    forced = [
        replace(t, stage="decode 5, replayed") for t in found.tensors if t.stage == "decode 5"
    ]
    save_baseline(replace(cut, tensors=(*cut.tensors, *forced)), path, SPREAD)
    assert "shrank" in gate(found, path)[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"calls": 44}, "coverage: 44 calls, was 45"),
        ({"ids": 93}, "coverage: 93 ids, was 94"),
        ({"rows": (1, 3)}, "coverage: rows without 2"),
        ({"paddings": ("left",)}, "coverage: paddings without right"),
        ({"lengths": (1, 2)}, "coverage: lengths without 19"),
        ({"experts": (Experts("layer 0", (0, 1, 2), (), (3,)),)}, "coverage: 3 experts of layer 0"),
        ({"experts": ()}, "coverage: 0 experts of layer 0 were run, was 4"),
        ({"parts": ()}, "decode of one sequence: not covered any more"),
    ],
)
def test_coverage_may_not_shrink(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    path = tmp_path / "baseline.json"
    found = covered_report()
    save_baseline(found, path, SPREAD)
    assert gate(found, path) == []
    assert found.coverage is not None
    (problem,) = gate(replace(found, coverage=replace(found.coverage, **changes)), path)
    assert problem.startswith(said)
    more = replace(found.coverage, calls=99, rows=(1, 2, 3, 4), ids=200)
    assert gate(replace(found, coverage=more), path) == []


def test_checks_may_not_vanish(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    found = covered_report()
    save_baseline(found, path, SPREAD)
    (problem,) = gate(replace(found, checks=found.checks[1:]), path)
    assert problem == "weights: not compared any more, as a whole"
    fewer = replace(found.checks[0], compared=28)
    assert gate(replace(found, checks=(fewer, *found.checks[1:])), path) == [
        "weights: 28 compared, was 29"
    ]
    partly = replace(found.checks[0], left_out="no memory")
    assert gate(replace(found, checks=(partly, *found.checks[1:])), path) == [
        "weights: not compared any more, as a whole"
    ]


# --- other processors

HERE = {"processor": "CPU A", "processor features": "avx avx2", "instruction set": "AVX2"}
HERE |= {"threads": "2 of PyTorch, 2 available"}
MEASURED = Spread(RUN, {"key": 0.01}, {"logits": 0.2, "key": 0.3}, {"logits": 0.01}, ("no AVX",))


def on(report: Report, **changes: str) -> Report:
    """A report of another processor, by the names of its environment with underscores."""
    named = {name.replace("_", " "): value for name, value in changes.items()}
    return replace(report, environment={**report.environment, **HERE, **named})


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """A baseline whose spread between processors was measured."""
    path = tmp_path / "measured.json"
    save_baseline(on(make_report()), path, MEASURED)
    return path


def with_floors(report: Report, factor: float) -> Report:
    """The same errors beside other floors, as another order of eager PyTorch's sums gives them."""
    tensors = (replace(t, floor=t.floor and t.floor * factor) for t in report.tensors)
    return replace(report, tensors=tuple(tensors))


def test_other_settings_hold_errors_and_not_scores(measured: Path) -> None:
    other = with_floors(make_report(), 0.5)
    assert gate(on(other), measured), "the scores doubled"
    assert gate(on(other, instruction_set="DEFAULT"), measured) == []
    worse = with_tensor(other, 0, error=2 * (other.tensors[0].error or 0))
    (problem,) = gate(on(worse, instruction_set="DEFAULT"), measured)
    assert problem.startswith("prefill, logits: error ")
    # Experts are chosen by what is the same there; threads may turn a near-tie.
    flipped = replace(other, routing={**other.routing, "free": Routing((0.9, 0.9, 0.9), ())})
    assert len(gate(on(flipped, instruction_set="DEFAULT"), measured)) == 3
    assert gate(on(flipped, threads="1 of PyTorch, 1 available"), measured) == []


def test_another_processor_holds_errors_within_its_spread(measured: Path) -> None:
    found = with_floors(make_report(), 0.5)
    tensor = found.tensors[0]
    assert (tensor.kind, tensor.error is not None) == ("logits", True)
    raised = with_tensor(found, 0, error=1.55 * (tensor.error or 0))
    assert gate(on(raised, processor="CPU B"), measured) == []
    above = with_tensor(found, 0, error=1.7 * (tensor.error or 0))
    (problem,) = gate(on(above, processor="CPU B"), measured)
    assert "(another processor explains 60.0%)" in problem
    # The same processor by name, of a machine that gives less of it.
    assert gate(on(raised, processor_features="avx"), measured) == []


def test_another_processor_does_not_hide_what_is_worse_in_the_mean(measured: Path) -> None:
    found = make_report()
    raised = replace(
        found,
        tensors=tuple(
            replace(t, error=1.15 * (t.error or 0)) if t.name == "logits" else t
            for t in found.tensors
        ),
    )
    (problem,) = gate(on(raised, processor="CPU B"), measured)
    assert problem == (
        "logits: its error rose by 15.0% in the mean of 9 calls (another processor explains 8.0%)"
    )


def test_another_processor_says_so(measured: Path) -> None:
    report = on(make_report(), processor="CPU B", instruction_set="AVX512")
    found = gated(report, read_baseline(measured), measured).gate
    assert found is not None
    assert found.note == (
        "made on another processor (processor was CPU A and is CPU B): errors are held, each "
        "within 90% and the means of all calls within 3% at most"
    )
    same = gated(on(make_report()), read_baseline(measured), measured).gate
    assert same is not None and same.note == ""


def test_a_near_tie_that_turned_is_no_loss_on_another_processor(measured: Path) -> None:
    found = make_report()
    free = tuple(t for t in found.tensors if t.stage != "decode 5")
    forced = [
        replace(t, stage="decode 5, replayed") for t in found.tensors if t.stage == "decode 5"
    ]
    turned = replace(found, tensors=(*free, *forced))
    assert gate(on(turned, processor="CPU B"), measured) == []
    assert len(gate(on(turned), measured)) == 1
    lost = replace(found, tensors=free)
    assert "shrank" in gate(on(lost, processor="CPU B"), measured)[0]


def test_another_processor_is_void_where_its_spread_was_not_measured(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    save_baseline(on(make_report()), path, SPREAD)
    for changes in ({"processor": "CPU B"}, {"threads": "1 of PyTorch, 1 available"}):
        with pytest.raises(GateError, match=r"was not measured; save a new one") as error:
            gate(on(make_report(), **changes), path)
        assert "another processor" in str(error.value) and "\n" not in str(error.value)
    # One setting of one machine needs no measurement.
    assert gate(on(make_report(), instruction_set="DEFAULT"), path) == []


def test_another_kind_of_machine_is_void(measured: Path) -> None:
    with pytest.raises(GateError, match="machine was x86_64, 16 cores and is aarch64"):
        gate(on(make_report(), machine="aarch64"), measured)


def test_how_many_other_threads_there_are_depends_on_the_machine(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    found = make_report()

    def with_threads(word: str) -> Report:
        more = [replace(t, stage=f"{t.stage}, {word}") for t in found.tensors[:3]]
        return on(replace(found, tensors=(*found.tensors, *more)))

    save_baseline(with_threads("1 thread"), path, MEASURED)
    one = on(with_threads("2 threads"), threads="1 of PyTorch, 1 available")
    assert gate(one, path) == []
    worse = with_tensor(one, -1, error=2 * (one.tensors[-1].error or 0))
    (problem,) = gate(worse, path)
    assert problem.startswith("prefill, 2 threads, present.0.value: error ")
    assert "shrank" in gate(on(found, threads="1 of PyTorch, 1 available"), path)[0]


def test_what_storing_costs_may_not_rise(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    before = stored_report()
    found = before.quantisation
    assert found is not None and found.recorded is not None
    save_baseline(before, path, SPREAD)
    assert gate(before, path) == []
    # It is computed in float64, so a thousandth is no chance.
    kl = tuple(1.001 * each for each in found.recorded.found.kl)
    recorded = replace(found.recorded, found=replace(found.recorded.found, kl=kl))
    problems = gate(replace(before, quantisation=replace(found, recorded=recorded)), path)
    assert [problem.split(",")[1].split()[0] for problem in problems] == [
        *("kl_mean", "kl_p99", "kl_max")
    ]
    less = replace(found.recorded, found=replace(found.recorded.found, top1_agreement=0.89))
    (problem,) = gate(replace(before, quantisation=replace(found, recorded=less)), path)
    assert problem.endswith("top1 agreement 89.00%, was 90.00%")
    layers = (*found.layers[:-1], replace(found.layers[-1], error=0.24))
    (problem,) = gate(replace(before, quantisation=replace(found, layers=layers)), path)
    assert "hidden states behind the final norm 0.24, was 0.234" in problem
    weights = (*found.weights[:-1], replace(found.weights[-1], error=0.083))
    (problem,) = gate(replace(before, quantisation=replace(found, weights=weights)), path)
    assert "weights of layer 1, mixer.in_proj 0.083, was 0.082" in problem
    (problem,) = gate(replace(before, quantisation=replace(found, layers=layers[1:-1])), path)[:1]
    assert "not measured any more" in problem


def test_storing_may_cost_less_and_nothing_at_all(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    save_baseline(stored_report(), path, SPREAD)
    assert gate(make_report(), path) == []
    # A baseline of an earlier Ingot has none of it.
    save_baseline(make_report(), path, SPREAD)
    assert "quantisation" not in path.read_text()
    assert gate(stored_report(), path) == []


def test_a_near_tie_that_turned_where_activations_are_rounded_is_no_loss_on_another_processor(
    tmp_path: Path,
) -> None:
    path, found = tmp_path / "measured.json", make_report()
    rounded = tuple(replace(t, stage=f"{t.stage}{ROUNDED}") for t in found.tensors)
    save_baseline(on(replace(found, tensors=rounded)), path, MEASURED)
    stage = f"decode 5{ROUNDED}"
    free = tuple(t for t in rounded if t.stage != stage)
    forced = [replace(t, stage=f"decode 5, replayed{ROUNDED}") for t in rounded if t.stage == stage]
    turned = on(replace(found, tensors=(*free, *forced)), processor="CPU B")
    assert gate(turned, path) == []
    lost = on(replace(found, tensors=(*free, *forced[1:])), processor="CPU B")
    (problem,) = gate(lost, path)
    assert problem == f"the set of compared tensors shrank: without {stage} logits"
