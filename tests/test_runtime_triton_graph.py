"""The graph on a real ONNX Runtime backend of Triton, its state kept there between requests.

With ONNX Runtime 1.28 or newer: an older one does not look whether a cache has the tokens claimed.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import triton_server
from conftest import MakeCheckpoint, MakeIngot
from kinds import KINDS
from triton_server import Server

from ingot.export.ingot import Manifest
from ingot.runtime.generate import generate
from ingot.runtime.loading import load
from ingot.runtime.triton_plan import Settings, growth
from ingot.runtime.triton_repository import write_repository

grpc = pytest.importorskip("tritonclient.grpc")
utils = pytest.importorskip("tritonclient.utils")

ABSENT = triton_server.backend_missing()
pytestmark = [pytest.mark.triton, pytest.mark.skipif(ABSENT is not None, reason=str(ABSENT))]

# Of the onnx target, a cache that grows and a state of fixed size.
CASES = [
    *((family, "ort") for family in KINDS),
    *(("olmoe", "onnx"), ("mamba2", "onnx")),
]
PROMPTS = [[17, 300, 5, 44, 101, 256, 7], [411], [9, 8, 207]]
NEW = 64
CAPACITY = 96


@dataclass
class Served:
    """A running graph, and its ingot's own session beside it."""

    server: Server
    repository: Path
    ingot: Path
    grows: str

    def solo(self, prompt: list[int], new: int = NEW) -> list[int]:
        """What the session generates from a prompt by itself, in this process."""
        steps = generate(load(self.ingot), [prompt], max_new_tokens=new, stop_ids=())
        return [token for (token,) in steps if token is not None]


class Sequence:
    """A client of one sequence, which gives the graph what the repository's README says."""

    def __init__(self, served: Served, number: int) -> None:
        self._client = grpc.InferenceServerClient(served.server.url)
        self._grows, self._number = served.grows, number
        self.seen = self.failed = 0

    def feed(self, new: list[int], *, start: bool = False, end: bool = False, **other: Any) -> Any:
        """The logits of new tokens; ``other`` takes the place of an input."""
        seen = (0 if start else self.seen) + len(new)
        ones = [1] * (len(new) if self._grows == "fixed" else seen)
        values: dict[str, Any] = {"input_ids": [new], "attention_mask": [ones]}
        if self._grows == "appended":
            values["attention_mask"] = [[0, *ones]]
        if self._grows != "fixed":
            values["position_ids"] = [list(range(seen - len(new), seen))]
        inputs = []
        for name, value in {**values, **other}.items():
            array = np.array(value, dtype=getattr(value, "dtype", np.int64))
            kind = utils.np_to_triton_dtype(array.dtype)
            inputs.append(grpc.InferInput(name, array.shape, kind))
            inputs[-1].set_data_from_numpy(array)
        flags = {"sequence_start": start, "sequence_end": end}
        result = self._client.infer("m", inputs, sequence_id=self._number, **flags)
        # After the call, so that one that failed can be sent again.
        self.seen = seen
        return result.as_numpy("logits")

    def generate(self, prompt: list[int], *, insist: bool = False) -> list[int]:
        """Greedy tokens of a sequence begun anew and left open; ``insist`` sends errors again."""
        tokens: list[int] = []
        new = prompt
        while len(tokens) < NEW:
            try:
                logits = self.feed(new, start=not tokens)
            except utils.InferenceServerException:
                if not insist:
                    raise
                self.failed += 1
                continue
            new = [int(logits[0, -1].argmax())]
            tokens += new
        return tokens

    def close(self) -> None:
        """End the sequence, which makes room for another and lets the server end."""
        with contextlib.suppress(utils.InferenceServerException):
            self.feed([1], end=True)
        self._client.close()


def _boot(ingot: Path, folder: Path, **settings: Any) -> Iterator[Served]:
    repository = folder / "repository"
    write_repository(ingot, repository, Settings(name="m", **settings))
    with triton_server.boot(repository, "m m_generate", folder / "log") as server:
        (grows,) = {growth(state) for state in Manifest.read(ingot).states}
        yield Served(server, repository, ingot, grows)


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def served(
    request: pytest.FixtureRequest,
    make_checkpoint: MakeCheckpoint,
    make_ingot: MakeIngot,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    family, target = request.param
    ingot = make_ingot(make_checkpoint(family), target)
    folder = tmp_path_factory.mktemp(family)
    yield from _boot(ingot, folder, streams=3, capacity=CAPACITY, max_batch=4)


def _together(
    served: Served, prompts: list[list[int]], *, insist: bool = False
) -> tuple[list[list[int]], int]:
    """What sequences of their own generate at the same time, and how many requests failed."""

    def one(number: int) -> tuple[list[int], int]:
        sequence = Sequence(served, 1000 + number)
        try:
            return sequence.generate(prompts[number], insist=insist), sequence.failed
        finally:
            sequence.close()

    with ThreadPoolExecutor(len(prompts)) as pool:
        tokens, failed = zip(*pool.map(one, range(len(prompts))), strict=True)
    return list(tokens), sum(failed)


def test_answers_the_client_of_the_readme(served: Served) -> None:
    text = (served.repository / "README.md").read_text(encoding="utf-8")
    source = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)[-1]
    assert "127.0.0.1:8001" in source
    printed: list[list[int]] = []
    source = source.replace("127.0.0.1:8001", served.server.url)
    exec(compile(source, "README.md", "exec"), {"print": printed.append})
    assert printed == [[3, 14, 15, *served.solo([3, 14, 15], 8)]]


