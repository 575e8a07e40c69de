"""llama.cpp's tools, in a process of their own: quantise a file, say what is in one.

One argument: JSON with ``what``, ``source``, ``threads`` and what it takes; the last line of the
output is JSON too.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.llama.model import Floats, bindings, quiet


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
    answer: Any = None
    if given["what"] == "tensors":
        answer = run_tensors(source, given)
    else:
        api = bindings(source)
        with quiet(api):
            run_quantise(api, given)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
