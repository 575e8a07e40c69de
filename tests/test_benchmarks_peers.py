"""The comparison with other programs: arithmetic, tables and documents, with none of them here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import peers
from benchmarks.on_peers import ceilings, environments, ingots, section, shares, table
from benchmarks.on_peers.ceilings import Best
from benchmarks.on_peers.models import CONFIGS, FAMILIES, RELEASED, Model
from benchmarks.on_peers.program import Format, Made, PeerError, refusal
from benchmarks.on_peers.samples import Samples
from benchmarks.on_peers.table import Row
from benchmarks.on_peers.transformers import Transformers
from benchmarks.on_peers.workers import measure, run_onnx
from ingot.graphs.family import active_parameters, find_family
from ingot.graphs.preset import tensors
from ingot.plugins.errors import IngotError


def model_of(family: str) -> Model:
    return Model(family, Path("nowhere"), {"model_type": family, **CONFIGS[family]})


def row(program: str, chosen: str, prefill: list[float], decode: list[float], **more: Any) -> Row:
    samples = [
        {"prefill": p, "decode": d, "load": 2.0, "memory": 3_000_000}
        for p, d in zip(prefill, decode, strict=True)
    ]
    return Row("granite", program, chosen, samples=samples, **more)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoints_are_of_the_asked_size_and_of_whole_blocks(family: str) -> None:
    found = find_family(family)
    config = model_of(family).config
    total, _ = active_parameters(found.build(config, "generate"))
    assert 120e6 < total < 440e6
    for name, shape in tensors(found, config):
        if len(shape) == 2 or shares.EXPERT.search(name):
            assert shape[-1] % 256 == 0, name


def test_a_share_of_the_reading_is_of_bytes_a_second() -> None:
    # 50 tokens a second of 200 MB each are 10 GB/s.
    assert shares.share_of_reading(200e6, 50, 40e9) == pytest.approx(0.25)


def test_a_multiply_add_is_two_operations() -> None:
    assert shares.share_of_peak(100e6, 500, 400e9) == pytest.approx(0.25)


def test_a_token_reads_the_chosen_experts_alone() -> None:
    olmoe = model_of("olmoe")
    weights = {
        "model.embed_tokens.weight": 50304 * 100,
        "model.layers.0.mlp.experts.gate_up_proj": 32_000,
        "model.layers.0.mlp.experts.gate_up_proj.scales": 3_200,
        "model.layers.0.mlp.gate.weight": 7,
        "lm_head.weight": 1_000,
    }
    states = shares.state_bytes(olmoe.config, 10)
    expected = 100 + 8_000 + 800 + 7 + 1_000 + states
    assert shares.bytes_per_token(weights, olmoe, 10) == pytest.approx(expected)
    # Six layers, keys and values of sixteen heads of 64 floats.
    assert states == 6 * 2 * 16 * 64 * 10 * 4


def test_experts_are_known_by_the_names_of_both_families() -> None:
    jetmoe = model_of("jetmoe")
    layer = "model.layers.0.self_attention.experts"
    assert shares.part(f"{layer}.input_linear.weight.3.scales", jetmoe) == 0.25
    assert shares.part(f"{layer}.router.layer.weight", jetmoe) == 1
    assert shares.part("model.layers.0.mlp.experts.7.up_proj.weight", model_of("olmoe")) == 0.25


def test_a_tied_table_is_read_whole() -> None:
    granite = model_of("granite")
    weights = {"model.embed_tokens.weight": 1_000}
    assert shares.bytes_per_token(weights, granite, 0) == 1_000


def test_a_scan_reads_its_state_however_long_the_past_is() -> None:
    config = model_of("mamba2").config
    assert shares.state_bytes(config, 1) == shares.state_bytes(config, 999) == 24**2 * 64 * 128 * 4


def test_a_hybrid_reads_states_of_both_kinds_and_its_shared_mlp_whole() -> None:
    hybrid = Model("granite-4.0-h-tiny", Path(), RELEASED["granite-4.0-h-tiny"])
    caches, scans = 4 * 2 * 4 * 128, 36 * 48 * 64 * 128
    assert shares.state_bytes(hybrid.config, 10) == (10 * caches + scans) * 4
    assert shares.part("model.layers.0.shared_mlp.input_linear.weight", hybrid) == 1
    experts = "model.layers.0.block_sparse_moe.input_linear.weight.3"
    assert shares.part(experts, hybrid) == 6 / 64


def test_products_are_of_matrices_and_of_the_chosen_experts() -> None:
    olmoe = model_of("olmoe")
    shapes = {
        "model.embed_tokens.weight": (50304, 1024),
        "model.layers.0.input_layernorm.weight": (1024,),
        "model.layers.0.self_attn.q_proj.weight": (1024, 1024),
        **{f"model.layers.0.mlp.experts.{e}.up_proj.weight": (512, 1024) for e in range(32)},
        "lm_head.weight": (50304, 1024),
    }
    expected = 1024 * (1024 + 8 * 512 + 50304)
    assert shares.products_per_token(shapes, olmoe) == pytest.approx(expected)
    # Of the last token of two the head.
    expected = 1024 * (1024 + 8 * 512 + 50304 // 2)
    assert shares.products_per_token(shapes, olmoe, head=0.5) == pytest.approx(expected)
    tied = {"model.embed_tokens.weight": (49152, 768)}
    assert shares.products_per_token(tied, model_of("granite"), 0.5) == 49152 * 768 / 2
    convolution = {"backbone.layers.0.mixer.conv1d.weight": (1792, 1, 4)}
    assert shares.products_per_token(convolution, model_of("mamba2")) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_products_are_about_the_active_parameters(family: str) -> None:
    model, found = model_of(family), find_family(family)
    _, active = active_parameters(found.build(model.config, "generate"))
    table_size = 0 if model.tied else model.vocabulary * model.config["hidden_size"]
    products = shares.products_per_token(dict(tensors(found, model.config)), model)
    assert products == pytest.approx(active - table_size, rel=0.01)


def test_the_best_of_all_loops_and_rounds_is_the_ceiling() -> None:
    found = ceilings.best(
        [{"read": {"plain": 2.0, "wide": 5.0}}, {"read": {"plain": 6.0}, "int8": {"wide": 1.0}}]
    )
    assert found == {"read": Best("plain", 6.0), "int8": Best("wide", 1.0)}


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no compiler")
def test_every_ceiling_is_a_rate(tmp_path: Path) -> None:
    program = ceilings.build(tmp_path)
    found = ceilings.measure(program, threads=1, seconds=0.01, mebibytes=8)
    # Each processor reads; which products it has instructions for is its own.
    assert found["read"] and set(found) <= set(ceilings.KINDS)
    assert all(rate > 1e6 for rates in found.values() for rate in rates.values())
    assert ceilings.build(tmp_path) == program


def test_float32_stands_in_for_a_kind_that_the_machine_lacks() -> None:
    found = {"float32": Best("wide", 2.0)}
    assert ceilings.peak_of("int8", found) == ("float32", Best("wide", 2.0))
    assert ceilings.peak_of("int8", {}) is None


def test_rates_are_medians_with_their_spread_and_multiples_of_the_truth() -> None:
    truth = row("transformers", "float32", [100, 90, 400], [10, 10, 10], bytes=2_000_000)
    mine = row("ingot", "fp32", [250, 150, 200], [5, 4, 9], bytes=1_000_000, kl=2e-9)
    lines = list(table.rates_table([mine, truth], truth, 512, 128, 64))
    assert lines[0].count("|") == lines[2].count("|") == 11
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert cells[:6] == ["ingot", "fp32", "1 MB", "2.0e-09", "2.0 s", "3 MB"]
    assert cells[6:] == ["200 (150-250)", "2.00", "5.0 (4.0-9.0)", "0.50"]


def test_a_program_that_fails_has_the_reason_in_its_row() -> None:
    refused = row("mobius", "f32", [], [], refusal="no such architecture")
    (_, _, line) = table.rates_table([refused], None, 512, 128, 64)
    assert line.startswith("| mobius | f32 | no such architecture |")
    assert line.count("|") == 11


def test_another_model_is_called_one_where_nothing_was_rounded() -> None:
    exact = row("mobius", "f32", [1], [1], kl=1e-3, exact=True)
    assert "another model" in table.divergence(exact)
    assert "another model" not in table.divergence(row("mobius", "int4", [1], [1], kl=1e-3))
    assert table.divergence(row("mobius", "f32", [1], [1], exact=True)) == "not checked"
    exact.kl = float("nan")
    assert exact.other_model


def test_shares_stand_beside_ours_alone() -> None:
    found = {"read": Best("wide", 40e9), "float32": Best("wide", 400e9)}
    mine = row("ingot", "fp32", [500], [50], read=200e6, products=100e6)
    theirs = row("llama.cpp", "F32", [500], [50])
    lines = list(table.shares_table([mine, theirs], found))
    assert len(lines) == 3
    assert lines[2] == "| granite | fp32 | 200 MB | 25% | 200 M | 25% | float32 |"


def test_a_section_is_replaced_and_the_rest_of_the_document_stays() -> None:
    text = f"# Head\n\n{section.BEGIN}\n\nold\n\n{section.END}\n\ntail\n"
    once = section.replaced(text, "new\n")
    assert once == f"# Head\n\n{section.BEGIN}\n\nnew\n\n{section.END}\n\ntail\n"
    assert section.replaced(once, "new") == once


@pytest.mark.parametrize("text", ["nothing", section.BEGIN, section.END + section.BEGIN])
def test_refuses_a_document_without_both_marks(text: str) -> None:
    with pytest.raises(IngotError, match="put both where the tables are to be"):
        section.replaced(text, "new")


def test_the_document_has_its_marks() -> None:
    section.replaced(peers.DOCS.read_text(), "new")


def test_rows_of_own_kernels_are_dropped_with_a_note_where_no_option_makes_them() -> None:
    kept, notes = ingots.possible(ingots.FORMATS, frozenset({"weights"}))
    assert [each.name for each in kept] == ["fp32", "bf16", "int8", "int4"]
    assert len(notes) == 1 and "no --kernels" in notes[0] and "int4, own kernels" in notes[0]
    assert ingots.possible(ingots.FORMATS, frozenset({"kernels"})) == (ingots.FORMATS, [])


def test_an_export_is_asked_for_kernels_only_where_it_has_the_option() -> None:
    options = {"weights": "int4", "kernels": "ort", "block": 32}
    without = ["--weights", "int4", "--block", "32"]
    assert ingots.arguments(options, frozenset()) == without
    assert "--kernels" in ingots.arguments(options, frozenset({"kernels"}))


def test_whether_a_graph_can_leave_logits_out_is_said_by_its_inputs(tmp_path: Path) -> None:
    (tmp_path / "ingot.json").write_text('{"inputs": [{"name": "input_ids"}]}')
    assert ingots.has_input(tmp_path, "input_ids")
    assert not ingots.has_input(tmp_path, ingots.LAST)


def test_every_option_of_our_rows_is_one_of_the_export() -> None:
    from ingot.export.cli import export_command

    known = {option.name for option in export_command.params} | {ingots.KERNELS}
    assert all(known >= set(each.options) for each in ingots.FORMATS)


def test_the_yardstick_is_measured_whatever_is_asked_for() -> None:
    assert peers.wanted("llama.cpp Q8", "llama.cpp", "Q8_0")
    assert not peers.wanted("llama.cpp Q8", "llama.cpp", "F32")
    assert peers.wanted("llama.cpp Q8", "transformers", "float32")
    assert not peers.wanted("llama.cpp Q8", "transformers", "bfloat16")


def test_a_part_of_a_run_takes_no_whole_ones_place() -> None:
    assert peers.destinations(None, None, whole=True) == (peers.RESULTS, peers.DOCS)
    assert peers.destinations(None, None, whole=False) == (None, None)
    given = Path("here.json")
    assert peers.destinations(given, None, whole=False) == (given, None)


def test_the_last_error_becomes_a_phrase() -> None:
    said = "Traceback\nValueError: model type jetmoe is not supported yet.\n0%|      | 0/3\n"
    found = refusal(said, 1)
    assert found.phrase == "no such architecture" and "jetmoe" in found.details
    assert refusal("", -9).phrase == "crashes (signal 9)"
    assert refusal("AttributeError: no num_heads", 1).phrase == "cannot be exported"


def test_samples_go_on_where_a_run_of_the_same_settings_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "samples.json"
    Samples.open(path, {"prompt": 512}).add("granite/ingot/fp32", {"decode": 1.0})
    assert Samples.open(path, {"prompt": 512}).of("granite/ingot/fp32") == [{"decode": 1.0}]
    assert Samples.open(path, {"prompt": 32}).of("granite/ingot/fp32") == []


def test_a_run_forgets_its_own_samples_and_keeps_those_of_a_cut_one(tmp_path: Path) -> None:
    samples = Samples.open(tmp_path / "samples.json", {})
    for key in ("granite/ingot/fp32", "olmoe/ingot/fp32"):
        samples.add(key, {"decode": 1.0})
    samples.forget(["granite/ingot/fp32", "ceilings"])
    assert list(Samples.open(samples.path, {}).rows) == ["olmoe/ingot/fp32"]
    samples.forget(["olmoe/ingot/fp32"])
    assert not samples.path.exists()


def test_the_divergence_is_of_the_worse_position() -> None:
    truth = np.log(np.array([[0.5, 0.5], [0.5, 0.5]], np.float32))
    found = np.log(np.array([[0.5, 0.5], [0.25, 0.75]], np.float32))
    expected = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    assert peers.divergence(truth, found) == pytest.approx(expected, rel=1e-5)
    assert peers.divergence(truth, found[:1]) == float("inf")


def test_every_environment_pins_what_computes() -> None:
    for wanted in environments.PINNED.values():
        assert all("==" in each for each in wanted)


class Counting:
    """Logits are the tokens seen, and the last of them."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def reset(self) -> None:
        self.seen = []

    def step(self, ids: measure.Ids) -> measure.Floats:
        self.seen += ids.tolist()
        return np.array([len(self.seen), self.seen[-1]], np.float32)


