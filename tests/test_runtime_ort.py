"""The ONNX Runtime session: one answer however the tokens are cut, and refusals in words."""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
import toy_hybrid
from conftest import MakeCheckpoint, MakeIngot
from onnx import save
from onnx.parser import parse_model

from ingot.export.ingot import GRAPH, Manifest, TensorInfo
from ingot.graphs.state import State
from ingot.plugins.cpu.library import CpuLibrary
from ingot.runtime.generate import generate
from ingot.runtime.loading import load
from ingot.runtime.onnxruntime_session import open_session
from ingot.runtime.ort import OrtSession
from ingot.runtime.session import Floats, Ids, Session, SessionError

TOKENS = 9


@pytest.fixture(scope="module", params=["onnx", "ort"])
def session(request: pytest.FixtureRequest) -> Session:
    """One loaded session for all tests; each resets it."""
    return load(request.getfixturevalue(f"tiny_{request.param}"))


def _tokens(batch: int, tokens: int = TOKENS, seed: int = 0) -> tuple[Ids, Ids]:
    """Random ids; of several rows the second begins with three tokens of padding."""
    ids = np.random.default_rng(seed).integers(0, 512, size=(batch, tokens), dtype=np.int64)
    mask = np.ones_like(ids)
    if batch > 1:
        mask[1, :3] = 0
    return ids, mask


def _assert_close(found: Floats, expected: Floats) -> None:
    # Sums of a few hundred float32 terms near 1, in another order.
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


def _feed(
    session: Session, ids: Ids, mask: Ids, cuts: list[int], capacity: int | None = None
) -> tuple[Floats, dict[str, Floats]]:
    """The main output of all tokens, fed in pieces that begin at the cuts, and the state."""
    session.reset(len(ids), capacity or ids.shape[1])
    edges = itertools.pairwise([0, *cuts, ids.shape[1]])
    pieces = [session.step(ids[:, a:b], mask[:, a:b]) for a, b in edges]
    return np.concatenate(pieces, axis=1), session.state()


def _assert_same(
    found: tuple[Floats, dict[str, Floats]], expected: tuple[Floats, dict[str, Floats]], mask: Ids
) -> None:
    """Equal outputs and states wherever a token is; padding means nothing."""
    real = mask != 0
    _assert_close(found[0][real], expected[0][real])
    assert found[1].keys() == expected[1].keys()
    for name, array in expected[1].items():
        assert found[1][name].shape == array.shape
        _assert_close(np.moveaxis(found[1][name], 2, 1)[real], np.moveaxis(array, 2, 1)[real])


@pytest.mark.parametrize("batch", [1, 2])
def test_answers_the_same_wherever_the_prompt_is_split(session: Session, batch: int) -> None:
    ids, mask = _tokens(batch)
    whole = _feed(session, ids, mask, [])
    assert whole[0].shape == (batch, TOKENS, 512)
    # Outputs of a session that does not look at its tokens would agree as well.
    assert np.abs(whole[0][:, 1:] - whole[0][:, :-1]).max() > 0.1
    for cut in range(1, TOKENS):
        _assert_same(_feed(session, ids, mask, [cut]), whole, mask)


@pytest.mark.parametrize("batch", [1, 3])
def test_decodes_from_its_cache_what_a_full_prefill_gives(session: Session, batch: int) -> None:
    ids, mask = _tokens(batch)
    whole = _feed(session, ids, mask, [])
    one_by_one = _feed(session, ids, mask, list(range(1, TOKENS)))
    _assert_same(one_by_one, whole, mask)
    in_three = _feed(session, ids, mask, [4, 5])
    _assert_same(in_three, whole, mask)


def test_answers_a_padded_row_as_if_it_were_alone(session: Session) -> None:
    ids, mask = _tokens(2)
    together, state = _feed(session, ids, mask, [TOKENS - 2])
    alone, own_state = _feed(session, ids[1:, 3:], mask[1:, 3:], [TOKENS - 5])
    _assert_close(together[1, 3:], alone[0])
    for name, array in own_state.items():
        _assert_close(state[name][1, :, 3:], array[0])


def test_ignores_the_ids_of_padding(session: Session) -> None:
    ids, mask = _tokens(2)
    expected = _feed(session, ids, mask, [5])
    other = np.where(mask == 0, 500 - ids % 7, ids)
    assert (other != ids).any()
    _assert_same(_feed(session, other, mask, [5]), expected, mask)


