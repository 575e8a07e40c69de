"""SmolLM2 from its GGUF: order of rows, names, tokenizer, and the released file itself."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeIngot
from safetensors.numpy import load_file
from traces import Traces
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks import smollm2
from benchmarks.on_weights import ingots
from benchmarks.on_weights.figures import Floats, Ids, Mean, Scores
from benchmarks.on_weights.text import windows_of
from ingot.plugins.errors import IngotError
from ingot.runtime.generate import generate
from ingot.runtime.loading import load
from ingot.validate.api import validate

gguf = pytest.importorskip("gguf")

HEADS, KEY_VALUE_HEADS, HEAD = 4, 2, 8
HIDDEN, INNER, LAYERS = HEADS * HEAD, 64, 2
TOKENS = ["<|end|>", "<|start|>", "<|pad|>", "a", "b", "1", "2", "Ġ", "ab", "Ġab"]
MERGES = ["a b", "Ġ ab"]


def turned(x: np.ndarray, angles: np.ndarray, first: list[int], second: list[int]) -> np.ndarray:
    """One head whose pairs of numbers ``first[i], second[i]`` are turned by ``angles[i]``."""
    result = x.copy()
    for i, angle in enumerate(angles):
        a, b = x[first[i]], x[second[i]]
        result[first[i]] = a * np.cos(angle) - b * np.sin(angle)
        result[second[i]] = a * np.sin(angle) + b * np.cos(angle)
    return result


def test_both_orders_of_rows_give_the_same_scores() -> None:
    """By the two definitions of what is turned, at two positions; not by an order of rows."""
    random = np.random.default_rng(0)
    half = HEAD // 2
    pairs = list(range(0, HEAD, 2)), list(range(1, HEAD, 2))
    halves = list(range(half)), list(range(half, HEAD))
    angle = 0.7 ** np.arange(half)
    x = random.standard_normal((2, HIDDEN))
    q, k = (random.standard_normal((HEADS * HEAD, HIDDEN)).astype(np.float32) for _ in range(2))
    ours = [smollm2.halves_of_pairs(weight, HEADS) for weight in (q, k)]
    for head in range(HEADS):
        rows = slice(head * HEAD, (head + 1) * HEAD)
        score = [
            turned(wq[rows] @ x[0], 5 * angle, *order) @ turned(wk[rows] @ x[1], 2 * angle, *order)
            for (wq, wk), order in (((q, k), pairs), (ours, halves))
        ]
        np.testing.assert_allclose(score[1], score[0], rtol=1e-5)
    assert not np.array_equal(ours[0], q)


def llama_gguf(path: Path, weights: dict[str, np.ndarray]) -> None:
    """A GGUF of these tensors, with the metadata that SmolLM2's has."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_VALUE_HEADS)
    writer.add_rope_dimension_count(HEAD)
    writer.add_rope_freq_base(1000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    kinds = gguf.TokenType
    writer.add_token_types([kinds.CONTROL] * 3 + [kinds.NORMAL] * (len(TOKENS) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}<|start|>{{ m['content'] }}{% endfor %}")
    for name, weight in weights.items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def pairs_of_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of rows, row by row: the inverse of what is tested."""
    half = weight.shape[0] // heads // 2
    rows = [
        head * 2 * half + i + h * half for head in range(heads) for i in range(half) for h in (0, 1)
    ]
    return weight[rows]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[LlamaForCausalLM, Path]:
    """A random llama, and the folder made of its GGUF."""
    folder = tmp_path_factory.mktemp("smollm2")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        rms_norm_eps=1e-5,
        initializer_range=0.5,
        tie_word_embeddings=True,
        max_position_embeddings=64,
    )
    model: Any = LlamaForCausalLM(config)
    model.eval()
    theirs = {ours: name for name, ours in smollm2.BLOCK.items()}
    weights = {}
    for name, value in model.state_dict().items():
        weight = value.numpy()
        if name in smollm2.MODEL.values():
            weights[next(n for n, ours in smollm2.MODEL.items() if ours == name)] = weight
        elif name != "lm_head.weight":
            layer, kind = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
            heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": KEY_VALUE_HEADS}.get(kind)
            weight = weight if heads is None else pairs_of_halves(weight, heads)
            weights[f"blk.{layer}.{theirs[kind]}.weight"] = weight
    llama_gguf(folder / "model.gguf", weights)
    smollm2.convert(folder / "model.gguf", folder / "out")
    return model, folder / "out"


def test_gives_the_weights_and_logits_of_the_model_it_was_made_of(
    converted: tuple[LlamaForCausalLM, Path],
) -> None:
    model, folder = converted
    stored = load_file(folder / "model.safetensors")
    expected = {n: w for n, w in model.state_dict().items() if n != "lm_head.weight"}
    assert stored.keys() == expected.keys()
    for name, weight in expected.items():
        np.testing.assert_array_equal(stored[name], weight.numpy(), name)
    again: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_cuts_digits_apart_and_keeps_special_tokens_and_the_template(
    converted: tuple[LlamaForCausalLM, Path],
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted[1])
    text = "<|start|>ab ab12<|end|>"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert [TOKENS[at] for at in ids] == ["<|start|>", "ab", "Ġab", "1", "2", "<|end|>"]
    assert tokenizer.decode(ids) == text
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        TOKENS[1],
        TOKENS[0],
        TOKENS[2],
    )
    chat = [{"role": "user", "content": "ab"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<|start|>ab"


@pytest.mark.parametrize("name", ["blk.0.attn_q_norm.weight", "rope_freqs.weight"])
def test_refuses_a_tensor_that_a_llama_has_not(name: str) -> None:
    with pytest.raises(IngotError, match=f"{name} is no tensor of a llama"):
        smollm2.hugging_face_name(name)


SAMPLE = Path(__file__).parent / "data" / "trained" / "sample.txt"
LENGTH, WINDOWS = 96, 4


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a checkpoint folder; half a gigabyte."""
    folder = tmp_path_factory.mktemp("released") / "smollm2"
    smollm2.convert(smollm2.fetch_gguf(), folder)
    return folder


@pytest.fixture(scope="module")
def oracle(released: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(released, dtype=torch.float32)


@pytest.fixture(scope="module")
def fed(released: Path, oracle: Any) -> tuple[Ids, Floats]:
    """Windows of a text, and transformers' logits of them."""
    windows = windows_of(SAMPLE.read_text(), released / "tokenizer.json", LENGTH, WINDOWS)
    with torch.no_grad():
        return windows, oracle(torch.from_numpy(windows)).logits.numpy()


@pytest.mark.slow
def test_released_weights_answer_as_in_transformers(
    released: Path, oracle: Any, make_ingot: MakeIngot
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(released)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt: Any = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    with torch.no_grad():
        whole = oracle.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)
    expected = whole[0, len(prompt) :].tolist()
    assert "Paris" in tokenizer.decode(expected)
    session = load(make_ingot(released, "ort"))
    found = [step[0] for step in generate(session, [prompt], max_new_tokens=24)]
    assert found == expected


@pytest.mark.slow
def test_released_weights_pass_their_validation(released: Path, make_ingot: MakeIngot) -> None:
    ingot = make_ingot(released, "ort", weights="int4", symmetric=False)
    assert validate(ingot, released, plan="quick").verdict.startswith("passed")


@pytest.mark.slow
def test_fewer_bits_cost_more(
    released: Path, fed: tuple[Ids, Floats], tmp_path: Path, traces: Traces
) -> None:
    """Perplexity, divergence and likeliest tokens of the formats, with float32 activations.

    Bounds are twice what was measured on this text. The weights are Q4_1 already, and the embedding
    Q8_0, so less of them is lost in bfloat16 and int8 than of others.
    """
    windows, truth = fed
    scores: dict[str, Scores] = {}
    for chosen in ingots.formats():
        if chosen.name in ("fp32", "bf16", "int8 32 symmetric", "int4 32 asymmetric"):
            out = tmp_path / chosen.folder
            ingots.export(released, chosen.exact or chosen, out, traces)
            scores[chosen.name] = ingots.score_ingot(out, windows, truth, threads=1)
            shutil.rmtree(out)
    kl = {name: Mean.of(found.kl).value for name, found in scores.items()}
    for name, most in (("fp32", 1e-9), ("bf16", 2e-4), ("int8 32 symmetric", 4e-3)):
        assert kl[name] < most, name
    assert kl["int4 32 asymmetric"] < 0.8
    assert kl["int8 32 symmetric"] < kl["int4 32 asymmetric"]
    same = {name: found.same.mean() for name, found in scores.items()}
    assert same["fp32"] == 1.0 and same["int8 32 symmetric"] > 0.9
    assert 0.5 < same["int4 32 asymmetric"] < same["int8 32 symmetric"]
    perplexity = {name: found.perplexity for name, found in scores.items()}
    assert perplexity["int8 32 symmetric"] == pytest.approx(perplexity["fp32"], rel=0.02)
    assert perplexity["fp32"] < perplexity["int4 32 asymmetric"] < 2 * perplexity["fp32"]
