"""Token streams from a real Triton server: every token is the Python session's, under load too."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import triton_server
from conftest import MakeCheckpoint, MakeIngot
from kinds import KINDS
from triton_server import Server

from ingot.plugins.cpu.library import CpuLibrary
from ingot.runtime.generate import Sampling, generate
from ingot.runtime.loading import load
from ingot.runtime.triton_plan import Settings
from ingot.runtime.triton_repository import write_repository

grpc = pytest.importorskip("tritonclient.grpc")

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(triton_server.missing() is not None, reason=str(triton_server.missing())),
]

PROMPTS = [[17, 300, 5, 44, 101, 256, 7], [411], [9, 8, 207]]
NEW = 64
TYPES = {
    "input_ids": np.int64,
    "max_new_tokens": np.int32,
    "temperature": np.float32,
    "top_k": np.int32,
    "top_p": np.float32,
    "seed": np.int64,
    "stop_ids": np.int64,
}
MIB = 2**20


@dataclass
class Answer:
    """What came back for one request."""

    tokens: list[int] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    error: str = ""


class Client:
    """One gRPC stream to one model; its requests may be answered in any order."""

    def __init__(self, server: Server, model: str) -> None:
        self._client = grpc.InferenceServerClient(server.url)
        self._model = model
        self._events: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self._ids = itertools.count()
        self._client.start_stream(lambda result, error: self._events.put((result, error)))

    def close(self, *, cancel: bool = False) -> None:
        self._client.stop_stream(cancel_requests=cancel)
        self._client.close()

    def send(self, *, arrays: dict[str, np.ndarray[Any, Any]] | None = None, **values: Any) -> str:
        """Send a request with inputs of the right types, and any others as they are."""
        given = {
            name: np.array(value if isinstance(value, list) else [value], dtype=TYPES[name])
            for name, value in values.items()
        }
        given.update(arrays or {})
        inputs = []
        for name, array in given.items():
            kind = grpc._utils.np_to_triton_dtype(array.dtype)
            inputs.append(grpc.InferInput(name, array.shape, kind))
            inputs[-1].set_data_from_numpy(array)
        request = str(next(self._ids))
        self._client.async_stream_infer(
            self._model, inputs, request_id=request, enable_empty_final_response=True
        )
        return request

    def next(self, timeout: float = 60) -> tuple[str, Any, str, bool]:
        """Request, result or None, error, whether it is the request's last."""
        result, error = self._events.get(timeout=timeout)
        if error is not None:
            return "", None, str(error), True
        response = result.get_response()
        final = response.parameters["triton_final_response"].bool_param
        return response.id, result, "", final

    def ask(self, **values: Any) -> Answer:
        """One request and everything that comes back for it."""
        wanted = self.send(**values)
        answer = Answer()
        while True:
            request, result, answer.error, final = self.next()
            if answer.error:
                return answer
            assert request == wanted
            token = result.as_numpy("token_id")
            if token is not None:
                answer.tokens.append(int(token[0]))
                answer.indices.append(int(result.as_numpy("index")[0]))
                answer.reasons.append(result.as_numpy("finish_reason")[0].decode())
            if final:
                return answer


@dataclass
class Served:
    """A running model, and its ingot's own session beside it."""

    server: Server
    model: str
    ingot: Path

    def client(self) -> Client:
        return Client(self.server, self.model)

    def ask(self, **values: Any) -> Answer:
        client = self.client()
        try:
            return client.ask(**values)
        finally:
            client.close()

    def solo(self, prompt: list[int], new: int = NEW, **options: Any) -> list[int]:
        """What the session generates from a prompt by itself, in this process."""
        session = load(self.ingot)
        steps = generate(session, [prompt], max_new_tokens=new, **options)
        return [token for (token,) in steps if token is not None]


@pytest.fixture(scope="module")
def ingots(make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot) -> Callable[[str], Path]:
    """The tiny ingot of a family, exported once."""
    made: dict[str, Path] = {}

    def ingot(family: str) -> Path:
        if family not in made:
            made[family] = make_ingot(make_checkpoint(family), "ort")
        return made[family]

    return ingot


def _served(ingot: Path, folder: Path, **settings: Any) -> Iterator[Served]:
    write_repository(ingot, folder / "repository", Settings(name="m", **settings))
    with triton_server.boot(folder / "repository", "m_generate", folder / "log") as server:
        yield Served(server, "m_generate", ingot)


