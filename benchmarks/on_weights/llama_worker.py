"""What llama.cpp does, in a process of its own: quantises a file, runs one, says what is in it.

One argument: JSON with ``what``, ``source``, ``threads`` and what it takes; the last line of the
output is JSON too.
"""

from __future__ import annotations

import ctypes
import json
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.on_weights.figures import Floats, Ids, score
from benchmarks.on_weights.rates import measure


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


def run_score(api: Any, given: dict[str, Any]) -> None:
    windows, truth = np.load(given["windows"]), np.load(given["truth"], mmap_mode="r")
    model = Model(api, given["file"], windows.shape[1], given["threads"])
    if model.vocabulary != truth.shape[-1]:
        raise SystemExit(f"{given['file']} has {model.vocabulary} tokens, not {truth.shape[-1]}")

    def logits(ids: Ids) -> Floats:
        model.reset()
        return model.step(ids, every=True)

    score(logits, windows, truth).save(Path(given["out"]))


def run_rates(api: Any, given: dict[str, Any]) -> dict[str, float]:
    prompt, new = given["prompt"], given["new"]
    model = Model(api, given["file"], prompt + new, given["threads"])
    ids = np.random.default_rng(0).integers(0, model.vocabulary, prompt)

    def step(tokens: int) -> None:
        model.step(ids[:tokens], every=False)

    return asdict(measure(model.reset, step, prompt, new))


def run_quantise(api: Any, given: dict[str, Any]) -> None:
    options = api.llama_model_quantize_default_params()
    kind = given["kind"]
    options.ftype = api.LLAMA_FTYPE_ALL_F32 if kind == "F32" else _ftype(api, kind)
    options.allow_requantize = True
    options.nthread = given["threads"]
    if given["importance"] is not None:
        by_name = importance_by_name(Path(given["source"]), given["file"], given["importance"])
        options.imatrix = importance_matrix(api, by_name)
    source, out = given["file"].encode(), given["out"].encode()
    if status := api.llama_model_quantize(source, out, ctypes.byref(options)):
        raise SystemExit(f"{given['file']} does not become {kind}: {status}")


def importance_by_name(source: Path, file: str, importance: str) -> dict[str, Floats]:
    """Each weight's importance by its name in a GGUF file.

    llama.cpp leaves out in silence what it finds no weight for, so each must have one here.
    """
    gguf = own_gguf(source)
    reader = gguf.GGUFReader(file)
    kind = reader.fields["general.architecture"].contents()
    blocks = reader.fields[f"{kind}.block_count"].contents()
    (arch,) = (at for at, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    names = gguf.get_tensor_name_map(arch, blocks)
    sizes = {tensor.name: int(tensor.shape[0]) for tensor in reader.tensors}
    found = {}
    with np.load(importance) as saved:
        for name, values in saved.items():
            theirs = f"{names.get_name(name)}.weight"
            if theirs not in sizes or len(values) % sizes[theirs]:
                raise SystemExit(f"{name} is no weight of {file}")
            found[theirs] = values
    return found


def importance_matrix(api: Any, by_name: dict[str, Floats]) -> Any:
    """The same as an array of llama.cpp's, which a name that is missing ends."""
    entries = (api.llama_model_imatrix_data * (len(by_name) + 1))()
    for entry, (name, values) in zip(entries, by_name.items(), strict=False):
        entry.name, entry.size = name.encode(), len(values)
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    return entries


def _ftype(api: Any, kind: str) -> int:
    found: int | None = getattr(api, f"LLAMA_FTYPE_MOSTLY_{kind}", None)
    if found is None:
        raise SystemExit(f"llama.cpp has no format {kind}")
    return found


def own_gguf(source: Path) -> Any:
    """llama.cpp's own version of the package that reads and writes GGUF."""
    sys.path.insert(0, str(source / "vendor" / "llama.cpp" / "gguf-py"))
    import gguf

    return gguf


def run_tensors(source: Path, given: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "name": tensor.name,
            "kind": tensor.tensor_type.name,
            "size": int(tensor.n_bytes),
            "elements": int(tensor.n_elements),
        }
        for tensor in own_gguf(source).GGUFReader(given["file"]).tensors
    ]


def main() -> None:
    given = json.loads(sys.argv[1])
    source = Path(given["source"])
    if given["what"] == "tensors":
        answer: Any = run_tensors(source, given)
    else:
        api = bindings(source)
        with quiet(api):
            run = {"score": run_score, "rates": run_rates, "quantise": run_quantise}
            answer = run[given["what"]](api, given)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
