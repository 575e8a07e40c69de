"""The fields of ``ingot.json``, each of them wrong in turn."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import MakeCheckpoint, MakeIngot
from damage import with_engine
from identity import FAMILIES, Kept, changed
from traces import Traces

from ingot.export import manifest as manifest_module
from ingot.export.engine import trtexec_options
from ingot.export.ingot import TRTEXEC, Manifest
from ingot.export.progress import Stages
from ingot.graphs.checkpoint import Checkpoint
from ingot.graphs.family import find_family
from ingot.graphs.preset import preset_config, write_checkpoint
from ingot.validate.identity.contract import check_contract
from ingot.validate.identity.stated import stated
from ingot.validate.identity.subject import Subject
from ingot.validate.result import Check


@pytest.fixture(scope="module")
def kept(
    make_checkpoint: MakeCheckpoint,
    make_ingot: MakeIngot,
    traces: Traces,
    tiny: Path,
    tiny_ort: Path,
) -> Kept:
    return Kept(make_checkpoint, make_ingot, traces, tiny, {"ort": tiny_ort})


Said = Callable[[dict[str, Any]], object]
Checked = Callable[..., Check]


@pytest.fixture
def checked(kept: Kept, tmp_path: Path) -> Checked:
    """``checked(family, target, said)``: what is found in a copy with another manifest."""

    def check(family: str, target: str, said: Said | None = None, precision: str = "fp32") -> Check:
        copy = changed(kept.ingot(family, target, precision), tmp_path / "copy", said=said)
        return check_contract(kept.subject(copy, family))

    return check


def test_a_right_contract_has_no_problem(checked: Checked) -> None:
    found = checked("olmoe", "ort")
    assert found.problems == ()
    assert found.left_out == ""
    # Every tensor has a name, a dtype and a shape.
    assert found.compared > 60


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("target", "precision"), [("onnx", "fp32"), ("ort", "fp32"), ("trt", "fp32"), ("trt", "fp16")]
)
def test_the_contract_of_every_kind_of_ingot_is_right(
    checked: Checked, family: str, target: str, precision: str
) -> None:
    assert checked(family, target, precision=precision).problems == ()


def put(*path: str | int, to: Any) -> Said:
    """One value somewhere in a manifest, which had another."""

    def change(raw: dict[str, Any]) -> None:
        place: Any = raw
        for step in path[:-1]:
            place = place[step]
        assert place[path[-1]] != to
        place[path[-1]] = to

    return change


def all_of(*changes: Said) -> Said:
    def change(raw: dict[str, Any]) -> None:
        for each in changes:
            each(raw)

    return change


def half(raw: dict[str, Any]) -> None:
    """Every tensor of numbers is said to be float16."""
    raw["precision"] = "float16"
    for each in (*raw["inputs"], *raw["outputs"], *raw["states"]):
        if each["dtype"] == "float32":
            each["dtype"] = "float16"


def drop_state(raw: dict[str, Any]) -> None:
    state = raw["states"].pop()
    raw["inputs"] = [each for each in raw["inputs"] if each["name"] != state["input"]]
    raw["outputs"] = [each for each in raw["outputs"] if each["name"] != state["output"]]


def wider(raw: dict[str, Any]) -> None:
    """The first cache has heads of another size."""
    state = raw["states"][0]
    for shape in (state["input_shape"], state["output_shape"]):
        shape[3] *= 2
    for kind, name in (("inputs", state["input"]), ("outputs", state["output"])):
        next(each for each in raw[kind] if each["name"] == name)["shape"][3] *= 2


def more_tokens(raw: dict[str, Any]) -> None:
    raw["vocab_size"] = raw["outputs"][0]["shape"][2] = 1024


WRONG: dict[str, tuple[Said, str]] = {
    "vocabulary": (more_tokens, "vocab_size of ingot.json is 1024, and 512 in"),
    "ends": (
        put("generation", "eos_token_ids", to=[3]),
        r"generation.eos_token_ids of ingot.json is \[3\], and \[\]",
    ),
    "padding": (put("generation", "pad_token_id", to=7), "pad_token_id of ingot.json is 7, and 1 "),
    "context": (
        put("generation", "context_length", to=99),
        "context_length of .* is 99, and 512 in",
    ),
    "no context": (put("generation", "context_length", to=None), "is absent, and 512 in"),
    "shared": (put("states", 0, "shared", to=False), "shared of ingot.json is False, and True"),
    "shape": (wider, r"states\[past_key_values.0.key\].input_shape of ingot.json is .*32\], and"),
    "a state less": (drop_state, "the order of states"),
    "order": (lambda raw: raw["outputs"].reverse(), "the order of outputs"),
    "precision": (half, "precision of ingot.json is float16, and logits, the main output"),
    "label alone": (put("precision", to="float16"), "26 of 26 weights .* is float32|weights"),
    "kind": (put("states", 0, "kind", to="value"), r"\.kind of ingot.json is 'value', and 'key'"),
    "crossed": (
        lambda raw: (
            raw["states"].__setitem__(0, {**raw["states"][0], "output": raw["states"][2]["output"]})
            or raw["states"].__setitem__(2, {**raw["states"][2], "output": "present.0.key"})
        ),
        r"states\[past_key_values.0.key\].output",
    ),
    "labels": (put("labels", to=["a"]), r"labels of ingot.json is \['a'\], and \[\]"),
    "parameters": (put("parameters", to=10**9), "parameters of ingot.json is 1000000000, and"),
    "active": (put("active_parameters", to=1), "active_parameters of ingot.json is 1, and"),
    "bytes": (put("weight_bytes", to=1), "weight_bytes of ingot.json is 1, and"),
    "nodes": (put("graph", "nodes", to=1), "graph.nodes of ingot.json is 1, and"),
    "operators": (put("graph", "operators", "MoE", to=7), "graph.operators of ingot.json"),
    "unread": (put("graph", "unread_bytes", to=0), "graph.unread_bytes of ingot.json is 0, and"),
    "opset": (put("graph", "opset", to=24), "graph.opset of ingot.json is 24, and 23"),
    "source": (put("source", "sha256", to="0" * 64), "source.sha256"),
    "model type": (put("model_type", to="granite"), "model_type .* is 'granite', and 'olmoe'"),
}


# Graphs of another precision are traced for these.
SLOW = ("precision", "label alone")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in WRONG]
)
def test_a_wrong_field_is_a_problem(checked: Checked, name: str) -> None:
    said, expected = WRONG[name]
    found = checked("olmoe", "ort", said)
    problems = "\n".join(found.problems)
    assert re.search(expected, problems), problems


def test_a_field_that_is_wrong_is_told_once(checked: Checked) -> None:
    found = checked("olmoe", "ort", put("generation", "context_length", to=99))
    assert len(found.problems) == 1


def test_a_context_that_was_given_is_no_forgery(checked: Checked) -> None:
    given = all_of(
        put("generation", "context_length", to=99),
        lambda raw: raw["generation"].update(context_given=True),
    )
    assert checked("olmoe", "ort", given).problems == ()


@pytest.mark.slow
def test_an_export_says_that_its_context_was_given(
    kept: Kept, make_ingot: MakeIngot, tiny: Path
) -> None:
    ingot = make_ingot(tiny, "ort", context=2048)
    assert Manifest.read(ingot).generation["context_length"] == 2048
    assert check_contract(kept.subject(ingot, "olmoe")).problems == ()


FILES = {"generation_config.json": '{"eos_token_id": [5, 7, 5]}', "chat_template.jinja": "{{ 1 }}"}


def test_the_files_beside_the_weights_are_those_of_the_checkpoint(
    kept: Kept, tiny: Path, tiny_ort: Path, tmp_path: Path
) -> None:
    checkpoint = shutil.copytree(tiny, tmp_path / "checkpoint")
    subject = kept.subject(changed(tiny_ort, tmp_path / "copy", said=ends(5, 7)), "olmoe")
    subject.checkpoint = Checkpoint.open(checkpoint)
    for name, text in FILES.items():
        (checkpoint / name).write_text(text)
        (subject.folder / name).write_text(text)
    assert check_contract(subject).problems == ()
    (subject.folder / "chat_template.jinja").write_text("{{ 2 }}")
    (subject.folder / "generation_config.json").unlink()
    (subject.folder / "merges.txt").touch()
    assert check_contract(subject).problems == (
        "chat_template.jinja is not what a new export of the checkpoint writes",
        "generation_config.json of a new export is missing in the ingot",
        "merges.txt lies in the ingot, and a new export writes none",
    )
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": 8}')
    found = check_contract(subject).problems[0]
    assert found.startswith("generation.eos_token_ids of ingot.json is [5, 7], and [8] in the ch")


def ends(*ids: int) -> Said:
    return put("generation", "eos_token_ids", to=list(ids))


def test_a_manifest_of_nothing_that_can_be_made_is_a_problem(checked: Checked) -> None:
    def classify(raw: dict[str, Any]) -> None:
        raw.update(task="classify", labels=["a"])
        raw["outputs"][0]["shape"] = ["batch", 1]
        raw["inputs"] = [each for each in raw["inputs"] if each["name"] != "logits_to_keep"]

    problems = checked("olmoe", "ort", classify).problems
    assert any(each.startswith("no such ingot can be made: ") for each in problems)


def test_an_engine_is_of_the_graph_beside_it(kept: Kept, tiny_ort: Path, tmp_path: Path) -> None:
    folder = with_engine(tiny_ort, tmp_path / "engine")
    manifest = Manifest.read(folder)
    assert manifest.engine is not None
    options = trtexec_options(manifest.engine.profiles)
    (folder / TRTEXEC).write_text(options)

    def problems(**fields: Any) -> str:
        assert manifest.engine is not None
        replace(manifest, engine=replace(manifest.engine, **fields)).write(folder)
        subject = kept.subject(tiny_ort, "olmoe")
        subject.folder, subject.manifest = folder, Manifest.read(folder)
        found = check_contract(subject).problems
        return "\n".join(each for each in found if "engine" in each)

    assert problems() == ""
    assert "engine.graph_sha256 of" in problems(graph_sha256="0" * 64)
    assert "engine.plugins of" in problems(plugins={"MoeDispatch": 2})
    (folder / TRTEXEC).write_text(options.replace("--noTF32", ""))
    assert "trtexec.txt does not build" in problems()


def test_what_a_function_of_the_export_says_wrong_is_read_off_the_files(
    checked: Checked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault of what makes a manifest is on both sides of a comparison with a new export."""
    monkeypatch.setattr("ingot.export.manifest.active_parameters", lambda _: (7, 7))
    monkeypatch.setattr("ingot.export.manifest._weight_bytes", lambda _: 28)
    monkeypatch.setattr("ingot.export.manifest._unread_bytes", lambda _: 5)
    facts = {"parameters": 7, "active_parameters": 7, "weight_bytes": 28}

    def said(raw: dict[str, Any]) -> None:
        raw.update(facts)
        raw["graph"]["unread_bytes"] = 5

    problems = checked("olmoe", "ort", said).problems
    for name, value in {**facts, "graph.unread_bytes": 5}.items():
        if name != "active_parameters":
            assert any(
                re.fullmatch(rf"{name} of ingot.json is {value}, and \d+ in the graph", each)
                for each in problems
            )
    assert len(problems) == 3