def test_begins_with_zeros_whenever_a_sequence_starts(served: Served) -> None:
    sequence = Sequence(served, 5)
    # One id for all, and none is ended before the next one starts.
    assert [sequence.generate(prompt) for prompt in PROMPTS] == [served.solo(p) for p in PROMPTS]
    sequence.close()


def test_keeps_more_sequences_apart_than_it_has_room_for(served: Served) -> None:
    prompts = [[n + 1, *range(7 * n, 8 * n)] for n in range(8)]
    assert _together(served, prompts) == ([served.solo(prompt) for prompt in prompts], 0)
    client = grpc.InferenceServerClient(served.server.url)
    (stats,) = client.get_inference_statistics("m").model_stats
    batched = max(stats.batch_stats, key=lambda batch: int(batch.batch_size)).batch_size
    client.close()
    # Caches that grow are of many lengths, and Triton would not compare them.
    assert batched > 1 if served.grows == "fixed" else batched == 1


def test_has_the_sessions_numbers_up_to_the_last_token_that_fits(served: Served) -> None:
    # The cache of an `onnx` graph begins with one empty position.
    room = CAPACITY - (served.grows == "appended")
    random = np.random.default_rng(3)
    session = load(served.ingot)
    session.reset(1, CAPACITY + 8)
    sequence = Sequence(served, 6)

    def same(new: list[int], **flags: bool) -> None:
        ids = np.array([new], dtype=np.int64)
        wanted = session.step(ids, np.ones_like(ids))
        np.testing.assert_allclose(sequence.feed(new, **flags), wanted, rtol=1e-4, atol=1e-5)

    # Pieces of several tokens too: a prompt may be sent in parts.
    for count in (5, 1, 3, *[1] * (room - 10), 1):
        same(random.integers(0, 512, count).tolist(), start=sequence.seen == 0)
    assert sequence.seen == room
    if served.grows == "shared":
        # The full cache may grow by one request; the next would misread it.
        same([1])
        with pytest.raises(utils.InferenceServerException, match="past"):
            sequence.feed([1])
        sequence.seen = 0
        sequence.feed([1], start=True)
    else:
        same([1])
    sequence.close()


MALFORMED: dict[str, tuple[dict[str, Any], str]] = {
    "wrong dtype": ({"input_ids": np.ones((1, 1), np.int32)}, "INT32"),
    "id too high": ({"input_ids": [[512]]}, "out of data bounds"),
    "no token": ({"input_ids": np.zeros((1, 0), np.int64)}, "onnx runtime error"),
    "two rows": ({"input_ids": [[1], [2]]}, "batch"),
    "mask too long": ({"attention_mask": [[1] * 60_000]}, "onnx runtime error"),
    "no mask": ({"attention_mask": np.zeros((1, 0), np.int64)}, "onnx runtime error"),
    "state of its own": ({"past_key_values.0.key": [[1]]}, "inputs"),
}


def test_goes_on_after_a_malformed_request(served: Served) -> None:
    sequence = Sequence(served, 7)
    with pytest.raises(utils.InferenceServerException, match="START flag"):
        sequence.feed([1])
    tokens: list[int] = []
    new = PROMPTS[0]
    faults = iter(MALFORMED.values())
    while len(tokens) < len(MALFORMED) + 1:
        new = [int(sequence.feed(new, start=not tokens)[0, -1].argmax())]
        tokens += new
        if fault := next(faults, None):
            with pytest.raises(utils.InferenceServerException, match=fault[1]):
                sequence.feed(new, **fault[0])
    assert tokens == served.solo(PROMPTS[0], len(tokens))
    assert served.server.ready()
    sequence.close()


# Only its state may run in a batch.
@pytest.mark.parametrize("served", [("mamba2", "ort")], indirect=True, ids="-".join)
def test_takes_again_what_failed_for_anothers_fault(served: Served) -> None:
    bad = Sequence(served, 8)
    bad.feed([1], start=True)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(_together, served, PROMPTS, insist=True)
        while not running.done():
            with pytest.raises(utils.InferenceServerException, match="out of data bounds"):
                bad.feed([512])
        tokens, failed = running.result()
    assert tokens == [served.solo(prompt) for prompt in PROMPTS]
    assert failed > 0
    bad.close()


def test_has_one_buffer_for_a_cache_of_fixed_capacity(tiny_ort: Path, tmp_path: Path) -> None:
    manifest = Manifest.read(tiny_ort)
    room = 512
    size = sum(4 * room * heads * width for _, heads, _, width in _shapes(manifest))
    for served in _boot(tiny_ort, tmp_path, streams=100, capacity=room):
        sequences = [Sequence(served, number) for number in range(1, 101)]
        sequences[0].generate([1, 2, 3])
        before = served.server.resident()
        for sequence in sequences[1:]:
            sequence.feed([1, 2, 3], start=True)
            sequence.feed([4])
        each = (served.server.resident() - before) / 99
        for sequence in sequences:
            sequence.close()
        print(f"\n{each / 1024:.0f} KiB a sequence, whose state has {size / 1024:.0f} KiB")
        assert 0.8 * size < each < 1.5 * size


def _shapes(manifest: Manifest) -> Iterator[tuple[Any, ...]]:
    for state in manifest.states:
        assert state.dtype == "float32" and state.shared
        yield state.input_shape