def test_a_worker_feeds_the_same_tokens_to_a_prompt_and_one_by_one() -> None:
    program, ids = Counting(), np.arange(100, 120)
    assert measure.run_prompt(program, ids[:12])[1].tolist() == [12, 111]
    assert measure.run_decode(program, ids, 5, 4)[1].tolist() == [9, 108]


def test_a_rate_is_of_the_median_of_enough_runs() -> None:
    times = iter([1.0, 4.0, 2.0, 99.0])
    assert measure.rate(8, 7.0, 5.0, lambda: next(times)) == 4.0


def test_a_run_that_takes_long_is_not_repeated() -> None:
    times: Iterator[float] = iter([])
    assert measure.rate(32, 1.0, 16.0, lambda: next(times)) == 2.0


def test_states_of_a_graph_are_empty_at_first_and_found_again_among_its_outputs() -> None:
    assert run_onnx.empty(["batch", 4, "past_sequence_len", 64]) == [1, 4, 0, 64]
    assert run_onnx.empty(["batch", 24, 128, 64]) == [1, 24, 128, 64]
    assert run_onnx.present("past_key_values.3.key") == "present.3.key"
    assert run_onnx.present("past_states.0.conv_state") == "present.0.conv_state"


class Fake:
    """A program that takes one of two formats and whose worker is never reached."""

    name = "fake"
    formats = (Format("good"), Format("bad"))

    def prepare(self) -> None:
        return None

    def make(self, model: Model, chosen: Format) -> Made:
        if chosen.name == "bad":
            raise PeerError("cannot be saved", "RuntimeError: no")
        return Made(model.checkpoint, (), "run_fake.py", Path("python"))

    def versions(self) -> dict[str, str]:
        return {"fake": "1.0"}


