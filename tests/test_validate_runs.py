"""What a validation feeds: every shape of use, and only of material that the truth computed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ingot.validate.truth.inputs import QUICK, STANDARD, THOROUGH, Plan
from ingot.validate.truth.recording import main_run
from ingot.validate.truth.runs import MOST_CONTEXT, Run, Traits, make_runs

CACHES = Traits(512, context=512)
SCAN = Traits(512, cached=False, recurrent=True, chunk=8, width=4)
BOTH = Traits(512, recurrent=True, chunk=8, width=4, context=512)
CLASSIFIER = Traits(512, stateful=False, cached=False, context=512)
ALL = [CACHES, SCAN, BOTH, CLASSIFIER, replace(SCAN, chunk=256), replace(SCAN, chunk=3, width=2)]


def by_name(runs: list[Run]) -> dict[str, Run]:
    return {run.name: run for run in runs}


def lengths(run: Run) -> list[int]:
    return [columns.stop - columns.start for _, columns in run.inputs.steps]


@pytest.mark.parametrize("traits", ALL)
@pytest.mark.parametrize("plan", [QUICK, STANDARD, THOROUGH, Plan(decode=1)])
def test_each_row_begins_with_the_first_tokens_of_one_that_was_recorded(
    traits: Traits, plan: Plan
) -> None:
    runs = make_runs(traits, plan, 3)
    recorded = [run for run in runs if run.recorded]
    assert runs[: len(recorded)] == recorded and runs[0].name == "main"
    assert [run.source for run in recorded] == list(range(len(recorded)))
    for run in runs:
        source = recorded[run.source].inputs
        inputs = run.inputs
        assert inputs.input_ids.dtype == inputs.attention_mask.dtype == np.int64
        assert inputs.steps[-1][1].stop == inputs.input_ids.shape[1]
        assert inputs.prefill == inputs.steps[0][1].stop
        for row, from_row in enumerate(run.rows):
            real = inputs.attention_mask[row] != 0
            tokens = source.input_ids[from_row][source.attention_mask[from_row] != 0]
            assert (inputs.input_ids[row][real] == tokens[: real.sum()]).all()
            columns = run.columns[row]
            assert (columns[~real] == -1).all() or run.recorded
            assert (source.input_ids[from_row][columns[real]] == inputs.input_ids[row][real]).all()
            if traits.recurrent:
                # Padding stands before a row's first token only.
                assert (np.diff(real.astype(int)) >= 0).all()


@pytest.mark.parametrize("traits", ALL)
def test_every_stage_has_a_name_of_its_own(traits: Traits) -> None:
    runs = make_runs(traits, replace(STANDARD, length=600), 0)
    stages = [call.stage for run in runs for call in main_run(run.inputs)]
    assert len(stages) == len(set(stages)) and len(runs) == len({run.name for run in runs})


def test_one_row_is_prefilled_decoded_and_spoken_to_again() -> None:
    for plan in (QUICK, STANDARD):
        runs = by_name(make_runs(BOTH, plan, 0))
        assert lengths(runs["row 0 alone"]) == [19, 1, 1, 3, 2]
        assert lengths(runs["row 1 alone"]) == [12, 1, 2, 9][: 3 if plan is QUICK else 4]
        assert lengths(runs["row 2 alone"]) == [1, 1, 1, 2, 3]
        assert lengths(runs["chat"]) == [3, 1, 9, 1, 2, 1, 3]
        assert [len(runs[name].rows) for name in ("row 0 alone", "chat")] == [1, 1]


def test_a_scan_is_cut_at_the_ends_of_chunks_and_off_them_and_has_more_than_three() -> None:
    for chunk in (1, 3, 8, 11, 64, 256):
        runs = make_runs(replace(SCAN, chunk=chunk), STANDARD, 0)
        cuts = {run.inputs.steps[0][1].stop for run in runs if run.name.startswith("split ")}
        assert any(cut % chunk == 0 for cut in cuts) and 2 in cuts
        assert chunk == 1 or any(cut % chunk for cut in cuts)
        long = by_name(runs)["long"] if chunk > 3 else None
        if long is not None:
            assert lengths(long)[0] > 3 * chunk and lengths(long)[-1] > chunk
            assert len(long.rows) == 1 and lengths(long)[1] == 1
            (split,) = [run for run in runs if run.name.startswith("long split")]
            assert lengths(split)[1] > 3 * chunk


@pytest.mark.parametrize(
    ("traits", "tile"),
    [(CACHES, 64), (SCAN, 8), (BOTH, 64), (replace(SCAN, chunk=256), 256)],
)
def test_prompts_and_decode_steps_end_where_tiles_do(traits: Traits, tile: int) -> None:
    """A kernel may be wrong only where it fills its tiles, or where one is part empty."""
    for plan in (QUICK, STANDARD):
        runs = by_name(make_runs(traits, plan, 0))
        run = runs["whole tiles"]
        assert run.rows == (0,) and lengths(run)[0] == tile
        stops = np.cumsum(lengths(run))
        decoded = {int(s) for s, n in zip(stops, lengths(run), strict=True) if n == 1}
        assert decoded == {tile + 1, 2 * tile, 2 * tile + 1, 4 * tile, 4 * tile + 1}
        # Of each of those steps something is known.
        assert all(run.inputs.wanted[0, stop - 1] for stop in decoded)
        four = runs["four rows"]
        assert lengths(four) == [16, 1, 1] and four.rows == (0, 1, 0, 1)


@pytest.mark.parametrize(("traits", "tile"), [(CACHES, 64), (SCAN, 8), (BOTH, 64)])
def test_a_row_begins_with_more_padding_than_a_tile(traits: Traits, tile: int) -> None:
    run = by_name(make_runs(traits, STANDARD, 0))["a tile of padding"]
    assert run.rows == (0, 0) and lengths(run) == [2 * tile + 2, 1, 3]
    assert (run.inputs.attention_mask == 0).sum(1).tolist() == [tile + 3, 3]
    # Both decode the last token of a tile, of which something is known.
    assert run.columns[:, 2 * tile + 2].tolist() == [tile - 1, 2 * tile - 1]
    assert run.inputs.wanted[:, 2 * tile + 2].all() and run.inputs.wanted[:, -3:].any(1).all()
    alone = by_name(make_runs(replace(traits, most_rows=1), STANDARD, 0))
    assert "a tile of padding" not in alone and "whole tiles" in alone


def test_a_chat_has_room_for_more_than_is_fed() -> None:
    def capacity(traits: Traits) -> int:
        return by_name(make_runs(traits, STANDARD, 0))["chat"].inputs.capacity

    assert capacity(replace(CACHES, context=4096)) == capacity(SCAN) == 1024
    assert capacity(CACHES) == 512 and capacity(replace(CACHES, longest=100)) == 100
    others = [run for run in make_runs(CACHES, STANDARD, 0) if run.name != "chat"]
    assert all(run.inputs.capacity == run.inputs.input_ids.shape[1] for run in others)


def test_tiles_are_left_out_where_there_is_no_room() -> None:
    short = by_name(make_runs(replace(CACHES, context=100), STANDARD, 0))
    assert lengths(short["whole tiles"]) == [64, 1]
    assert "whole tiles" not in by_name(make_runs(replace(CACHES, context=60), STANDARD, 0))
    assert "four rows" not in by_name(make_runs(replace(CACHES, most_rows=3), STANDARD, 0))


def test_paddings_are_of_different_lengths_and_stand_where_the_contract_lets_them() -> None:
    runs = by_name(make_runs(CACHES, STANDARD, 0))
    assert (runs["main"].inputs.attention_mask == 0).sum(1).tolist() == [0, 7, 18]
    masks = {name: run.inputs.attention_mask for name, run in runs.items()}
    assert (masks["every row padded"] == 0).sum(1).min() > 0
    assert (masks["right padding"][1:, 14] == 0).all() and masks["right padding"][:, 0].all()
    within = masks["padding within"]
    assert ((within == 0) & (np.cumsum(within, axis=1) > 0)).any(1).all()
    # A call that is all padding.
    assert masks["padding first"].tolist() == [[0, 0, 0, 1, 1, 1]]
    assert lengths(runs["padding first"])[0] == 3
    assert not {"right padding", "padding within"} & by_name(make_runs(SCAN, STANDARD, 0)).keys()


def test_a_classifier_is_fed_each_row_alone_and_with_padding_on_either_side() -> None:
    runs = by_name(make_runs(CLASSIFIER, STANDARD, 0))
    assert lengths(runs["row 2 alone"]) == [1] and lengths(runs["long"]) == [64, 259]
    assert len(runs["four rows"].rows) == 4 and lengths(runs["four rows"]) == [19]
    right, left, both = (
        runs[name].inputs.attention_mask
        for name in ("right padding", "every row padded", "padding on both sides")
    )
    assert right[:, 0].all() and not right[:, -1].any()
    assert left[:, -1].all() and not left[:, 0].any()
    assert not both[:, 0].any() and not both[:, -1].any() and both.any(1).all()


def test_a_long_prompt_stays_within_what_model_and_target_take() -> None:
    longest = {run.name: sum(lengths(run)) for run in make_runs(CACHES, STANDARD, 0)}
    assert longest["long"] == 259 + 3 + 33
    for limited in (replace(CACHES, context=100), replace(CACHES, longest=100)):
        runs = make_runs(limited, STANDARD, 0)
        assert max(sum(lengths(run)) for run in runs) <= 100 and "long" in by_name(runs)
    few = make_runs(replace(CACHES, longest=16), STANDARD, 0)
    assert max(run.inputs.input_ids.shape[1] for run in few) <= 16 and len(few) > 5


@pytest.mark.parametrize("most", [1, 2, 3, 4, 8])
def test_no_more_rows_than_the_target_takes(most: int) -> None:
    runs = make_runs(replace(CACHES, most_rows=most), STANDARD, 0)
    assert max(len(run.rows) for run in runs) == min(most, 5)
    assert {len(run.rows) for run in runs} == {n for n in (1, 2, 3, 4, 5) if n <= most}
    assert any(lengths(run)[0] == 1 and len(run.rows) == 1 for run in runs)


def test_of_a_long_call_some_tokens_are_recorded_the_last_of_each_call_among_them() -> None:
    long = by_name(make_runs(CACHES, STANDARD, 0))["long"]
    assert long.inputs.kept is not None
    kept = long.inputs.wanted[0]
    assert kept.sum() < 110
    assert all(kept[columns.stop - 1] for _, columns in long.inputs.steps)
    (split,) = [r for r in make_runs(CACHES, STANDARD, 0) if r.name.startswith("long split")]
    np.testing.assert_array_equal(split.inputs.wanted[0], kept[: split.columns.shape[1]])


def test_what_crosses_a_length_at_which_positions_change_is_recorded_itself() -> None:
    early = make_runs(replace(CACHES, switch=16), STANDARD, 0)
    assert all(run.recorded for run in early)
    later = make_runs(replace(CACHES, switch=100), STANDARD, 0)
    crossing = [run.name for run in later if run.recorded]
    assert crossing == ["main", "long", "long split 2+257", "whole tiles", "a tile of padding"]
    assert sum(lengths(by_name(later)["long"])) > 100
    # It is crossed where the context ends there, too.
    ends = make_runs(replace(CACHES, switch=100, context=100), STANDARD, 0)
    assert lengths(by_name(ends)["long"])[0] > 100
    never = make_runs(replace(CACHES, switch=4096, context=8192), STANDARD, 0)
    assert [run.name for run in never if run.recorded] == ["main", "long"]


def test_a_whole_context_is_fed_in_pieces_of_which_the_last_tokens_are_kept() -> None:
    assert "context" not in by_name(make_runs(CACHES, STANDARD, 0))
    assert "context" not in by_name(make_runs(CACHES, THOROUGH, 0, context=False))
    run = by_name(make_runs(CACHES, THOROUGH, 0))["context"]
    assert sum(lengths(run)) == 512 and run.inputs.wanted.sum() == len(lengths(run))
    assert lengths(run)[-1] == 1 and max(lengths(run)) == 256
    asked = by_name(make_runs(CACHES, replace(STANDARD, length=1000), 0))["context"]
    assert sum(lengths(asked)) == 1000
    endless = by_name(make_runs(replace(CACHES, context=131072), THOROUGH, 0))["context"]
    assert sum(lengths(endless)) == MOST_CONTEXT
    short = by_name(make_runs(replace(CACHES, longest=300), THOROUGH, 0))["context"]
    assert sum(lengths(short)) == 300


def test_tokens_are_those_of_the_seed() -> None:
    one, again, other = (make_runs(BOTH, STANDARD, seed) for seed in (1, 1, 2))
    for run, same, different in zip(one, again, other, strict=True):
        assert (run.inputs.input_ids == same.inputs.input_ids).all()
        assert (run.inputs.input_ids != different.inputs.input_ids).any()