def test_takes_a_row_of_padding_alone_in_its_first_call(session: Session) -> None:
    ids, mask = _tokens(2)
    expected = _feed(session, ids, mask, [])
    _assert_same(_feed(session, ids, mask, [2]), expected, mask)


def test_does_not_depend_on_its_capacity(session: Session) -> None:
    ids, mask = _tokens(2)
    expected = _feed(session, ids, mask, [6])
    for capacity in (TOKENS + 1, 64, 512):
        _assert_same(_feed(session, ids, mask, [6], capacity), expected, mask)


def test_cuts_its_state_to_the_tokens_seen(session: Session) -> None:
    ids, mask = _tokens(2)
    session.reset(2, 64)
    assert {array.shape for array in session.state().values()} == {(2, 2, 0, 16)}
    session.step(ids, mask)
    state = session.state()
    assert list(state) == [f"present.{i}.{kind}" for i in range(2) for kind in ("key", "value")]
    assert {array.shape for array in state.values()} == {(2, 2, TOKENS, 16)}
    assert {array.dtype for array in state.values()} == {np.dtype(np.float32)}


def test_hands_out_copies(session: Session) -> None:
    ids, mask = _tokens(1)
    session.reset(1, TOKENS)
    logits = session.step(ids[:, :5], mask[:, :5])
    state = session.state()
    kept, kept_state = logits.copy(), {name: array.copy() for name, array in state.items()}
    after = session.step(ids[:, 5:], mask[:, 5:])
    np.testing.assert_array_equal(logits, kept)
    for name, array in kept_state.items():
        np.testing.assert_array_equal(state[name], array)
    # Writing into what was handed out must not reach the cache either.
    again = _feed(session, ids, mask, [5])[0][:, 5:]
    session.reset(1, TOKENS)
    session.step(ids[:, :5], mask[:, :5])[:] = 1e3
    for array in session.state().values():
        array[:] = 1e3
    np.testing.assert_array_equal(session.step(ids[:, 5:], mask[:, 5:]), again)
    np.testing.assert_array_equal(after, again)


def test_refuses_more_than_its_capacity_and_works_on(session: Session) -> None:
    ids, mask = _tokens(2)
    expected = _feed(session, ids, mask, [5])
    session.reset(2, TOKENS)
    first = session.step(ids[:, :5], mask[:, :5])
    for _ in range(2):
        with pytest.raises(SessionError, match=r"10 tokens do not fit .* capacity of 9"):
            session.step(ids[:, 4:], mask[:, 4:])
    # The refused call left no trace.
    second = session.step(ids[:, 5:], mask[:, 5:])
    both = np.concatenate((first, second), axis=1)
    _assert_same((both, session.state()), expected, mask)
    with pytest.raises(SessionError, match="10 tokens do not fit"):
        session.step(ids[:, :1], mask[:, :1])