def test_a_whole_run_prints_what_was_measured_and_what_was_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Model("granite", tmp_path, model_of("granite").config)
    monkeypatch.setattr(Model, "prepare", lambda _family, _work: made)
    monkeypatch.setattr(peers, "programs", lambda _work, _threads: [Transformers(), Fake()])
    monkeypatch.setattr(peers, "prepared_ceilings", lambda _work: None)
    seen: list[dict[str, Any]] = []

    def measured(_made: Made, given: dict[str, Any]) -> dict[str, Any]:
        seen.append(given)
        np.save(given["logits"], np.zeros((2, 4), np.float32))
        return {"prefill": 10.0, "decode": 1.0, "load": 1.0, "memory": 10}

    monkeypatch.setattr(peers, "measured", measured)
    out = tmp_path / "out.json"
    asked = ["--model", "granite", "--rounds", "2", "--threads", "1", "--work", str(tmp_path)]
    before = peers.DOCS.read_text()
    done = CliRunner().invoke(peers.main, [*asked, "--out", str(out)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "| fake | bad | cannot be saved |" in done.output
    assert "| fake | good | 0 MB | 0.0e+00 |" in done.output
    # Two formats of transformers and one of the other, each in both rounds.
    assert len(seen) == 6 and {given["threads"] for given in seen} == {1}
    rows = json.loads(out.read_text())["models"][0]["rows"]
    assert [row["refusal"] for row in rows] == ["", "", "", "cannot be saved"]
    # A part of all models is no whole run.
    assert peers.DOCS.read_text() == before
    assert not (tmp_path / "samples.json").exists()


def test_refuses_a_document_without_a_place_before_anything_is_made(tmp_path: Path) -> None:
    document = tmp_path / "document.md"
    document.write_text("# Head\n")
    asked = ["--quick", "--docs", str(document), "--work", str(tmp_path / "work")]
    done = CliRunner().invoke(peers.main, asked)
    assert done.exit_code == 1 and "put both where the tables are to be" in done.output
    assert not list((tmp_path / "work").iterdir())


def test_refuses_a_family_that_there_is_not() -> None:
    done = CliRunner().invoke(peers.main, ["--model", "llama"])
    assert done.exit_code == 2 and "'llama' is not one of" in done.output
