"""Generation: greedy against transformers, sampling against arithmetic, and the command line."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import MakeCheckpoint, MakeIngot
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import OlmoeForCausalLM

from ingot.export.ingot import MANIFEST
from ingot.runtime.cli import main
from ingot.runtime.generate import Sampling, choose, generate, pad_left
from ingot.runtime.loading import load
from ingot.runtime.session import Floats, Session, SessionError

PROMPTS = [[17, 300, 5, 44, 101, 256, 7], [411], [9, 8, 207]]
NEW = 32


@pytest.fixture(scope="module", params=["onnx", "ort"])
def ingot(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(f"tiny_{request.param}")
    return path


@pytest.fixture(scope="module")
def session(tiny_ort: Path) -> Session:
    return load(tiny_ort)


@pytest.fixture(scope="module")
def oracle(tiny: Path) -> list[list[int]]:
    """What transformers generates greedily from each prompt alone."""
    model: Any = OlmoeForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    rows = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False
            )
        rows.append(out[0, len(prompt) :].tolist())
    return rows


def _rows(
    session: Session, prompts: list[list[int]], max_new_tokens: int = NEW, **options: Any
) -> list[list[int | None]]:
    """One list of tokens a prompt."""
    steps = list(generate(session, prompts, max_new_tokens=max_new_tokens, **options))
    return [list(row) for row in zip(*steps, strict=True)]


def test_generates_greedily_what_transformers_does(ingot: Path, oracle: list[list[int]]) -> None:
    session = load(ingot)
    assert [len(row) for row in oracle] == [NEW] * 3
    # A model that repeats one token would hide a wrong position or cache.
    assert all(len(set(row)) > 3 for row in oracle)
    for prompt, expected in zip(PROMPTS, oracle, strict=True):
        assert _rows(session, [prompt]) == [expected]


def test_generates_for_a_batch_what_it_does_for_each_alone(
    ingot: Path, oracle: list[list[int]]
) -> None:
    assert _rows(load(ingot), PROMPTS) == oracle


def test_pads_on_the_left() -> None:
    ids, mask = pad_left([[5, 6, 7], [8]], pad=1)
    assert ids.tolist() == [[5, 6, 7], [1, 1, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert ids.dtype == np.int64 and mask.dtype == np.int64


def test_repeats_a_seed_and_differs_for_another(session: Session) -> None:
    def sampled(seed: int) -> list[list[int | None]]:
        return _rows(session, PROMPTS, sampling=Sampling(temperature=1.0, seed=seed))

    first = sampled(0)
    assert sampled(0) == first
    assert sampled(1) != first
    assert first != _rows(session, PROMPTS)
    # Equal prompts in one batch draw their own numbers.
    twice = _rows(session, [PROMPTS[0]] * 2, sampling=Sampling(temperature=1.0))
    assert twice[0] != twice[1]


def _draws(logits: list[float], sampling: Sampling, count: int) -> Counter[int]:
    rows: Floats = np.tile(np.array(logits, dtype=np.float32), (count, 1))
    return Counter(choose(rows, sampling, np.random.default_rng(sampling.seed)).tolist())


def _expected(logits: list[float], sampling: Sampling) -> dict[int, float]:
    """Token -> probability, by the definitions and in plain Python."""
    weights = {token: math.exp(logit / sampling.temperature) for token, logit in enumerate(logits)}
    likeliest = sorted(weights, key=lambda token: (-weights[token], token))
    if sampling.top_k:
        likeliest = likeliest[: sampling.top_k]
    total = sum(weights[token] for token in likeliest)
    kept: dict[int, float] = {}
    for token in likeliest:
        # The fewest tokens whose probabilities reach top_p.
        if sum(kept.values()) / total >= sampling.top_p:
            break
        kept[token] = weights[token]
    return {token: weight / sum(kept.values()) for token, weight in kept.items()}


COUNT = 5_000
LOGITS = [0.3, 2.0, -1.0, 1.2, 0.9, -1.8, 1.9, 0.0]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.7),
        Sampling(temperature=3.0),
        Sampling(temperature=1.0, top_k=3),
        Sampling(temperature=2.0, top_k=100),
        Sampling(temperature=1.0, top_p=0.5),
        Sampling(temperature=1.0, top_p=0.8),
        Sampling(temperature=1.0, top_p=0.999),
        Sampling(temperature=1.0, top_p=1e-9),
        Sampling(temperature=1.5, top_k=4, top_p=0.7, seed=5),
        Sampling(temperature=0.7, top_k=2, top_p=0.99),
    ],
    ids=str,
)
def test_draws_from_the_distribution_it_promises(sampling: Sampling) -> None:
    expected = _expected(LOGITS, sampling)
    drawn = _draws(LOGITS, sampling, COUNT)
    assert set(drawn) == set(expected)
    # Pearson's statistic has mean n and variance 2n for n degrees of freedom.
    chi_square = sum((drawn[t] - COUNT * p) ** 2 / (COUNT * p) for t, p in expected.items())
    freedom = len(expected) - 1
    assert chi_square <= freedom + 4 * math.sqrt(2 * freedom)


def test_notices_a_wrong_distribution() -> None:
    # The bound above must be narrow enough to see a temperature that is 10 % off.
    expected = _expected(LOGITS, Sampling(temperature=1.0))
    drawn = _draws(LOGITS, Sampling(temperature=1.1), COUNT)
    chi_square = sum((drawn[t] - COUNT * p) ** 2 / (COUNT * p) for t, p in expected.items())
    assert chi_square > 7 + 4 * math.sqrt(14)


def test_is_greedy_with_a_top_k_of_one_or_hardly_any_temperature() -> None:
    logits = np.random.default_rng(0).normal(size=(50, 512)).astype(np.float32)
    random = np.random.default_rng(0)
    greedy = choose(logits, Sampling(), random)
    assert greedy.tolist() == [max(range(512), key=row.__getitem__) for row in logits.tolist()]
    for sampling in (
        Sampling(temperature=1.0, top_k=1),
        Sampling(temperature=9.0, top_p=1e-12),
        Sampling(temperature=1e-30),
        Sampling(temperature=5e-324),
    ):
        assert choose(logits, sampling, random).tolist() == greedy.tolist(), sampling


def test_takes_the_lower_id_of_two_equal_logits() -> None:
    logits = np.array([[0.0, 3.0, 3.0, 1.0]], dtype=np.float32)
    random = np.random.default_rng(0)
    assert choose(logits, Sampling(), random).tolist() == [1]
    assert choose(logits, Sampling(temperature=1.0, top_k=1), random).tolist() == [1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_takes_no_token_from_broken_logits(bad: str, temperature: float) -> None:
    random = np.random.default_rng(0)
    logits = np.array([[1.0, 2.0, 3.0], [1.0, float(bad), 3.0]], dtype=np.float32)
    with pytest.raises(SessionError, match=rf"the logits hold {bad}.*wider precision"):
        choose(logits, Sampling(temperature), random)
    # Ruled out is not broken.
    logits[1, 1] = -np.inf
    assert choose(logits, Sampling(), random).tolist() == [2, 2]


def test_draws_large_logits_without_overflow() -> None:
    drawn = _draws([10_000.0, 10_000.0, -10_000.0], Sampling(temperature=1.0), 1000)
    assert set(drawn) == {0, 1} and 400 < drawn[0] < 600


def test_ends_each_row_at_its_own_stop_id(ingot: Path, oracle: list[list[int]]) -> None:
    session = load(ingot)
    stop = {oracle[0][4], oracle[1][9]}
    # What a row gives up to its first stop id, that id included.
    ends = [next((i for i, token in enumerate(row) if token in stop), NEW) for row in oracle]
    assert len(set(ends)) > 1, "the rows must end at different steps"
    expected = [
        [token if step <= end else None for step, token in enumerate(row)]
        for row, end in zip(oracle, ends, strict=True)
    ]
    found = _rows(session, PROMPTS, stop_ids=sorted(stop))
    steps = min(max(ends) + 1, NEW)
    assert found == [row[:steps] for row in expected]
    assert [row[end] in stop for row, end in zip(found, ends, strict=True) if end < NEW]


def test_stops_when_every_row_has_ended(session: Session, oracle: list[list[int]]) -> None:
    everything = list(range(512))
    assert _rows(session, PROMPTS, stop_ids=everything) == [[row[0]] for row in oracle]


def test_takes_its_stop_ids_from_the_ingot_unless_given(
    tiny_ort: Path, tmp_path: Path, oracle: list[list[int]]
) -> None:
    folder = shutil.copytree(tiny_ort, tmp_path / "ingot")
    raw = json.loads((folder / MANIFEST).read_text())
    raw["generation"]["eos_token_ids"] = [oracle[0][3], 511]
    (folder / MANIFEST).write_text(json.dumps(raw))
    end = oracle[0].index(oracle[0][3]) + 1
    session = load(folder)
    assert _rows(session, PROMPTS[:1]) == [oracle[0][:end]]
    assert _rows(session, PROMPTS[:1], stop_ids=()) == [oracle[0]]


def test_fits_exactly_into_the_context(session: Session) -> None:
    assert session.manifest.generation["context_length"] == 512
    assert len(_rows(session, [[3] * 500], 12)[0]) == 12
    with pytest.raises(SessionError, match=r"501 tokens and 12 new ones exceed .* context of 512"):
        _rows(session, [[3] * 501], 12)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "every prompt needs at least one token"),
        ([[]], "every prompt needs at least one token"),
        ([[1, 2], []], "every prompt needs at least one token"),
        ([[3] * 600], "a prompt of 600 tokens .* context of 512"),
        ([[1, 512]], "token id 512 is outside the vocabulary of 512"),
        ([[1], [2, -1, 3]], "token id -1 is outside the vocabulary of 512"),
        ([[1, 10**30]], f"token id {10**30} is in no vocabulary"),
    ],
)
def test_refuses_a_prompt_it_cannot_continue(
    session: Session, prompts: list[list[int]], message: str
) -> None:
    with pytest.raises(SessionError, match=message):
        _rows(session, prompts, 4)
    # The refusal leaves the session usable.
    assert len(_rows(session, [[1, 2]], 4)[0]) == 4


@pytest.mark.parametrize("sampling", ["greedy", 5, {}, {"temperature": 1.0}])
def test_refuses_a_sampling_that_is_none(session: Session, sampling: Any) -> None:
    with pytest.raises(SessionError, match=r"sampling is .* must be a Sampling"):
        list(generate(session, [[1]], sampling=sampling))


@pytest.mark.parametrize("count", [0, -3])
def test_refuses_to_make_no_tokens(session: Session, count: int) -> None:
    with pytest.raises(SessionError, match=f"max_new_tokens is {count}; it must be at least 1"):
        _rows(session, [[1]], count)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", -0.5),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.0001),
        ("top_p", -0.1),
        ("top_p", math.nan),
        ("seed", -1),
    ],
)
def test_refuses_a_sampling_value_out_of_range(field: str, value: float) -> None:
    with pytest.raises(SessionError, match=f"{field.replace('_', '-')} is {value}"):
        Sampling(**{field: value})  # type: ignore[arg-type]


def test_refuses_an_ingot_without_logits(tiny: Path, make_ingot: MakeIngot) -> None:
    session = load(make_ingot(tiny, "onnx", task="features"))
    with pytest.raises(SessionError, match=r"'features' and cannot generate; .*--task generate"):
        _rows(session, [[1, 2]], 4)


def _invoke(ingot: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["generate", str(ingot), *arguments])


def test_prints_64_ids(ingot: Path) -> None:
    result = _invoke(ingot, "--prompt-ids", "17,300,5,44,101,256,7")
    assert result.exit_code == 0, result.output
    expected = _rows(load(ingot), [PROMPTS[0]], 64)
    assert [int(token) for token in result.stdout.split()] == expected[0]
    assert result.stdout.endswith("\n") and result.stdout.count("\n") == 1
    assert re.fullmatch(r"prefill [\d.]+ s, decode [\d.]+ tokens/s\n", result.stderr)


def test_prints_one_line_for_each_of_several_prompts(
    session: Session, tiny_ort: Path, oracle: list[list[int]]
) -> None:
    prompts = [piece for prompt in PROMPTS for piece in ("--prompt-ids", str(prompt)[1:-1])]
    result = _invoke(tiny_ort, *prompts, "--max-new-tokens", str(NEW))
    assert [[int(t) for t in line.split()] for line in result.stdout.splitlines()] == oracle
    # An ended row prints what it made and no placeholder.
    stopped = _invoke(tiny_ort, *prompts, "--stop-id", str(oracle[0][0]), "--max-new-tokens", "9")
    found = _rows(session, PROMPTS, 9, stop_ids=[oracle[0][0]])
    made = [[token for token in row if token is not None] for row in found]
    assert [[int(t) for t in line.split()] for line in stopped.stdout.splitlines()] == made
    assert len(made[0]) == 1


@pytest.mark.parametrize("chunk", [1, 2, 3, 6, 7, 8, 0])
def test_generates_the_same_whatever_the_pieces_of_its_prompt(
    ingot: Path, oracle: list[list[int]], chunk: int
) -> None:
    session = load(ingot)
    assert _rows(session, PROMPTS, prefill_chunk=chunk) == oracle
    assert _rows(session, PROMPTS[:1], prefill_chunk=chunk) == oracle[:1]


def _calls(session: Session, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Rows, tokens and ``logits_to_keep`` of each call that follows."""
    found: list[tuple[int, ...]] = []
    step = session.step

    def recorded(ids: Any, mask: Any, logits_to_keep: int = 0) -> Any:
        found.append((*ids.shape, logits_to_keep))
        return step(ids, mask, logits_to_keep)

    monkeypatch.setattr(session, "step", recorded)
    return found