def test_takes_no_call_after_one_that_broke_off_until_it_is_reset(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, mask = _tokens(2)
    expected = _feed(session, ids, mask, [5])
    session.reset(2, TOKENS)
    session.step(ids[:, :5], mask[:, :5])
    with monkeypatch.context() as patch:

        def break_off(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(onnxruntime.InferenceSession, "run_with_iobinding", break_off)
        with pytest.raises(KeyboardInterrupt):
            session.step(ids[:, 5:], mask[:, 5:])
    with pytest.raises(SessionError, match="the state is lost; call reset first"):
        session.step(ids[:, 5:], mask[:, 5:])
    _assert_same(_feed(session, ids, mask, [5]), expected, mask)


def test_refuses_every_call_before_there_is_room(tiny_ort: Path) -> None:
    ids, mask = _tokens(1, 1)
    with pytest.raises(SessionError, match="1 tokens do not fit the session's capacity of 0"):
        load(tiny_ort).step(ids, mask)


REFUSED: list[tuple[npt.NDArray[np.generic], npt.NDArray[np.generic], str]] = [
    (np.zeros((2, 3), np.int32), np.ones((2, 3), np.int64), "input_ids is int32 of shape [2, 3]"),
    (np.zeros((2, 3), np.float32), np.ones((2, 3), np.int64), "input_ids is float32"),
    (np.zeros((2, 3), np.int64), np.ones((2, 3), np.bool_), "attention_mask is bool of shape"),
    (np.zeros(3, np.int64), np.ones(3, np.int64), "input_ids is int64 of shape [3]"),
    (np.zeros((2, 3), np.int64), np.ones((2, 3, 1), np.int64), "attention_mask is int64 of shape"),
    (np.zeros((2, 3), np.int64), np.ones((2, 4), np.int64), "input_ids [2, 3] and attention_mask"),
    (np.zeros((2, 3), np.int64), np.ones((2, 8), np.int64), "attention_mask [2, 8] must both be"),
    (np.zeros((1, 3), np.int64), np.ones((1, 3), np.int64), "[1, 3] must both be [2, tokens]"),
    (np.zeros((3, 3), np.int64), np.ones((3, 3), np.int64), "[3, 3] must both be [2, tokens]"),
    (np.zeros((2, 0), np.int64), np.ones((2, 0), np.int64), "input_ids holds no tokens"),
    (np.zeros((2, 3), np.int64), np.full((2, 3), 2), "only 1 (token) and 0 (padding)"),
    (np.zeros((2, 3), np.int64), np.full((2, 3), -1), "only 1 (token) and 0 (padding)"),
    (np.full((2, 3), 512), np.ones((2, 3), np.int64), "token id 512 is outside the vocabulary"),
    (np.full((2, 3), -1), np.ones((2, 3), np.int64), "token id -1 is outside the vocabulary"),
]


@pytest.mark.parametrize(("ids", "mask", "message"), REFUSED, ids=[row[2] for row in REFUSED])
def test_refuses_tokens_it_would_misread(
    session: Session, ids: Ids, mask: Ids, message: str
) -> None:
    good = _tokens(2)
    expected = _feed(session, *good, [4])
    session.reset(2, TOKENS)
    first = session.step(good[0][:, :4], good[1][:, :4])
    with pytest.raises(SessionError, match=re.escape(message)):
        session.step(ids, mask)
    second = session.step(good[0][:, 4:], good[1][:, 4:])
    _assert_same((np.concatenate((first, second), axis=1), session.state()), expected, good[1])


# Of every family, with heads that are tied and not, and of every way to store them.
ASKED: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("olmoe", "onnx", {}, {}),
    ("olmoe", "ort", {}, {}),
    ("granite", "ort", {}, {}),
    ("granite", "onnx", {"tie_word_embeddings": False}, {"weights": "bf16"}),
    ("granite", "ort", {}, {"weights": "int4"}),
    ("granite", "ort", {"tie_word_embeddings": False}, {"weights": "int8", "accuracy": "exact"}),
    ("granite", "onnx", {}, {"extra_outputs": ("hidden_states",)}),
    ("jetmoe", "ort", {}, {"weights": "int8"}),
    ("mamba2", "ort", {}, {}),
    ("mamba2", "onnx", {}, {"weights": "fp16"}),
    ("granite", "trt", {}, {"builder": "none", "precision": "fp16"}),
]


@pytest.mark.parametrize(
    ("family", "target", "config", "request_"),
    ASKED,
    ids=[
        " ".join([one, two, *config, *map(str, more.values())]) for one, two, config, more in ASKED
    ],
)
def test_gives_the_last_logits_alone(
    family: str,
    target: str,
    config: dict[str, Any],
    request_: dict[str, Any],
    make_checkpoint: MakeCheckpoint,
    make_ingot: MakeIngot,
) -> None:
    session = load(make_ingot(make_checkpoint(family, **config), target, **request_))
    limit = 2e-3 if session.manifest.precision == "float16" else 2e-5
    for batch in (1, 2):
        ids, mask = _tokens(batch)
        for kept in (1, 3, TOKENS):
            found = []
            for asked in (0, kept):
                session.reset(*ids.shape)
                calls = (slice(0, 5), slice(5, TOKENS))
                outputs = [session.step(ids[:, part], mask[:, part], asked) for part in calls]
                found.append([each[:, -kept:] for each in outputs] + [*session.state().values()])
            for whole, last in zip(*found, strict=True):
                assert whole.shape == last.shape
                np.testing.assert_allclose(last, whole, rtol=0, atol=limit)


def test_gives_all_hidden_states_with_the_last_logits(
    make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot
) -> None:
    ingot = make_ingot(make_checkpoint("granite"), "ort", extra_outputs=("hidden_states",))
    ids, mask = _tokens(2)
    runner = open_session(ingot / GRAPH)
    empty = {
        state.input: np.zeros(state.shape(2, 16), np.float32)
        for state in Manifest.read(ingot).states
    }
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **empty}
    names = ["logits", *(f"hidden_states.{n}" for n in range(3))]
    logits, *hidden = runner.run(names, feeds)
    last, *same = runner.run(names, {**feeds, "logits_to_keep": np.array([2])})
    np.testing.assert_allclose(last, logits[:, -2:], rtol=0, atol=2e-5)
    for whole, found in zip(hidden, same, strict=True):
        assert found.shape == (2, TOKENS, 64)
        np.testing.assert_array_equal(found, whole)


