"""llama.cpp's library by its ctypes bindings: a GGUF file that is loaded and run."""

from __future__ import annotations

import ctypes
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


def bindings(source: Path) -> Any:
    """The ctypes bindings of the package, without what else the package imports for its server."""
    package = types.ModuleType("llama_cpp")
    package.__path__ = [str(source / "llama_cpp")]
    sys.modules["llama_cpp"] = package
    from llama_cpp import llama_cpp

    llama_cpp.llama_backend_init()
    return llama_cpp


class Model:
    """A GGUF file that is loaded, and the state of one sequence."""

    def __init__(self, api: Any, file: str, room: int, threads: int, *, exact: bool = True) -> None:
        """Args:
        api: the bindings.
        file: a GGUF.
        room: tokens of the sequence.
        threads: of every call.
        exact: a whole sequence in one call, over a cache in float32, which the default of float16
            adds errors to; False leaves llama.cpp the choices that make it fast.
        """
        self.api, self.file, self.room = api, file, room
        model_options = api.llama_model_default_params()
        model_options.n_gpu_layers = 0
        self.model = api.llama_model_load_from_file(file.encode(), model_options)
        if not self.model:
            raise SystemExit(f"{file} is not loaded")
        options = api.llama_context_default_params()
        options.n_ctx = options.n_batch = room
        options.n_threads = options.n_threads_batch = threads
        if exact:
            options.n_ubatch = room
            options.type_k = options.type_v = api.GGML_TYPE_F32
            options.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = api.llama_init_from_model(self.model, options)
        if not self.context:
            raise SystemExit(f"{file} gets no context of {room} tokens")
        self.vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        self.batch = api.llama_batch_init(room, 0, 1)
        self.seen = 0

    def reset(self) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        self.seen = 0

    def step(self, ids: Ids, *, every: bool) -> Floats:
        """``[L, V]`` logits of every token, or ``[1, V]`` of the last, until the next call."""
        batch = self.batch
        batch.n_tokens = len(ids)
        for at, token in enumerate(ids):
            batch.token[at], batch.pos[at] = int(token), self.seen + at
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, 0
            batch.logits[at] = every or at == len(ids) - 1
        if status := self.api.llama_decode(self.context, batch):
            raise SystemExit(f"{self.file} refuses {len(ids)} tokens behind {self.seen}: {status}")
        self.seen += len(ids)
        rows = len(ids) if every else 1
        logits = self.api.llama_get_logits(self.context)
        return np.ctypeslib.as_array(
            ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (rows, self.vocabulary)
        )


@contextmanager
def quiet(api: Any) -> Iterator[list[str]]:
    """What llama.cpp says goes into a list; without this it fills the terminal."""
    said: list[str] = []

    @api.llama_log_callback  # type: ignore[untyped-decorator]
    def log(_level: int, text: bytes, _data: object) -> None:
        said.append(text.decode(errors="replace"))

    api.llama_log_set(log, None)
    try:
        yield said
    except SystemExit as error:
        sys.exit("".join(said[-12:]) + str(error))