def test_labels_are_those_of_the_checkpoints_json(tmp_path: Path) -> None:
    def labels(**config: Any) -> Any:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "jetmoe", **config}))
        checkpoint: Any = SimpleNamespace(path=tmp_path)
        return stated(checkpoint)["labels"]

    assert labels() == ["LABEL_0", "LABEL_1"]
    assert labels(num_labels=3) == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert labels(id2label={"1": "no", "0": "yes", "10": "?"}) == ["yes", "no", "LABEL_2"]


@pytest.mark.slow
def test_labels_in_another_order_are_a_problem(
    make_ingot: MakeIngot, traces: Traces, tmp_path: Path
) -> None:
    source, family = tmp_path, find_family("jetmoe")
    config = {**preset_config(family, "tiny"), "id2label": {"0": "no", "1": "yes"}}
    write_checkpoint(source, family, config, task="classify")
    with pytest.MonkeyPatch.context() as patch:
        right = manifest_module._labels
        patch.setattr(manifest_module, "_labels", lambda *given: right(*given)[::-1])
        ingot = make_ingot(source, "onnx", task="classify")
        checkpoint = Checkpoint.open(source)
        subject = Subject(ingot, Manifest.read(ingot), checkpoint, Stages(), traces)
        assert check_contract(subject).problems == (
            "labels of ingot.json is ['yes', 'no'], and ['no', 'yes'] in the checkpoint's files",
        )