def test_cuts_the_logits_of_a_graph_that_gives_all() -> None:
    session = load(Path(__file__).parent / "data" / "schema1" / "granite-ort")
    ids = np.array([[3, 1, 4, 1, 5]])
    session.reset(1, 5)
    whole = session.step(ids, np.ones_like(ids))
    session.reset(1, 5)
    last = session.step(ids, np.ones_like(ids), 2)
    np.testing.assert_array_equal(last, whole[:, -2:])
    # The memory of all is not kept for the sake of some.
    assert last.base is None


@pytest.mark.parametrize("given", [-1, 1.5, "1", None, True])
def test_refuses_to_keep_what_is_no_number_of_tokens(session: Session, given: Any) -> None:
    ids, mask = _tokens(1)
    session.reset(*ids.shape)
    with pytest.raises(SessionError, match=r"logits_to_keep is .*; it must be a whole number"):
        session.step(ids, mask, given)
    session.step(ids, mask, 1)


@pytest.mark.parametrize(("family", "task"), [("olmoe", "features"), ("jetmoe", "classify")])
def test_refuses_to_keep_where_there_is_no_logit_a_token(
    make_ingot: MakeIngot, family: str, task: str
) -> None:
    session = load(make_ingot(Path(family), "ort", task=task, preset="tiny"))
    ids, mask = _tokens(1)
    session.reset(*ids.shape)
    with pytest.raises(SessionError, match=f"the task '{task}', which has no logits of each"):
        session.step(ids, mask, 1)
    session.step(ids, mask, 0)


def test_takes_ids_whose_rows_are_not_contiguous(session: Session) -> None:
    ids, mask = _tokens(2)
    expected = _feed(session, ids, mask, [5])
    turned = np.asfortranarray(ids), np.asfortranarray(mask)
    _assert_same(_feed(session, *turned, [5]), expected, mask)


def test_forgets_everything_at_a_reset(session: Session) -> None:
    ids, mask = _tokens(2)
    expected = _feed(session, ids, mask, [5])
    other_ids, other_mask = _tokens(3, 20, seed=1)
    # A longer run of another batch first, then one that stops halfway.
    _feed(session, other_ids, other_mask, [7])
    session.reset(2, TOKENS)
    session.step(other_ids[:2, :6], other_mask[:2, :6])
    again = _feed(session, ids, mask, [5])
    np.testing.assert_array_equal(again[0], expected[0])
    for name, array in expected[1].items():
        np.testing.assert_array_equal(again[1][name], array)


def test_appends_to_the_same_buffers_at_every_step(tiny_ort: Path) -> None:
    session = OrtSession(tiny_ort, Manifest.read(tiny_ort))
    assert all(state.shared for state in session.manifest.states)
    ids, mask = _tokens(1, 20)

    def pointers() -> dict[str, int]:
        return {name: value.data_ptr() for name, value in session._state.items()}

    session.reset(1, 20)
    before = pointers()
    assert len(set(before.values())) == len(session.manifest.states) == 4
    for step in range(20):
        session.step(ids[:, step : step + 1], mask[:, step : step + 1])
        assert pointers() == before
    # The buffers are what the kernel really wrote into: nothing in them is zero any more.
    for array in session.state().values():
        assert array.shape[2] == 20 and (array != 0).mean() > 0.99


def test_keeps_what_is_in_the_cache_when_it_appends(session: Session) -> None:
    ids, mask = _tokens(2)
    session.reset(2, TOKENS)
    session.step(ids[:, :6], mask[:, :6])
    before = session.state()
    session.step(ids[:, 6:7], mask[:, 6:7])
    for name, array in session.state().items():
        np.testing.assert_array_equal(array[:, :, :6], before[name])