def test_feeds_a_prompt_in_pieces(
    ingots: Callable[..., Path], tiny_ort: Path, tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, pieces = [(2, 7, 1), (2, 1, 1)], [(2, 3, 1), (2, 3, 1), (2, 1, 1), (2, 1, 1)]
    for ingot, rows, expected in (
        # Several rows over shared buffers would be fed token by token.
        (tiny_ort, 2, whole),
        (tiny_ort, 1, pieces),
        (tiny_onnx, 2, pieces),
        (ingots("mamba2", "ort"), 2, pieces),
    ):
        session = load(ingot)
        calls = _calls(session, monkeypatch)
        _rows(session, PROMPTS[:rows], 2, prefill_chunk=3)
        assert calls == [(rows, *rest) for _, *rest in expected]
    session = load(tiny_onnx)
    calls = _calls(session, monkeypatch)
    _rows(session, [[5] * 509], 2)
    assert calls == [(1, 509, 1), (1, 1, 1)]


def test_feeds_a_prompt_whole_where_its_length_turns_the_positions(
    make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot, monkeypatch: pytest.MonkeyPatch
) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    checkpoint = make_checkpoint("granite", rope_parameters=rope, max_position_embeddings=16)
    session = load(make_ingot(checkpoint, "onnx"))
    assert session.manifest.generation["switch_length"] == 16
    calls = _calls(session, monkeypatch)
    _rows(session, [[7] * 16], 1, prefill_chunk=10)
    _rows(session, [[7] * 17], 1, prefill_chunk=10)
    assert calls == [(1, 10, 1), (1, 6, 1), (1, 17, 1)]


def test_feeds_a_prompt_whole_to_what_cannot_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    session = load(Path(__file__).parent / "data" / "schema1" / "granite-ort")
    expected = _rows(session, [[3, 1, 4, 1, 5]], 4, prefill_chunk=0)
    calls = _calls(session, monkeypatch)
    assert _rows(session, [[3, 1, 4, 1, 5]], 4, prefill_chunk=2) == expected
    assert calls[0] == (1, 5, 1)


def test_passes_its_options_on(session: Session, tiny_ort: Path) -> None:
    options = ["--temperature", "0.9", "--top-k", "40", "--top-p", "0.95", "--seed", "11"]
    result = _invoke(tiny_ort, "--prompt-ids", "1 2 3", "--max-new-tokens", "20", *options)
    sampling = Sampling(temperature=0.9, top_k=40, top_p=0.95, seed=11)
    expected = _rows(session, [[1, 2, 3]], 20, sampling=sampling)
    assert [int(token) for token in result.stdout.split()] == expected[0]
    chunked = _invoke(tiny_ort, "--prompt-ids", "1 2 3", *options, "--prefill-chunk", "-1")
    assert "prefill_chunk is -1; it must be a whole number, 0 for no pieces" in chunked.output
    for changed in (["--seed", "12"], ["--temperature", "3"], ["--top-k", "2"], ["--top-p", ".2"]):
        other = _invoke(
            tiny_ort, "--prompt-ids", "1 2 3", "--max-new-tokens", "20", *options, *changed
        )
        assert other.exit_code == 0 and other.stdout != result.stdout, changed


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--prompt-ids", "1,x"], "'1,x' is not a list of token ids"),
        (["--prompt-ids", "1.5"], "'1.5' is not a list of token ids"),
        (["--prompt-ids", "1_0"], "'1_0' is not a list of token ids"),
        (["--prompt-ids", "1,٣"], "'1,٣' is not a list of token ids"),
        (["--prompt-ids", "1e2"], "'1e2' is not a list of token ids"),
        (["--prompt-ids", "[1]"], "'[1]' is not a list of token ids"),
        (["--prompt-ids", "1" * 5000], "is not a list of token ids such as 1,2,3"),
        (["--prompt-ids", ""], "at least one token"),
        (["--prompt-ids", "600"], "600 is outside the vocabulary of 512"),
        (["--prompt-ids", "-1"], "-1 is outside the vocabulary"),
        (["--prompt-ids", "99999999999999999999"], "99999999999999999999"),
        (["--prompt-ids", "1", "--prompt", "a"], "give one of --prompt, --prompt-ids, --chat"),
        ([], "give one of --prompt, --prompt-ids, --chat"),
        (["--prompt", "a"], "holds no tokenizer.json"),
        (["--prompt-ids", "1", "--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--prompt-ids", "1", "--max-new-tokens", "512"], "context of 512"),
        (["--prompt-ids", "1", "--temperature", "nan"], "temperature is nan"),
        (["--prompt-ids", "1", "--temperature", "-1"], "temperature is -1"),
        (["--prompt-ids", "1", "--top-p", "0"], "top-p is 0"),
        (["--prompt-ids", "1", "--top-k", "-2"], "top-k is -2"),
        (["--prompt-ids", "1", "--temperature", "1", "--seed", "-1"], "seed is -1"),
    ],
    ids=str,
)
def test_answers_a_mistake_with_one_line(tiny_ort: Path, arguments: list[str], named: str) -> None:
    result = _invoke(tiny_ort, *arguments)
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit), "anything else would print a stack trace"
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert named in result.stderr
    assert result.stdout == ""


