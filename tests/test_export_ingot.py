"""The ingot folder: what its manifest proves, and that it appears whole or not at all."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import pytest
from conftest import MakeCheckpoint
from damage import copied

from ingot.export.ingot import (
    GRAPH,
    MANIFEST,
    WEIGHTS,
    FileInfo,
    Manifest,
    ManifestError,
    TensorInfo,
    check_destination,
    file_infos,
)
from ingot.graphs.state import State
from ingot.plugins.whole import NEW
from ingot.runtime.loading import load
from ingot.runtime.session import SessionError

LONGEST_WAIT = 120.0


@pytest.fixture
def ingot(tiny_ort: Path, tmp_path: Path) -> Path:
    """A copy of a real ingot, to be damaged."""
    return Path(shutil.copytree(tiny_ort, tmp_path / "ingot"))


def _edit(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**raw, **changes}))


def _example() -> Manifest:
    """A manifest that uses every field."""
    past: tuple[int | str, ...] = ("batch", 2, "past_sequence", 16)
    present: tuple[int | str, ...] = ("batch", 2, "total_sequence", 16)
    return Manifest(
        model_type="olmoe",
        task="generate",
        target="ort",
        precision="float32",
        main_output="logits",
        inputs=(
            TensorInfo("input_ids", "int64", ("batch", "sequence")),
            TensorInfo("attention_mask", "int64", ("batch", "total_sequence")),
            TensorInfo("past.0", "float32", past),
        ),
        outputs=(
            TensorInfo("logits", "float32", ("batch", "sequence", 512)),
            TensorInfo("present.0", "float32", present),
        ),
        states=(State("key", "past.0", "present.0", "float32", past, present, 2, True),),
        vocab_size=512,
        source={"checkpoint": "émile", "revision": None, "sha256": "0" * 64},
        generation={"eos_token_ids": [2], "pad_token_id": 1, "context_length": 64},
        graph={"opset": 23, "nodes": 3, "operators": {"MoE": 3}, "unread_bytes": 0},
        parameters=10,
        active_parameters=5,
        weight_bytes=40,
        tools={"torch": "2.13.0"},
        files={GRAPH: FileInfo(9, "c" * 64), "report/report.json": FileInfo(3, "ab" * 32)},
        validation={"verdict": "passed", "main_max_abs": 1.25e-7},
    )


def test_reads_back_what_it_wrote(tmp_path: Path) -> None:
    written = _example()
    written.write(tmp_path)
    assert Manifest.read(tmp_path) == written
    # Without a verdict an ingot has not passed anything.
    assert (written.verdict, replace(written, validation={}).verdict) == ("passed", "skipped")


def test_reads_back_a_real_manifest(tiny_ort: Path, tmp_path: Path) -> None:
    manifest = Manifest.read(tiny_ort)
    manifest.write(tmp_path)
    assert (tmp_path / MANIFEST).read_bytes() == (tiny_ort / MANIFEST).read_bytes()
    assert manifest.files == file_infos(tiny_ort, {})
    assert set(manifest.files) >= {GRAPH, WEIGHTS}


def test_lists_files_in_folders_but_not_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    for name in ("report/a.json", "b", MANIFEST):
        (tmp_path / name).write_text("abc")
    # SHA-256 of "abc" (FIPS 180-2, appendix B.1).
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_infos(tmp_path, {}) == {"report/a.json": FileInfo(3, abc), "b": FileInfo(3, abc)}
    assert file_infos(tmp_path, {"b": "known"})["b"] == FileInfo(3, "known")


def test_refuses_a_folder_without_a_manifest(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ManifestError, match=r"is not an ingot: it has no ingot\.json"):
            load(path)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_refuses_another_schema_version(ingot: Path, version: Any) -> None:
    _edit(ingot, schema_version=version)
    with pytest.raises(ManifestError, match=rf"schema version {version!r}; this Ingot reads 1"):
        Manifest.read(ingot)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1, 2]",
        "null",
        '"ingot"',
        "{}",
        '{"schema_version": 1}',
        '{"schema_version": 1, "inputs": [], "outputs": [], "states": [], "files": []}',
        '{"schema_version": 1, "inputs": [], "outputs": [], "states": [], "files": {"a": {}}}',
        '{"schema_version": 1, "inputs": [3], "outputs": [], "states": [], "files": {}}',
    ],
)
def test_refuses_a_damaged_manifest(ingot: Path, text: str) -> None:
    (ingot / MANIFEST).write_text(text)
    with pytest.raises(ManifestError, match=r"ingot\.json .*is damaged.*export again"):
        Manifest.read(ingot)


def test_refuses_a_manifest_cut_short_or_not_text(ingot: Path) -> None:
    whole = (ingot / MANIFEST).read_bytes()
    for damaged in (whole[: len(whole) // 2], b"\xff\xfe" + whole):
        (ingot / MANIFEST).write_bytes(damaged)
        with pytest.raises(ManifestError, match="damaged"):
            Manifest.read(ingot)


def test_refuses_a_manifest_with_a_missing_or_an_unknown_field(ingot: Path) -> None:
    raw = json.loads((ingot / MANIFEST).read_text())
    _edit(ingot, colour="red")
    with pytest.raises(ManifestError, match="colour"):
        Manifest.read(ingot)
    raw.pop("vocab_size")
    (ingot / MANIFEST).write_text(json.dumps(raw))
    with pytest.raises(ManifestError, match="vocab_size"):
        Manifest.read(ingot)


@pytest.mark.parametrize("name", [GRAPH, WEIGHTS])
def test_names_the_file_that_is_missing(ingot: Path, name: str) -> None:
    (ingot / name).unlink()
    with pytest.raises(ManifestError, match=rf"incomplete: {name} is missing"):
        load(ingot, verify=False)


@pytest.mark.parametrize("name", [GRAPH, WEIGHTS])
def test_names_the_file_of_another_size(ingot: Path, name: str) -> None:
    with (ingot / name).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ManifestError, match=rf"{name} is not the file .*size differs"):
        load(ingot, verify=False)


@pytest.mark.parametrize("place", [0.3, 0.999999])
def test_names_the_weights_where_one_byte_changed(ingot: Path, place: float) -> None:
    data = bytearray((ingot / WEIGHTS).read_bytes())
    data[int(place * len(data))] ^= 1
    (ingot / WEIGHTS).write_bytes(data)
    with pytest.raises(ManifestError, match=rf"{WEIGHTS} is not the file .*SHA-256 differs"):
        load(ingot)
    # What --no-verify promises: sizes only.
    Manifest.read(ingot).check_files(ingot, hashes=False)


def test_refuses_an_ingot_that_failed_unless_told_otherwise(ingot: Path) -> None:
    load(ingot)
    _edit(ingot, validation={"verdict": "failed"})
    with pytest.raises(SessionError, match=r"failed its validation.*--allow-failed"):
        load(ingot)
    assert load(ingot, allow_failed=True).manifest.verdict == "failed"


def test_refuses_a_target_it_cannot_run(ingot: Path) -> None:
    _edit(ingot, target="coreml")
    with pytest.raises(ManifestError, match="target is 'coreml' and must be one of onnx, ort, trt"):
        load(ingot)


def test_refuses_a_graph_in_bfloat16(ingots: Callable[..., Path], tmp_path: Path) -> None:
    lowered = ingots("olmoe", "trt", builder="none")
    ingot = copied(lowered, tmp_path / "ingot", precision="bfloat16")
    with pytest.raises(SessionError, match=r"computes no bfloat16; export with --precision fp32"):
        load(ingot)


def test_accepts_a_destination_that_is_free(tmp_path: Path) -> None:
    check_destination(tmp_path / "absent", overwrite=False)
    check_destination(tmp_path / "absent", overwrite=True)


def test_refuses_a_taken_destination_without_overwrite(ingot: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for out in (ingot, tmp_path / "empty"):
        with pytest.raises(ManifestError, match=r"exists; give --overwrite"):
            check_destination(out, overwrite=False)
        check_destination(out, overwrite=True)


def test_never_overwrites_what_is_not_an_ingot(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    (tmp_path / "file").write_text("more work")
    for out in (tmp_path / "thesis", tmp_path / "file"):
        with pytest.raises(ManifestError, match="is not an ingot, so it is left alone"):
            check_destination(out, overwrite=True)


def _interruptible() -> None:
    """A shell starts background jobs with SIGINT ignored, and their children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(scope="module")
