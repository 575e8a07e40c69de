"""llama.cpp as ``benchmarks/weights.py`` has it, by its own converter and quantiser."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks import smollm2
from benchmarks.llama.library import SOURCE, LlamaCpp, LlamaCppError
from benchmarks.on_peers.models import Model
from benchmarks.on_peers.program import Format, Made, PeerError, refusal
from benchmarks.pinned import FetchError
from ingot.plugins.whole import staged_file

NAME = "llama.cpp"
WHOLE = "F32"
# The checkpoints' own, and what quantisers read: nothing is lost by it.
STORED = "BF16"


@dataclass
class Llama:
    """``Program`` of llama.cpp.

    Attributes:
        work: where it is built and its files are kept.
        threads: of its quantiser.
    """

    work: Path
    threads: int
    built: LlamaCpp | None = None
    name: str = NAME
    # Its products of bfloat16 round activations to it as well, those of the others to int8; and
    # its cache is in float16, but for F32, which is to be float32 throughout.
    formats: tuple[Format, ...] = (
        Format("F32", {"kind": WHOLE}, exact=True),
        Format("BF16", {"kind": STORED}),
        Format("Q8_0", {"kind": "Q8_0"}),
        Format("Q4_K_M", {"kind": "Q4_K_M"}),
    )

    def prepare(self) -> None:
        try:
            self.built = LlamaCpp.prepare(self.work / "llama.cpp", smollm2.DOWNLOADS, self.threads)
        except FetchError as error:
            raise PeerError("cannot be installed", str(error)) from error
        except LlamaCppError as error:
            raise PeerError("cannot be built", str(error)) from error

    def make(self, model: Model, chosen: Format) -> Made:
        assert self.built is not None
        kind = chosen.options["kind"]
        file = self._file(model, kind)
        if not file.is_file():
            whole = file if kind in (WHOLE, STORED) else self._file(model, STORED)
            try:
                if not whole.is_file():
                    with staged_file(whole) as made:
                        self.built.convert(model.checkpoint, made, whole.stem)
                if whole != file:
                    with staged_file(file) as made:
                        self.built.quantise(whole, made, kind)
            except LlamaCppError as error:
                raise refusal(str(error), 1) from error
        given = {"source": str(self.built.folder / "source"), "exact": chosen.exact}
        variables = {"LLAMA_CPP_LIB_PATH": str(self.built.folder / "library")}
        python = Path(sys.executable)
        return Made(file, (file,), "run_llama_cpp.py", python, given, variables)

    def _file(self, model: Model, kind: str) -> Path:
        return self.work / "gguf" / model.family / f"{kind}.gguf"

    def versions(self) -> dict[str, str]:
        return {SOURCE.name: SOURCE.version}