@pytest.mark.parametrize("target", ["onnx", "ort"])
def test_takes_a_number_of_threads(request: pytest.FixtureRequest, target: str) -> None:
    ingot: Path = request.getfixturevalue(f"tiny_{target}")
    ids, mask = _tokens(2)
    expected = _feed(load(ingot), ids, mask, [5])
    for threads in (1, 2):
        session = OrtSession(ingot, Manifest.read(ingot), threads=threads)
        options = session._session.get_session_options()
        assert options.intra_op_num_threads == threads
        _assert_same(_feed(session, ids, mask, [5]), expected, mask)


@pytest.mark.parametrize("target", ["onnx", "ort"])
def test_repeats_itself_to_the_last_bit_on_two_threads(
    request: pytest.FixtureRequest, target: str
) -> None:
    # ScatterND with a reduction races in ONNX Runtime, in about one run of seven.
    session = load(request.getfixturevalue(f"tiny_{target}"), threads=2)
    ids, mask = _tokens(2, 64)
    expected = _feed(session, ids, mask, [60])
    for _ in range(50):
        found = _feed(session, ids, mask, [60])
        np.testing.assert_array_equal(found[0], expected[0])
        for name, array in expected[1].items():
            np.testing.assert_array_equal(found[1][name], array)


def test_names_the_versions_where_the_graph_cannot_be_loaded(
    tiny_ort: Path, tmp_path: Path
) -> None:
    manifest = Manifest.read(tiny_ort)
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(SessionError, match=r"ONNX Runtime 1\.\d+\.\d+ cannot load .*made with 1\."):
        OrtSession(tmp_path, manifest)


@pytest.mark.parametrize("threads", [-1, 100_000])
def test_refuses_a_thread_count_no_machine_has(tiny_ort: Path, threads: int) -> None:
    with pytest.raises(SessionError, match=f"threads is {threads}"):
        load(tiny_ort, threads=threads)


@pytest.mark.parametrize("target", ["onnx", "ort"])
def test_takes_no_call_after_a_reset_that_was_refused(
    request: pytest.FixtureRequest, target: str
) -> None:
    session = load(request.getfixturevalue(f"tiny_{target}"))
    ids, mask = _tokens(2)
    expected = _feed(session, ids, mask, [5])
    # A cache that grows has nothing to make room for.
    most = ((2**31 - 1, 2**31 - 1),) if target == "ort" else ()
    for batch, capacity in ((0, 4), (2.0, TOKENS), (2, 2**63), *most):
        session.reset(2, TOKENS)
        with pytest.raises(
            SessionError, match=r"give a batch of at least 1|there is no memory for"
        ):
            session.reset(batch, capacity)
        for call in (lambda: session.step(ids, mask), session.state):
            with pytest.raises(SessionError, match="the state is lost; call reset first"):
                call()
        _assert_same(_feed(session, ids, mask, [5]), expected, mask)


def test_names_the_memory_that_is_not_there(tiny_ort: Path) -> None:
    session = load(tiny_ort)
    # Four states of 2 heads of 16 float32 numbers.
    with pytest.raises(SessionError, match=r"2147483647 tokens, .* take 8,796,093.0 GB; reset"):
        session.reset(8000, 2**31 - 1)


def test_refuses_a_call_beside_one_in_another_thread(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, mask = _tokens(2)
    expected = _feed(session, ids, mask, [])
    run = onnxruntime.InferenceSession.run_with_iobinding
    inside, go_on, found = threading.Event(), threading.Event(), []

    def wait(*given: Any) -> None:
        inside.set()
        assert go_on.wait(60)
        run(*given)

    session.reset(2, TOKENS)
    fork = session.fork()
    fork.reset(2, TOKENS)
    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime.InferenceSession, "run_with_iobinding", wait)
        thread = threading.Thread(target=lambda: found.append(session.step(ids, mask)))
        thread.start()
        assert inside.wait(60)
    calls = (lambda: session.step(ids, mask), lambda: session.reset(1, 4), session.state)
    try:
        for call in (*calls, lambda: list(generate(session, [[1]], max_new_tokens=1))):
            with pytest.raises(SessionError, match="busy with a call of another thread"):
                call()
        # Forks are made, and run, all the same.
        fork.step(ids, mask)
        _assert_same(_feed(session.fork(), ids, mask, []), expected, mask)
    finally:
        go_on.set()
        thread.join()
    _assert_same((found[0], session.state()), expected, mask)


