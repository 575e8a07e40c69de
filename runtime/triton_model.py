"""The Python backend of ``NAME_generate``: token streams over sessions, inside Triton's process.

A repository holds a copy of this file and of the modules it imports beside its ``1/model.py``,
because Triton's interpreter is isolated (it ignores ``PYTHONPATH``) and its image has no Ingot. Of
other packages it needs numpy and the session's runtime: onnxruntime, or TensorRT's bindings.
"""

from __future__ import annotations

import json
import queue
import threading
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# Triton puts this module into the interpreter; it is in no package.
import triton_python_backend_utils as pb_utils

from ingot.plugins.errors import IngotError
from ingot.runtime.generate import Sampling, generate
from ingot.runtime.loading import load
from ingot.runtime.session import Session, SessionError


@dataclass(frozen=True)
class Call:
    """One checked request.

    Attributes:
        prompt: token ids.
        max_new_tokens: at most so many responses.
        sampling: how a token is chosen.
        stop_ids: ids that end the stream.
    """

    prompt: list[int]
    max_new_tokens: int
    sampling: Sampling
    stop_ids: tuple[int, ...]


class TritonPythonModel:
    """What Triton calls: ``initialize`` once, ``execute`` for each request, ``finalize`` once.

    Every stream has a session and a thread. ``execute`` returns only when another stream could
    start, so that requests wait in Triton's queue: there its queue time counts them, and its
    limits and cancellations reach them.
    """

    def initialize(self, args: dict[str, str]) -> None:
        """Open the ingot and warm every stream.

        Raises:
            IngotError: the ingot is damaged, failed its validation, or does not run here.
        """
        config = json.loads(args["model_config"])
        settings = {
            name: value["string_value"] for name, value in config.get("parameters", {}).items()
        }
        # The folder of this model, or the repository's where Triton hands that over.
        home = Path(args["model_repository"])
        if home.name != args["model_name"]:
            home = home / args["model_name"]
        folder = (home / settings["ingot"]).resolve()
        streams = int(settings["streams"])
        self._capacity = int(settings["capacity"])
        self._new_tokens = int(settings["max_new_tokens"])
        operators = settings.get("operators")
        session = load(
            folder,
            threads=int(settings["threads"]),
            verify=settings["verify"] == "true",
            # Whoever wrote the repository vouched for it.
            operators=None if operators is None else home / operators,
        )
        if session.manifest.task != "generate":
            raise SessionError(f"{folder} was not exported with --task generate.")
        self._manifest = session.manifest
        self._idle: queue.SimpleQueue[Session] = queue.SimpleQueue()
        for each in (session, *(session.fork() for _ in range(streams - 1))):
            _warm(each)
            self._idle.put(each)
        self._stopping = threading.Event()
        self._workers = ThreadPoolExecutor(streams, thread_name_prefix="stream")
        self._log(
            f"{folder} is open: {streams} streams of at most {self._capacity} tokens, "
            f"{self._manifest.model_type} for {self._manifest.target}"
        )

    def execute(self, requests: list[Any]) -> None:
        """Start a stream for each request; the answers go through its response sender."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                call = self._read(request)
            except IngotError as error:
                _refuse(sender, pb_utils.TritonError.INVALID_ARG, str(error))
                continue
            self._workers.submit(self._serve, call, sender, self._idle.get())
        self._idle.put(self._idle.get())

    def finalize(self) -> None:
        """End the streams that still run, and wait for their threads."""
        self._stopping.set()
        self._workers.shutdown(wait=True)

    def _read(self, request: Any) -> Call:
        """The inputs of a request; those that are optional default to the ingot's.

        Raises:
            SessionError: what is wrong with it.
        """
        prompt = _ids(request, "input_ids")
        if prompt is None or not prompt:
            raise SessionError("input_ids holds no tokens; give at least one.")
        vocab = self._manifest.vocab_size
        for token in prompt:
            if not 0 <= token < vocab:
                raise SessionError(f"token id {token} is outside the vocabulary of {vocab}.")
        room = self._capacity - len(prompt)
        if room < 1:
            raise SessionError(
                f"a prompt of {len(prompt)} tokens leaves no room in a capacity of "
                f"{self._capacity}; shorten it, or make the repository with a larger --capacity."
            )
        new = int(_scalar(request, "max_new_tokens", min(self._new_tokens, room)))
        if not 1 <= new <= room:
            raise SessionError(
                f"max_new_tokens is {new}; with a prompt of {len(prompt)} tokens it must be 1 to "
                f"{room}."
            )
        sampling = Sampling(
            temperature=float(_scalar(request, "temperature", 0.0)),
            top_k=int(_scalar(request, "top_k", 0)),
            top_p=float(_scalar(request, "top_p", 1.0)),
            seed=int(_scalar(request, "seed", 0)),
        )
        stops = _ids(request, "stop_ids")
        if stops is None:
            stops = list(self._manifest.generation["eos_token_ids"])
        return Call(prompt, new, sampling, tuple(stops))

    def _serve(self, call: Call, sender: Any, session: Session) -> None:
        """One stream, from its first token to its final flag, whatever happens."""
        try:
            self._stream(call, sender, session)
        except IngotError as error:
            _refuse(sender, pb_utils.TritonError.INVALID_ARG, str(error))
        except Exception as error:
            self._log(traceback.format_exc())
            _refuse(sender, pb_utils.TritonError.INTERNAL, f"{type(error).__name__}: {error}")
        finally:
            # The caches of a stream that ended are not kept.
            session.reset(1, 0)
            self._idle.put(session)

    def _stream(self, call: Call, sender: Any, session: Session) -> None:
        steps = self._tokens(call, session)
        made = 0
        # Asked before each step: a cancelled stream computes no further token.
        while not sender.is_cancelled():
            if self._stopping.is_set():
                _refuse(sender, pb_utils.TritonError.UNAVAILABLE, "the server is shutting down.")
                return
            token = next(steps)
            made += 1
            reason = ""
            if token in call.stop_ids:
                reason = "stop"
            elif made == call.max_new_tokens:
                reason = "length"
            flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if reason else 0
            sender.send(_response(token, made - 1, reason), flags=flags)
            if reason:
                return
        sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    @staticmethod
    def _tokens(call: Call, session: Session) -> Iterator[int]:
        for (token,) in generate(
            session,
            [call.prompt],
            max_new_tokens=call.max_new_tokens,
            sampling=call.sampling,
            stop_ids=call.stop_ids,
        ):
            assert token is not None
            yield token

    @staticmethod
    def _log(text: str) -> None:
        pb_utils.Logger.log_info(text)


def _warm(session: Session) -> None:
    """A prefill and a decode step, so that the first request does not pay for allocations."""
    for _ in generate(session, [[0, 0]], max_new_tokens=2, stop_ids=()):
        pass
    session.reset(1, 0)


def _ids(request: Any, name: str) -> list[int] | None:
    """A vector of ids; None where the request has no such input."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return None
    array = tensor.as_numpy()
    if array.dtype != np.int64 or array.ndim != 1:
        raise SessionError(
            f"{name} is {array.dtype} of shape {list(array.shape)}; it must be int64 [tokens]."
        )
    result: list[int] = array.tolist()
    return result


def _scalar(request: Any, name: str, default: float) -> float:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return default
    array = tensor.as_numpy()
    if array.size != 1:
        raise SessionError(f"{name} has shape {list(array.shape)}; it must be [1].")
    value: float = array.reshape(()).item()
    return value


def _response(token: int, index: int, reason: str) -> Any:
    return pb_utils.InferenceResponse(
        output_tensors=[
            pb_utils.Tensor("token_id", np.array([token], dtype=np.int64)),
            pb_utils.Tensor("index", np.array([index], dtype=np.int32)),
            pb_utils.Tensor("finish_reason", np.array([reason.encode()], dtype=np.object_)),
        ]
    )


def _refuse(sender: Any, code: int, text: str) -> None:
    sender.send(
        pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(text, code)),
        flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL,
    )
