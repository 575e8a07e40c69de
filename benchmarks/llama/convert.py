"""llama.cpp's converter, in a process of its own: a GGUF of a Hugging Face folder.

Its classes are taken as they are, without the vocabulary: ids are fed, and its list of known
tokenizers has no small ones. ``config.json`` must name its ``architectures``, as Hugging Face's do.
One argument: JSON with ``source``, ``checkpoint``, ``out`` and ``kind``, which is F32 or BF16.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def convert(source: Path, checkpoint: Path, out: Path, kind: str) -> None:
    sys.path.insert(0, str(source / "vendor" / "llama.cpp"))
    import torch
    from conversion import ModelBase, get_model_class

    # The converter finds llama.cpp's own version of it, which fits its classes.
    import gguf  # isort: skip

    config = ModelBase.load_hparams(checkpoint, False)
    known: Any = get_model_class(config["architectures"][0])
    with torch.inference_mode():
        types = gguf.LlamaFileType
        model = known(checkpoint, types.ALL_F32 if kind == "F32" else types.MOSTLY_BF16, out)

        def set_vocab() -> None:
            model.gguf_writer.add_tokenizer_model("none")
            model.gguf_writer.add_vocab_size(config["vocab_size"])

        model.set_vocab = set_vocab
        model.write()


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    convert(Path(given["source"]), Path(given["checkpoint"]), Path(given["out"]), given["kind"])
    print("null")