def test_gives_no_other_thread_s_tokens(session: Session) -> None:
    prompts = [[n, 300, n + 1] for n in range(4)]
    right = [list(generate(session, [prompt], max_new_tokens=24)) for prompt in prompts]
    ended: list[bool | None] = []

    def work(number: int) -> None:
        for _ in range(6):
            try:
                made = list(generate(session, [prompts[number]], max_new_tokens=24))
            except SessionError:
                ended.append(None)
            else:
                ended.append(made == right[number])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ended) == 24 and False not in ended
    assert list(generate(session, [prompts[0]], max_new_tokens=24)) == right[0]


def _odd(tmp_path: Path, ingot: Path, text: str, **fields: Any) -> OrtSession:
    """A session of a graph that is written in text, under the manifest of another one."""
    save(parse_model(f'<ir_version: 10, opset_import: ["" : 21]> {text}'), tmp_path / GRAPH)
    inputs = tuple(TensorInfo(n, "int64", ("batch", "sequence")) for n in ("input_ids", "mask"))
    plain: dict[str, Any] = {"inputs": inputs[:1], "states": (), "main_output": "y"}
    return OrtSession(tmp_path, replace(Manifest.read(ingot), **{**plain, **fields}))


HEAD = "odd (int64[b, t] input_ids) => ({} y)"
ODD = {
    "rank 2": ("float[b, w]", "y = ConstantOfShape(shape)", [1, 2000]),
    "the last token only": ("float[b, t, w]", "y = ConstantOfShape(shape)", [1, 1, 512]),
    "other rows": ("float[b, t, w]", "y = ConstantOfShape(shape)", [2, 3, 512]),
    "more words": ("float[b, t, w]", "y = ConstantOfShape(shape)", [1, 3, 513]),
    "no words": ("float[b, t, w]", "y = ConstantOfShape(shape)", [1, 3, 0]),
    "a number": ("float", "y = ReduceMax <keepdims = 0> (all)", [1]),
    "rank 4": ("float[b, t, w, x]", "y = ConstantOfShape(shape)", [1, 3, 512, 1]),
}


@pytest.mark.parametrize(("kind", "node", "shape"), ODD.values(), ids=ODD)
def test_refuses_an_output_of_another_shape(
    tiny_ort: Path, tmp_path: Path, kind: str, node: str, shape: list[int]
) -> None:
    numbers = ", ".join(map(str, shape))
    text = f"{HEAD.format(kind)} <int64[{len(shape)}] shape = {{{numbers}}}> {{"
    text += " all = Cast <to = 1> (input_ids) " if "all" in node else " "
    session = _odd(tmp_path, tiny_ort, f"{text} {node} }}")
    ids = np.ones((1, 3), np.int64)
    session.reset(1, 3)
    message = r"the graph gave 'y' of shape \[.*\], and ingot.json says \[1, 3, 512\]"
    with pytest.raises(SessionError, match=message):
        session.step(ids, ids)
    with pytest.raises(SessionError, match=message):
        list(generate(session, [[1, 2, 3]], max_new_tokens=2))


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("string[b, t]", "y = Cast <to = 8> (input_ids)"),
        ("int64[b, t]", "y = Identity (input_ids)"),
        ("bool[b, t]", "y = Cast <to = 9> (input_ids)"),
        ("double[b, t]", "y = Cast <to = 11> (input_ids)"),
        ("seq(int64[b, t])", "y = SequenceConstruct (input_ids)"),
    ],
)
def test_refuses_an_output_that_is_no_float(
    tiny_ort: Path, tmp_path: Path, kind: str, body: str
) -> None:
    with pytest.raises(SessionError, match=r"computes 'y' as .*, which must be one of tensor"):
        _odd(tmp_path, tiny_ort, f"{HEAD.format(kind)} {{ {body} }}")