def test_answers_what_is_not_an_ingot_with_one_line(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tiny, tmp_path / "absent", tmp_path / "file"):
        result = _invoke(path, "--prompt-ids", "1")
        assert result.exit_code == 2 and isinstance(result.exception, SystemExit)
        assert re.fullmatch(r"error: .* is not an ingot: .*\n", result.stderr)


def test_runs_as_a_module(tiny_ort: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ingot.runtime", "generate", str(tiny_ort), *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    good = run("--prompt-ids", "1,2,3")
    assert good.returncode == 0
    assert len(good.stdout.split()) == 64
    bad = run("--prompt-ids", "1,x")
    assert bad.returncode == 2
    assert bad.stdout == ""
    assert bad.stderr.startswith("error: ") and bad.stderr.count("\n") == 1


# Pairs of neighbouring bytes that become one token. The last one ends inside a character: a space
# and the first of the euro sign's three bytes, which is what makes streaming text hard.
MERGES = [("h", "e"), ("l", "l"), ("Ġ", "â")]
# No token of it comes twice, so that a model can learn it by heart from one table.
TEXT = "hello €uräжя😀z"


def _tokenizer() -> Tokenizer:
    """A real byte-level BPE tokenizer: 256 bytes and three merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: index for index, piece in enumerate([*alphabet, *map("".join, MERGES)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.fixture(scope="module")
def reciter(make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot) -> Path:
    """An ingot, with a tokenizer, that recites ``TEXT`` over and over.

    Its layers add nothing to the embedding, and the head maps each token's embedding to the next
    token of the text.
    """
    tokenizer = _tokenizer()
    order = tokenizer.encode(TEXT).ids
    assert len(set(order)) == len(order), "each token must have one successor"
    checkpoint = make_checkpoint()
    weights = load_file(checkpoint / "model.safetensors")
    head = torch.zeros_like(weights["lm_head.weight"])
    for token, following in zip(order, order[1:] + order[:1], strict=True):
        head[following] = weights["model.embed_tokens.weight"][token]
    weights["lm_head.weight"] = head
    for name, tensor in weights.items():
        if "o_proj" in name or "down_proj" in name:
            tensor.zero_()
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    (checkpoint / "tokenizer_config.json").write_text('{"model_max_length": 512}')
    end = order[-1]
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": [end]}))
    return make_ingot(checkpoint, "ort")


def test_copies_the_tokenizer(reciter: Path) -> None:
    assert (reciter / "tokenizer.json").is_file()
    copied = Tokenizer.from_file(str(reciter / "tokenizer.json"))
    assert copied.encode(TEXT).ids == _tokenizer().encode(TEXT).ids
    raw = json.loads((reciter / MANIFEST).read_text())
    assert {"tokenizer.json", "tokenizer_config.json"} <= raw["files"].keys()
    assert raw["generation"]["eos_token_ids"] == [_tokenizer().encode("z").ids[0]]


def _decoded(reciter: Path, prompt: str, count: int) -> str:
    """What the path by token ids gives, decoded."""
    tokenizer = _tokenizer()
    ids = ",".join(map(str, tokenizer.encode(prompt).ids))
    result = _invoke(reciter, "--prompt-ids", ids, "--max-new-tokens", str(count))
    assert result.exit_code == 0, result.output
    return str(tokenizer.decode([int(token) for token in result.stdout.split()]))


def test_streams_text_with_whole_characters(reciter: Path) -> None:
    result = _invoke(reciter, "--prompt", "he", "--max-new-tokens", "60")
    assert result.exit_code == 0, result.output
    # It ends at the z, the ingot's own end of text.
    assert result.stdout == "llo €uräжя😀z\n"
    assert result.stdout == _decoded(reciter, "he", 60) + "\n"


@pytest.mark.parametrize("count", range(1, len(TEXT.encode()) - 4))
def test_streams_what_the_ids_decode_to_wherever_it_stops(reciter: Path, count: int) -> None:
    result = _invoke(reciter, "--prompt", "he", "--max-new-tokens", str(count))
    assert result.exit_code == 0, result.output
    text = result.stdout.removesuffix("\n")
    assert text == _decoded(reciter, "he", count)
    # A piece of a character may stand at the very end only, where it was cut off.
    assert "\ufffd" not in text.rstrip("\ufffd")


def test_holds_back_a_character_until_it_is_whole(
    reciter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []

    def note(text: str = "", **options: Any) -> None:
        if not options.get("err"):
            written.append(text)

    monkeypatch.setattr("ingot.runtime.cli.click.echo", note)
    result = _invoke(reciter, "--prompt", "he", "--max-new-tokens", "60")
    assert result.exit_code == 0, result.output
    assert "".join(written) == "llo €uräжя😀z"
    # More than one piece, or nothing was streamed; and no piece holds part of a character.
    pieces = [text for text in written if text]
    assert pieces == ["ll", "o", " €", "u", "r", "ä", "ж", "я", "😀", "z"]


def test_prints_each_text_of_a_batch(reciter: Path) -> None:
    result = _invoke(reciter, "--prompt", "he", "--prompt", "я", "--max-new-tokens", "60")
    assert result.stdout.splitlines() == ["llo €uräжя😀z", "😀z"]


@pytest.mark.parametrize(
    "prompts",
    [
        *[None, "12", 7, {"a": [1]}, {(1, 2)}, [1, 2], np.array([1, 2]), [None], iter([[1]])],
        *[[[1.5, 2.9]], [[1.0]], [[np.float32(7.9)]], [["3", "4"]], ["34"], [b"34"]],
        *[[[True, False]], [[1, np.True_]], [[math.nan]], [[None]], [[[1]]], [{1: 2}], [{1, 2}]],
        *[[np.array([1.0, 2.0])], [np.array([True])], [np.array(3)], [np.array([[3]])]],
        *[[[1, 2], [3.0]], [[2**63]], [[-(2**63) - 1]], [[10**5000]], [np.array([2**63], "u8")]],
    ],
    ids=lambda value: type(value).__name__,
)
def test_refuses_prompts_that_are_no_token_ids(session: Session, prompts: Any) -> None:
    with pytest.raises(SessionError, match=r"token ids|in no vocabulary") as caught:
        list(generate(session, prompts, max_new_tokens=2))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int16, np.uint32, np.int64, np.uint64])
def test_takes_ids_of_any_integer_type(session: Session, kind: type[np.integer[Any]]) -> None:
    right = _rows(session, [[9, 8, 20], [4, 5, 6]], 4)
    arrays = np.array([[9, 8, 20], [4, 5, 6]], kind)
    every: tuple[Any, ...] = (arrays, list(arrays), [list(row) for row in arrays])
    for prompts in (*every, [(9, 8, 20), range(4, 7)]):
        assert _rows(session, prompts, 4, stop_ids=arrays[:0, 0]) == right
    # What ends a row may be a set as well.
    for ends in ({right[0][1]}, frozenset(right[0][1:2]), np.array(right[0][1:2], np.int32)):
        assert _rows(session, [[9, 8, 20]], 4, stop_ids=ends) == [right[0][:2]]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("stop_ids", value) for value in ("12", 3, [1.0], ["1"], [None], [True], {1: 2})],
        *[("max_new_tokens", value) for value in (1.5, "4", None, True, math.nan, -(10**5000))],
        *[("prefill_chunk", value) for value in (1.5, "4", None, True, -1)],
    ],
    ids=lambda value: type(value).__name__,
)
def test_refuses_an_option_of_another_type(session: Session, name: str, value: Any) -> None:
    with pytest.raises(SessionError, match=f"{name} is .*; it must be") as caught:
        list(generate(session, [[1, 2]], **{"max_new_tokens": 2, name: value}))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("temperature", value) for value in ("hot", None, True, [1.0], 1j)],
        *[("top_p", value) for value in ("0.5", None, True)],
        *[("top_k", value) for value in (2.5, "2", None, True, math.nan)],
        *[("seed", value) for value in (0.5, "0", None, False)],
    ],
)
def test_refuses_a_sampling_value_of_another_type(field: str, value: Any) -> None:
    with pytest.raises(SessionError, match=rf"{field.replace('_', '-')} is .*; it must be"):
        Sampling(**{field: value})


@pytest.mark.parametrize(
    "between",
    [
        lambda session: next(generate(session, [[9, 9]], max_new_tokens=20)),
        lambda session: list(generate(session, [[9, 9]], max_new_tokens=2)),
        # The same prompt, whose state would even fit.
        lambda session: next(generate(session, PROMPTS[:1], max_new_tokens=8)),
        lambda session: session.reset(1, 50),
        lambda session: session.reset(2, 50),
        lambda session: session.step(np.ones((1, 1), np.int64), np.ones((1, 1), np.int64)),
    ],
    ids=["another", "another whole", "itself", "reset", "other rows", "step"],
)
def test_goes_on_over_no_state_but_its_own(ingot: Path, between: Any) -> None:
    session = load(ingot)
    steps = generate(session, PROMPTS[:1], max_new_tokens=8, stop_ids=())
    for _ in range(3):
        next(steps)
    between(session)
    with pytest.raises(SessionError, match=r"this generation was interrupted: .*fork\(\)"):
        next(steps)
    assert list(steps) == []


def test_goes_on_where_its_session_was_only_looked_at(
    session: Session, oracle: list[list[int]]
) -> None:
    steps = generate(session, PROMPTS[:1], max_new_tokens=8, stop_ids=())
    made = [next(steps)[0] for _ in range(3)]
    session.state()
    fork = session.fork()
    assert _rows(fork, PROMPTS[1:2], 8, stop_ids=()) == [oracle[1][:8]]
    # Refused before anything was fed.
    with pytest.raises(SessionError, match="outside the vocabulary"):
        session.step(np.full((1, 1), 600), np.ones((1, 1), np.int64))
    assert made + [step[0] for step in steps] == oracle[0][:8]
