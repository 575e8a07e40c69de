"""The Python model: streams of tokens, over a stand-in for what Triton gives it."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from kinds import KINDS
from triton_ingots import parsed

from ingot.export.ingot import GRAPH, LIBRARY
from ingot.plugins.errors import IngotError
from ingot.runtime import operators
from ingot.runtime.generate import Sampling, generate
from ingot.runtime.loading import load
from ingot.runtime.session import SessionError
from ingot.runtime.triton_plan import Settings
from ingot.runtime.triton_repository import write_repository

# Minutes of exports; `make test-slow` runs them, and so does CI.
pytestmark = pytest.mark.slow

PROMPT = [17, 300, 5, 44, 101, 256, 7]
FINAL = 1


class FakeTensor:
    def __init__(self, name: str, array: Any) -> None:
        self.name, self.array = name, array

    def as_numpy(self) -> Any:
        return self.array


class FakeError:
    INTERNAL, INVALID_ARG, UNAVAILABLE = range(3)

    def __init__(self, text: str, code: int) -> None:
        self.text, self.code = text, code


class FakeResponse:
    def __init__(self, output_tensors: list[FakeTensor], error: FakeError | None = None) -> None:
        self.values = {tensor.name: tensor.array for tensor in output_tensors}
        self.error = error


@dataclass
class FakeSender:
    """Keeps what is sent.

    Attributes:
        cancel_after: responses, after which the client cancels.
        meet: where every response waits for those of the other streams.
    """

    cancel_after: int = 10**9
    meet: threading.Barrier | None = None
    tokens: list[int] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    error: FakeError | None = None
    done: threading.Event = field(default_factory=threading.Event)

    def is_cancelled(self) -> bool:
        return len(self.tokens) >= self.cancel_after

    def send(self, response: FakeResponse | None = None, flags: int = 0) -> None:
        assert not self.done.is_set(), "a response behind the final one"
        if response is not None and response.error is not None:
            self.error = response.error
        elif response is not None:
            assert response.values["index"].tolist() == [len(self.tokens)]
            self.tokens.append(int(response.values["token_id"][0]))
            self.reasons.append(response.values["finish_reason"][0].decode())
        if flags == FINAL:
            self.done.set()
        if self.meet is not None and response is not None and response.error is None:
            self.meet.wait(30)


class FakeRequest:
    def __init__(self, sender: FakeSender, **inputs: Any) -> None:
        self.sender, self.inputs = sender, inputs

    def get_response_sender(self) -> FakeSender:
        return self.sender


def _input(request: FakeRequest, name: str) -> FakeTensor | None:
    if name not in request.inputs:
        return None
    value = request.inputs[name]
    if isinstance(value, np.ndarray):
        return FakeTensor(name, value)
    kind = {"temperature": np.float32, "top_p": np.float32, "input_ids": np.int64}
    kind |= {"stop_ids": np.int64, "seed": np.int64}
    array = np.array(value if isinstance(value, list) else [value], kind.get(name, np.int32))
    return FakeTensor(name, array)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """``runtime.triton_model`` over a stand-in for what Triton gives it."""
    fake = types.ModuleType("triton_python_backend_utils")
    members = {
        "Tensor": FakeTensor,
        "TritonError": FakeError,
        "InferenceResponse": FakeResponse,
        "TRITONSERVER_RESPONSE_COMPLETE_FINAL": FINAL,
        "get_input_tensor_by_name": _input,
        "Logger": types.SimpleNamespace(log_info=lambda text: None),
    }
    for name, member in members.items():
        setattr(fake, name, member)
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    monkeypatch.delitem(sys.modules, "ingot.runtime.triton_model", raising=False)
    module = importlib.import_module("ingot.runtime.triton_model")
    yield module
    monkeypatch.delitem(sys.modules, "ingot.runtime.triton_model")


@pytest.fixture
def started(backend: Any) -> Iterator[Callable[..., Any]]:
    """``started(repository, **parameters)``: its model, initialised as Triton does."""
    models = []

    def start(repository: Path, **changes: str) -> Any:
        config = parsed(repository / "m_generate" / "config.pbtxt")
        parameters = {
            name: {"string_value": changes.get(name, value.string_value)}
            for name, value in config.parameters.items()
        }
        model = backend.TritonPythonModel()
        model.initialize(
            {
                "model_config": json.dumps({"parameters": parameters}),
                "model_repository": str(repository / "m_generate"),
                "model_name": "m_generate",
            }
        )
        models.append(model)
        return model

    yield start
    for model in models:
        model.finalize()


def _solo(ingot: Path, prompt: list[int], new: int, **options: Any) -> list[int]:
    steps = generate(load(ingot), [prompt], max_new_tokens=new, **options)
    return [token for (token,) in steps if token is not None]


def _ask(model: Any, **inputs: Any) -> FakeSender:
    sender = FakeSender()
    model.execute([FakeRequest(sender, **inputs)])
    assert sender.done.wait(30)
    return sender


def test_streams_one_token_a_response(
    started: Callable[..., Any], repository: Path, tiny_ort: Path
) -> None:
    model = started(repository)
    sender = _ask(model, input_ids=PROMPT, max_new_tokens=16)
    assert sender.tokens == _solo(tiny_ort, PROMPT, 16)
    assert sender.reasons == [""] * 15 + ["length"]
    sampled = _ask(model, input_ids=PROMPT, max_new_tokens=16, temperature=1.5, seed=3)
    assert sampled.tokens == _solo(tiny_ort, PROMPT, 16, sampling=Sampling(1.5, seed=3))
    stop = sampled.tokens[4]
    stopped = _ask(model, input_ids=PROMPT, temperature=1.5, seed=3, stop_ids=[7, stop])
    assert stopped.tokens == sampled.tokens[: sampled.tokens.index(stop) + 1]
    assert stopped.reasons[-1] == "stop"
    # By default 64 tokens, or as many as there is room for.
    assert len(_ask(model, input_ids=PROMPT).tokens) == 64
    assert len(_ask(model, input_ids=[1] * 510).tokens) == 2


def test_streams_from_ingots_own_kernels(
    started: Callable[..., Any],
    own_kernels: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = _solo(own_kernels, PROMPT, 16)
    write_repository(own_kernels, tmp_path / "r", Settings(name="m", streams=2))
    # Where a server runs, no Ingot is installed.
    monkeypatch.setattr(operators, "INSTALLED", tmp_path / "none.so")
    model = started(tmp_path / "r")
    assert _ask(model, input_ids=PROMPT, max_new_tokens=16).tokens == expected
    library = tmp_path / "r" / "m_generate" / "ingot" / LIBRARY
    content = library.read_bytes()
    # Another file: the one that was there is mapped by the model that runs.
    library.unlink()
    library.write_bytes(content[:-1] + b"?")
    # Also where the operator of the server has hashes left out.
    with pytest.raises(IngotError, match="another library of kernels"):
        started(tmp_path / "r", verify="false")


@pytest.mark.parametrize("family", KINDS)
def test_keeps_the_state_of_each_stream_apart(
    started: Callable[..., Any], ingots: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    ingot = ingots(family)
    write_repository(ingot, tmp_path / "r", Settings(name="m", streams=3))
    model = started(tmp_path / "r")
    meet = threading.Barrier(3)
    prompts = [PROMPT, [411], [9, 8, 207]]
    senders = [FakeSender(meet=meet) for _ in prompts]
    options = {"temperature": 1.0, "max_new_tokens": 12}
    # All three take each step together, so whatever they shared would show.
    threading.Thread(
        target=model.execute,
        args=(
            [
                FakeRequest(sender, input_ids=prompt, **options)
                for sender, prompt in zip(senders, prompts, strict=True)
            ],
        ),
    ).start()
    for sender, prompt in zip(senders, prompts, strict=True):
        assert sender.done.wait(30) and sender.error is None
        assert sender.tokens == _solo(ingot, prompt, 12, sampling=Sampling(1.0))


def test_holds_the_weights_once_for_all_streams(
    started: Callable[..., Any], repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    real = onnxruntime.InferenceSession

    def counted(*arguments: Any, **options: Any) -> Any:
        opened.append(arguments)
        return real(*arguments, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", counted)
    started(repository, streams="6")
    assert len(opened) == 1


def test_lets_triton_keep_what_waits_for_a_stream(
    started: Callable[..., Any], repository: Path
) -> None:
    model = started(repository, streams="2")
    meet = threading.Barrier(2)
    first, second = FakeSender(meet=meet), FakeSender()
    # The first stops at its first token until it is met there.
    model.execute([FakeRequest(first, input_ids=PROMPT, max_new_tokens=1)])
    caller = threading.Thread(
        target=model.execute,
        args=([FakeRequest(second, input_ids=PROMPT, max_new_tokens=4, temperature=1.0)],),
    )
    caller.start()
    assert second.done.wait(30)
    caller.join(30)
    assert not caller.is_alive()
    third = FakeSender(meet=meet)
    busy = threading.Thread(
        target=model.execute, args=([FakeRequest(third, input_ids=PROMPT, max_new_tokens=2)],)
    )
    # Both streams are taken now, so `execute` keeps the caller and with it the queue.
    blocked = threading.Barrier(2)
    third.meet = blocked
    busy.start()
    busy.join(0.5)
    assert busy.is_alive()
    meet.wait(30)
    busy.join(30)
    assert not busy.is_alive()
    for _ in range(2):
        blocked.wait(30)
    assert third.done.wait(30)


@pytest.mark.parametrize("after", [0, 3])
def test_stops_a_cancelled_stream_and_frees_it(
    started: Callable[..., Any], repository: Path, tiny_ort: Path, after: int
) -> None:
    model = started(repository, streams="1")
    sender = FakeSender(cancel_after=after)
    model.execute([FakeRequest(sender, input_ids=PROMPT, max_new_tokens=400)])
    assert sender.done.wait(30)
    assert len(sender.tokens) == after and sender.error is None
    assert _ask(model, input_ids=[5], max_new_tokens=4).tokens == _solo(tiny_ort, [5], 4)
    session = model._idle.get()
    assert session.state()["present.0.key"].size == 0
    model._idle.put(session)


MALFORMED: dict[str, tuple[dict[str, Any], str]] = {
    "wrong dtype": ({"input_ids": np.ones(2, np.int32)}, "input_ids is int32"),
    "wrong rank": ({"input_ids": np.ones((1, 2), np.int64)}, "of shape [1, 2]"),
    "none": ({}, "input_ids holds no tokens"),
    "empty": ({"input_ids": []}, "input_ids holds no tokens"),
    "out of vocabulary": ({"input_ids": [3, 512]}, "token id 512 is outside"),
    "below 0": ({"input_ids": [-1]}, "token id -1 is outside"),
    "too long": ({"input_ids": [1] * 512}, "leaves no room in a capacity of 512"),
    "too many": ({"input_ids": [1] * 500, "max_new_tokens": 13}, "it must be 1 to 12"),
    "no new": ({"input_ids": [1], "max_new_tokens": 0}, "max_new_tokens is 0"),
    "NaN": ({"input_ids": [1], "temperature": float("nan")}, "temperature is nan"),
    "top-p": ({"input_ids": [1], "top_p": float("nan")}, "top-p is nan"),
    "top-k": ({"input_ids": [1], "top_k": -1}, "top-k is -1"),
    "two": ({"input_ids": [1], "seed": [1, 2]}, "seed has shape [2]"),
    "stop ids": ({"input_ids": [1], "stop_ids": np.ones((1, 1), np.int64)}, "stop_ids is int64"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_refuses_a_malformed_request_and_serves_the_next(
    started: Callable[..., Any], repository: Path, case: str
) -> None:
    inputs, sentence = MALFORMED[case]
    model = started(repository, streams="1")
    sender = _ask(model, **inputs)
    assert sender.tokens == [] and sender.error is not None
    assert sender.error.code == FakeError.INVALID_ARG and sentence in sender.error.text
    assert len(_ask(model, input_ids=[1], max_new_tokens=2).tokens) == 2


def test_survives_a_fault_in_a_stream(
    started: Callable[..., Any], repository: Path, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = started(repository, streams="1")

    def broken(*_: Any, **__: Any) -> Iterator[list[int]]:
        yield [5]
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(backend, "generate", broken)
        sender = _ask(model, input_ids=PROMPT)
    assert sender.tokens == [5] and sender.error is not None
    assert sender.error.code == FakeError.INTERNAL
    assert sender.error.text == "RuntimeError: out of memory"
    assert len(_ask(model, input_ids=[1], max_new_tokens=2).tokens) == 2


def test_ends_its_streams_when_it_is_finalized(
    started: Callable[..., Any], repository: Path
) -> None:
    model = started(repository, streams="2")
    meet = threading.Barrier(2)
    sender = FakeSender(meet=meet)
    model.execute([FakeRequest(sender, input_ids=PROMPT, max_new_tokens=400)])
    ending = threading.Thread(target=model.finalize)
    ending.start()
    assert model._stopping.wait(30)
    meet.wait(30)
    ending.join(30)
    assert not ending.is_alive()
    assert len(sender.tokens) == 1 and sender.error is not None
    assert sender.error.code == FakeError.UNAVAILABLE


def test_opens_no_ingot_that_is_damaged_or_has_no_tokens(
    started: Callable[..., Any], copied: Path, ingots: Callable[..., Path]
) -> None:
    place = copied / "m" / "1"
    (place / GRAPH).write_bytes((place / GRAPH).read_bytes()[::-1])
    with pytest.raises(IngotError, match="is not the file that was validated"):
        started(copied)
    shutil.rmtree(place)
    shutil.copytree(ingots("olmoe", task="features"), place)
    with pytest.raises(SessionError, match="not exported with --task generate"):
        started(copied)