def test_says_in_one_sentence_what_the_runtime_refuses(
    tiny_ort: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    table = "<float[2, 512] table> { y = Gather (table, input_ids) }".replace(
        "table>", "table = {" + ", ".join(["0.5"] * 1024) + "}>"
    )
    session = _odd(tmp_path, tiny_ort, HEAD.format("float[b, t, w]") + table)
    session.reset(1, 3)
    for call in (
        lambda: session.step(np.full((1, 3), 7), np.ones((1, 3), np.int64)),
        lambda: list(generate(session, [[7]], max_new_tokens=1)),
    ):
        with pytest.raises(SessionError, match=r"^ONNX Runtime \d.* could not run this ingot: .*"):
            call()
        session.reset(1, 3)
    (tmp_path / GRAPH).write_bytes(b"no graph")
    with pytest.raises(SessionError, match="cannot load"):
        OrtSession(tmp_path, session.manifest)
    # One message only: the runtime has no line of its own.
    assert "".join(capfd.readouterr()) == ""


def _fixed(**changes: Any) -> State:
    fixed = State("ssm", "old", "new", "float32", ("batch", 4), ("batch", 4), None, False)
    return replace(fixed, **changes)


STATEFUL = """odd (int64[b, t] input_ids, float[b, w] old) => (float[b, t, v] y, float[b, x] new)
<int64[1] words = {512}, int64[2] sizes = {1, 5}> {
    shape = Shape (input_ids)
    whole = Concat <axis = 0> (shape, words)
    y = ConstantOfShape (whole)
    new = NEW
}"""
GROWN = STATEFUL.replace("NEW", "ConstantOfShape (sizes)")
KEPT = STATEFUL.replace("NEW", "Identity (old)")


@pytest.mark.parametrize(
    ("graph", "changes", "message"),
    [
        (GROWN, {}, r"gave 'new' of shape \[1, 5\], and ingot.json says \[1, 4\]"),
        (KEPT, {"dtype": "float16"}, "could not run this ingot"),
        (KEPT, {"dtype": "bfloat16"}, "could not run this ingot"),
        (KEPT, {"dtype": "no dtype"}, "could not run this ingot"),
        (KEPT, {"input_shape": ("batch", 4, 4)}, "could not run this ingot"),
        (KEPT, {"input_shape": ("batch", "rows")}, "could not run this ingot"),
        (KEPT, {"input_shape": ("batch", -4)}, "could not run this ingot"),
        (KEPT, {"output_shape": ("batch", "rows")}, "could not run this ingot"),
        (KEPT, {"axis": 7, "shared": True}, "could not run this ingot"),
    ],
)
def test_refuses_states_that_are_not_the_graph_s(
    tiny_ort: Path, tmp_path: Path, graph: str, changes: dict[str, Any], message: str
) -> None:
    def run() -> None:
        session = _odd(tmp_path, tiny_ort, graph, states=(_fixed(**changes),))
        session.reset(1, 4)
        session.step(np.ones((1, 2), np.int64), np.ones((1, 2), np.int64))
        session.state()

    with pytest.raises(SessionError, match=message):
        run()


@pytest.fixture(scope="module", params=["granite", "mamba2", "toy_hybrid"])
def both(
    request: pytest.FixtureRequest,
    make_checkpoint: MakeCheckpoint,
    make_ingot: MakeIngot,
    cpu_library: CpuLibrary,
) -> Iterator[tuple[Path, Path]]:
    """An ingot on Ingot's own kernels, and one of the same weights in standard operators."""
    with toy_hybrid.registered():
        checkpoint = make_checkpoint(request.param)
        own = make_ingot(checkpoint, "ort", kernels="ingot", weights="checkpoint")
        yield own, make_ingot(checkpoint, "onnx")


def _apart(ingot: Path) -> OrtSession:
    """A session that keeps no state where the one before it is."""
    manifest = Manifest.read(ingot)
    states = tuple(replace(state, shared=False) for state in manifest.states)
    return OrtSession(ingot, replace(manifest, states=states))


def _three_rows(tokens: int) -> tuple[Ids, Ids]:
    """Of which one begins with padding, in the first call and beyond."""
    ids, mask = _tokens(3, tokens, seed=4)
    mask[2, :6] = 0
    return ids, mask


def _real(states: Sequence[State], found: dict[str, Floats], mask: Ids) -> dict[str, Floats]:
    """States without what a cache keeps of padding."""
    real = mask != 0
    return {
        state.output: found[state.output]
        if state.axis is None
        else np.moveaxis(found[state.output], state.axis, 1)[real]
        for state in states
    }


@pytest.mark.parametrize("cuts", [[5], [5, 9], [4, 5, 6, 30], list(range(1, 33))], ids=str)
def test_own_kernels_take_several_rows_after_a_past_in_one_call(
    both: tuple[Path, Path], cuts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    session, plain = OrtSession(both[0], Manifest.read(both[0])), load(both[1])
    assert all(state.shared for state in session.manifest.states)
    assert not session.manifest.by_token
    ids, mask = _three_rows(33)
    expected = _feed(plain, ids, mask, [])
    one_by_one = _feed(session, ids, mask, list(range(1, 33)))
    calls, run = [], session._run

    def counted(*given: Any) -> Floats:
        calls.append(given)
        return run(*given)

    monkeypatch.setattr(session, "_run", counted)
    found = _feed(session, ids, mask, cuts, capacity=40)
    assert len(calls) == len(cuts) + 1
    real, states = mask != 0, session.manifest.states
    for logits, state in (expected, one_by_one):
        _assert_close(found[0][real], logits[real])
        ours, theirs = (_real(states, each, mask) for each in (found[1], state))
        assert ours.keys() == theirs.keys()
        for name, array in theirs.items():
            assert np.abs(array).max() > 0.01
            _assert_close(ours[name], array)


def test_own_kernels_give_the_same_bits_wherever_states_are(both: tuple[Path, Path]) -> None:
    session, apart = OrtSession(both[0], Manifest.read(both[0])), _apart(both[0])
    ids, mask = _three_rows(12)
    for capacity in (12, 100):
        session.reset(3, capacity)
        apart.reset(3, capacity)
        before = {name: value.data_ptr() for name, value in session._state.items()}
        assert len(set(before.values())) == len(session.manifest.states)
        for begin, end in ((0, 5), (5, 6), (6, 7), (7, 12)):
            found, expected = (
                each.step(ids[:, begin:end], mask[:, begin:end]) for each in (session, apart)
            )
            np.testing.assert_array_equal(found, expected)
            states = session.state(), apart.state()
            assert states[0].keys() == states[1].keys()
            for name, array in states[1].items():
                np.testing.assert_array_equal(states[0][name], array)
        assert before == {name: value.data_ptr() for name, value in session._state.items()}


def test_states_in_place_are_handed_out_as_copies(both: tuple[Path, Path]) -> None:
    session = load(both[0])
    ids, mask = _three_rows(9)
    session.reset(3, 9)
    logits = session.step(ids[:, :5], mask[:, :5])
    state = session.state()
    kept, kept_state = logits.copy(), {name: array.copy() for name, array in state.items()}
    after = session.step(ids[:, 5:], mask[:, 5:])
    np.testing.assert_array_equal(logits, kept)
    for name, array in kept_state.items():
        np.testing.assert_array_equal(state[name], array)
    changed = session.state()
    assert not any(np.array_equal(changed[name], array) for name, array in kept_state.items())
    # Nor is what was handed out where the session keeps its own.
    session.reset(3, 9)
    session.step(ids[:, :5], mask[:, :5])
    for array in session.state().values():
        array[:] = 1e3
    np.testing.assert_array_equal(session.step(ids[:, 5:], mask[:, 5:]), after)


def test_a_fork_writes_into_no_state_of_the_other(both: tuple[Path, Path]) -> None:
    session = OrtSession(both[0], Manifest.read(both[0]))
    ids, mask = _three_rows(9)
    expected = _feed(session, ids, mask, [5])
    session.reset(3, 9)
    session.step(ids[:, :5], mask[:, :5])
    fork = session.fork()
    assert all(value is not session._state[name] for name, value in fork._state.items())
    other = ids[::-1].copy()
    fork.reset(3, 9)
    fork.step(other[:, :5], mask[:, :5])
    pointers = [{value.data_ptr() for value in each._state.values()} for each in (session, fork)]
    assert not pointers[0] & pointers[1]
    after = session.step(ids[:, 5:], mask[:, 5:])
    np.testing.assert_array_equal(after, expected[0][:, 5:])
    for name, array in session.state().items():
        np.testing.assert_array_equal(array, expected[1][name])
    # And a session that was reset begins from zeros.
    assert _feed(session, ids, mask, [5])[0].tobytes() == expected[0].tobytes()