def smallest(make_checkpoint: MakeCheckpoint) -> Path:
    """A checkpoint that is captured as fast as any."""
    return make_checkpoint(num_hidden_layers=1)


class Export:
    """``python -m ingot.export`` in a process of its own, watched."""

    def __init__(self, checkpoint: Path, out: Path) -> None:
        self.out = out
        command = [sys.executable, "-m", "ingot.export", "--model", str(checkpoint)]
        command += ["--target", "onnx", "--out", str(out), "--no-validate"]
        # Text on standard error would be kept in a pipe that nobody empties; a file never blocks.
        self.log: IO[bytes] = (out.parent.parent / "log").open("wb")
        self.process = subprocess.Popen(
            command, stdout=self.log, stderr=self.log, preexec_fn=_interruptible
        )

    def partials(self) -> list[Path]:
        return [path for path in self.out.parent.iterdir() if path != self.out]

    def has(self, name: str) -> bool:
        return any((folder / NEW / name).exists() for folder in self.partials())

    def watch(self) -> Iterator[None]:
        """Again and again until the process ends."""
        deadline = time.monotonic() + LONGEST_WAIT
        while self.process.poll() is None:
            assert time.monotonic() < deadline, "the export neither ended nor came to the moment"
            yield
            time.sleep(0.001)

    def kill(self, killer: signal.Signals) -> int:
        self.process.send_signal(killer)
        return self.process.wait(timeout=LONGEST_WAIT)