@pytest.fixture(scope="module", params=KINDS)
def family(
    request: pytest.FixtureRequest,
    ingots: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    yield from _served(ingots(request.param), tmp_path_factory.mktemp(request.param), streams=3)


@pytest.fixture(scope="module")
def olmoe(
    ingots: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """OLMoE with eight streams."""
    yield from _served(ingots("olmoe"), tmp_path_factory.mktemp("eight"), streams=8)


@pytest.fixture(scope="module")
def single(
    ingots: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """Mamba2 with one stream, which may be long."""
    yield from _served(ingots("mamba2"), tmp_path_factory.mktemp("single"), streams=1)


@pytest.fixture(scope="module")
def own(
    make_checkpoint: MakeCheckpoint,
    make_ingot: MakeIngot,
    cpu_library: CpuLibrary,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    """OLMoE on Ingot's own kernels, whose library the server loads."""
    ingot = make_ingot(make_checkpoint("olmoe"), "ort", kernels="ingot", weights="int4")
    yield from _served(ingot, tmp_path_factory.mktemp("own"), streams=3)


def _all(served: Served, prompts: list[list[int]], **values: Any) -> list[Answer]:
    """The answers to prompts sent at the same time, each over a stream of its own."""
    start = threading.Barrier(len(prompts))

    def one(prompt: list[int]) -> Answer:
        client = served.client()
        start.wait()
        try:
            return client.ask(input_ids=prompt, **values)
        finally:
            client.close()

    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(one, prompts))


def test_streams_what_the_session_generates(family: Served) -> None:
    expected = family.solo(PROMPTS[0])
    answer = family.ask(input_ids=PROMPTS[0], max_new_tokens=NEW)
    assert answer.error == ""
    assert answer.tokens == expected
    assert answer.indices == list(range(NEW))
    assert answer.reasons == [""] * (NEW - 1) + ["length"]


def test_streams_three_prompts_at_once_as_each_alone(family: Served) -> None:
    answers = _all(family, PROMPTS, max_new_tokens=NEW)
    assert [answer.tokens for answer in answers] == [family.solo(prompt) for prompt in PROMPTS]
    steps = generate(load(family.ingot), PROMPTS, max_new_tokens=NEW)
    together = [list(row) for row in zip(*steps, strict=True)]
    assert [answer.tokens for answer in answers] == together


def test_streams_from_ingots_own_kernels(own: Served) -> None:
    answers = _all(own, PROMPTS, max_new_tokens=NEW)
    assert [answer.error for answer in answers] == [""] * 3
    assert [answer.tokens for answer in answers] == [own.solo(prompt) for prompt in PROMPTS]


def test_samples_and_stops_as_the_session_does(family: Served) -> None:
    # What a client sends is a float32; the session is given the same number.
    temperature, top_p = float(np.float32(0.9)), float(np.float32(0.8))
    sampling = Sampling(temperature, 20, top_p, 5)
    expected = family.solo(PROMPTS[2], sampling=sampling)
    options = {"temperature": temperature, "top_k": 20, "top_p": top_p, "seed": 5}
    answer = family.ask(input_ids=PROMPTS[2], max_new_tokens=NEW, **options)
    assert answer.tokens == expected
    # Some tiny models repeat a token greedily, which would hide a wrong position or cache.
    assert len(set(expected)) > 3
    stop = expected[5]
    answer = family.ask(input_ids=PROMPTS[2], max_new_tokens=NEW, stop_ids=[stop], **options)
    assert answer.tokens == expected[: expected.index(stop) + 1]
    assert answer.reasons[-1] == "stop"


def test_is_live_and_ready_and_counts_its_queue(family: Served) -> None:
    assert family.server.get("/v2/health/live")[0] == 200
    assert family.server.get(f"/v2/models/{family.model}/ready")[0] == 200
    metrics = family.server.get("/metrics", family.server.metrics)[1]
    for name in ("nv_inference_queue_duration_us", "nv_inference_exec_count"):
        assert f'{name}{{model="{family.model}"' in metrics


def test_serves_eight_streams_at_once(olmoe: Served) -> None:
    prompts = [[n + 1, 7 * n + 2, 300 - n] for n in range(8)]
    clients = [olmoe.client() for _ in prompts]
    for client, prompt in zip(clients, prompts, strict=True):
        client.send(input_ids=prompt, max_new_tokens=400)
    # Each has made a token while none has come to its end: no stream waits for another.
    firsts = [client.next() for client in clients]
    assert not [error or final for _, _, error, final in firsts if error or final]
    tokens = [[int(result.as_numpy("token_id")[0])] for _, result, _, _ in firsts]
    for client, row in zip(clients, tokens, strict=True):
        final = False
        while not final:
            _, result, error, final = client.next()
            assert error == ""
            row.append(int(result.as_numpy("token_id")[0]))
        client.close()
    assert tokens == [olmoe.solo(prompt, 400) for prompt in prompts]


@pytest.mark.parametrize("way", ["cancel", "leave"])
def test_frees_the_stream_of_a_client_that_goes(single: Served, way: str) -> None:
    expected = single.solo(PROMPTS[0], 8)
    before = time.perf_counter()
    client = single.client()
    client.send(input_ids=[5, 6, 7], max_new_tokens=4000)
    for _ in range(3):
        assert client.next()[2] == ""
    pace = (time.perf_counter() - before) / 3
    if way == "cancel":
        client.close(cancel=True)
    else:
        # As when its process dies: the connection goes, without a word.
        client._client._channel.close()
    begin = time.perf_counter()
    assert single.ask(input_ids=PROMPTS[0], max_new_tokens=8).tokens == expected
    # The one stream there is would have been busy for 4000 tokens.
    assert time.perf_counter() - begin < max(2.0, 200 * pace)


def test_makes_a_request_wait_for_a_stream_in_tritons_queue(single: Served) -> None:
    def queued() -> int:
        metrics = single.server.get("/metrics", single.server.metrics)[1]
        (line,) = (
            line
            for line in metrics.splitlines()
            if line.startswith("nv_inference_queue_duration_us{")
        )
        return int(float(line.rpartition(" ")[2]))

    before = queued()
    answers = _all(single, PROMPTS, max_new_tokens=200)
    assert [answer.tokens for answer in answers] == [single.solo(p, 200) for p in PROMPTS]
    # Triton refreshes its metrics every two seconds.
    time.sleep(3)
    assert queued() - before > 50_000


INT32 = {"input_ids": np.array([1, 2], dtype=np.int32)}
MALFORMED: dict[str, tuple[dict[str, Any], str]] = {
    "wrong dtype": ({"arrays": INT32}, "INT32"),
    "wrong rank": ({"arrays": {"input_ids": np.ones((1, 2), dtype=np.int64)}}, "input_ids"),
    "no prompt": ({"max_new_tokens": 4}, "input_ids"),
    "empty prompt": ({"arrays": {"input_ids": np.zeros(0, dtype=np.int64)}}, "input_ids"),
    "id too high": ({"input_ids": [3, 512]}, "token id 512 is outside the vocabulary of 512"),
    "id below 0": ({"input_ids": [-1]}, "token id -1 is outside the vocabulary"),
    "prompt too long": ({"input_ids": [1] * 513}, "no room in a capacity of 512"),
    "prompt full": ({"input_ids": [1] * 512}, "no room in a capacity of 512"),
    "too many tokens": ({"input_ids": [1] * 500, "max_new_tokens": 13}, "it must be 1 to 12"),
    "no new tokens": ({"input_ids": [1], "max_new_tokens": 0}, "max_new_tokens is 0"),
    "NaN temperature": ({"input_ids": [1], "temperature": float("nan")}, "temperature is nan"),
    "infinite": ({"input_ids": [1], "temperature": float("inf")}, "temperature is inf"),
    "temperature below 0": ({"input_ids": [1], "temperature": -1.0}, "temperature is -1.0"),
    "top-p 0": ({"input_ids": [1], "top_p": 0.0}, "top-p is 0.0"),
    "top-k below 0": ({"input_ids": [1], "top_k": -1}, "top-k is -1"),
    "seed below 0": ({"input_ids": [1], "seed": -1}, "seed is -1"),
    "two seeds": ({"input_ids": [1], "seed": [1, 2]}, "seed"),
    "unknown input": ({"input_ids": [1], "arrays": {"x": np.ones(1, np.int64)}}, "'x'"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_answers_a_malformed_request_with_an_error(olmoe: Served, case: str) -> None:
    values, named = MALFORMED[case]
    answer = olmoe.ask(**values)
    assert answer.tokens == []
    assert named in answer.error
    assert olmoe.server.ready()
    good = olmoe.ask(input_ids=PROMPTS[1], max_new_tokens=4)
    assert good.tokens == olmoe.solo(PROMPTS[1], 4)


def test_answers_what_is_left_out_with_the_ingots_defaults(olmoe: Served) -> None:
    assert olmoe.ask(input_ids=[4, 5]).tokens == olmoe.solo([4, 5], 64)
    assert olmoe.ask(input_ids=[4] * 500).tokens == olmoe.solo([4] * 500, 12)


def test_loses_and_mixes_nothing_over_200_requests(olmoe: Served) -> None:
    random = np.random.default_rng(11)
    jobs: list[tuple[list[int], int, dict[str, Any]]] = []
    for number in range(200):
        prompt = random.integers(0, 512, int(random.integers(1, 40))).tolist()
        sampled = number % 2 == 1
        options: dict[str, Any] = {"temperature": 1.0, "seed": number} if sampled else {}
        jobs.append((prompt, int(random.integers(1, 48)), options))
    resident: list[int] = []
    lock = threading.Lock()

    def run(mine: list[int]) -> list[tuple[int, Answer]]:
        client = olmoe.client()
        found = []
        for number in mine:
            prompt, new, options = jobs[number]
            answer = client.ask(input_ids=prompt, max_new_tokens=new, **options)
            found.append((number, answer))
            with lock:
                resident.append(olmoe.server.resident())
        client.close()
        return found

    begin = time.perf_counter()
    with ThreadPoolExecutor(8) as pool:
        rows = pool.map(run, [list(range(start, 200, 8)) for start in range(8)])
        answers = dict(itertools.chain.from_iterable(rows))
    seconds = time.perf_counter() - begin
    assert len(answers) == 200
    session = load(olmoe.ingot)
    tokens = 0
    for number, (prompt, new, options) in enumerate(jobs):
        sampling = Sampling(**options)
        steps = generate(session, [prompt], max_new_tokens=new, sampling=sampling)
        assert answers[number].error == ""
        assert answers[number].tokens == [token for (token,) in steps], number
        tokens += new
    half, end = resident[99], max(resident[150:])
    print(
        f"\n200 requests over 8 streams: {seconds:.1f} s, {tokens / seconds:.0f} tokens/s, "
        f"resident {half / MIB:.1f} MiB after 100 and at most {end / MIB:.1f} MiB after 150"
    )
    assert end - half < 4 * MIB


def test_ends_running_streams_before_it_ends(ingots: Callable[[str], Path], tmp_path: Path) -> None:
    for served in _served(ingots("olmoe"), tmp_path, streams=2):
        client = served.client()
        client.send(input_ids=PROMPTS[0], max_new_tokens=300)
        assert client.next()[2] == ""
        served.server.process.terminate()
        final, count = False, 1
        while not final:
            _, _, error, final = client.next()
            assert error == ""
            count += 1
        assert count == 300
        client.close()
        assert served.server.process.wait(60) == 0


# Stands in for ONNX Runtime's backend, which this server does not have: it shows what of the states
# Triton's own core allocates and hands over.
SHOW_STATES = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        answers = []
        for request in requests:
            tokens = pb_utils.get_input_tensor_by_name(request, "input_ids").as_numpy()
            state = pb_utils.get_input_tensor_by_name(request, STATE)
            logits = np.zeros((*tokens.shape, 512), np.float32)
            if state is not None:
                shape = state.as_numpy().shape
                logits[0, 0, : len(shape)] = shape
                logits[0, 0, 8] = np.abs(state.as_numpy()).sum()
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor("logits", logits)]))
        return answers
"""


@pytest.mark.parametrize(
    ("family", "target", "state", "shape"),
    [
        ("olmoe", "ort", "past_key_values.0.key", [1, 2, 512, 16]),
        ("olmoe", "onnx", "past_key_values.0.key", [1, 2, 1, 16]),
        ("mamba2", "ort", "past_states.0.conv", [1, 192, 3]),
    ],
)
def test_has_its_states_made_by_tritons_core(
    make_checkpoint: MakeCheckpoint,
    make_ingot: MakeIngot,
    tmp_path: Path,
    family: str,
    target: str,
    state: str,
    shape: list[int],
) -> None:
    ingot = make_ingot(make_checkpoint(family), target)
    write_repository(ingot, tmp_path / "r", Settings(name="m"))
    config = tmp_path / "r" / "m" / "config.pbtxt"
    text = config.read_text().replace('"onnxruntime"', '"python"')
    config.write_text(text.replace('default_model_filename: "model.onnx"', ""))
    model = tmp_path / "r" / "m" / "1" / "model.py"
    model.write_text(SHOW_STATES.replace("STATE)", f'"{state}")'))
    with triton_server.boot(tmp_path / "r", "m", tmp_path / "log") as server:
        client = grpc.InferenceServerClient(server.url)
        inputs = []
        for tensor in client.get_model_config("m").config.input:
            inputs.append(grpc.InferInput(tensor.name, [1, 2], "INT64"))
            inputs[-1].set_data_from_numpy(np.ones((1, 2), dtype=np.int64))
        # Ended, since an open sequence would keep the server from ending for a minute.
        flags = {"sequence_start": True, "sequence_end": True}
        found = client.infer("m", inputs, sequence_id=7, **flags).as_numpy("logits")
        client.close()
    assert found[0, 0, : len(shape)].tolist() == shape
    assert found[0, 0, 8] == 0.0