def _prove(out: Path) -> None:
    """``out`` is absent, or a whole ingot."""
    if out.exists():
        Manifest.read(out).check_files(out)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "exports").mkdir()
    return tmp_path / "exports" / "X"


MOMENTS: dict[str, Callable[[Export], bool]] = {
    "at once": lambda _running: True,
    "capturing": lambda running: running.has(""),
    "writing": lambda running: running.has(WEIGHTS),
    "finishing": lambda running: running.has(MANIFEST),
}


@pytest.mark.parametrize(
    ("killer", "moment"),
    [
        (signal.SIGTERM, "at once"),
        (signal.SIGTERM, "capturing"),
        pytest.param(signal.SIGINT, "capturing", marks=pytest.mark.slow),
        (signal.SIGINT, "finishing"),
    ],
)
def test_leaves_nothing_half_done_when_asked_to_stop(
    smallest: Path, out: Path, killer: signal.Signals, moment: str
) -> None:
    running = Export(smallest, out)
    for _ in running.watch():
        if MOMENTS[moment](running):
            break
    status = running.kill(killer)
    _prove(out)
    assert running.partials() == []
    if moment == "capturing":
        assert status == {signal.SIGTERM: 143, signal.SIGINT: 130}[killer]
        assert not out.exists()


@pytest.mark.slow
def test_shows_a_whole_ingot_or_none_at_every_moment_even_after_a_kill(
    smallest: Path, out: Path
) -> None:
    killed = Export(smallest, out)
    for _ in killed.watch():
        if MOMENTS["writing"](killed):
            break
    assert killed.kill(signal.SIGKILL) == -signal.SIGKILL
    _prove(out)
    assert len(killed.partials()) == 1 or out.exists()
    shutil.rmtree(out, ignore_errors=True)

    # What a SIGKILL would leave at a moment is what the folder holds at that moment.
    running = Export(smallest, out)
    for _ in running.watch():
        _prove(out)
    assert running.process.returncode == 0
    assert out.exists()
    _prove(out)
    assert running.partials() == []
    load(out)
