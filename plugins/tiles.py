"""Rows of one expert in tiles: what the function bodies of the experts' operators share."""

from __future__ import annotations

# Standard-operator text that puts the rows of `ids [N, K]` into tiles: BM rows of one expert each.
# It needs the values `one`, `zero` and `last` ([1], [0], [-1]), `scalar_zero`, `scalar_one`,
# `scalar_shape` and `experts` ([E]), and makes
#
#   trips            scalar     no fewer than there are tiles, from the shapes alone
#   tiles            scalar     how many tiles there are
#   expert_of_tile   [trips]
#   choice_of_tile   [trips, BM], numbers of choices n * K + k; 0 where a tile has no row
#   slot             [N * K]    where each choice stands, counting the rows of all tiles
#
# TensorRT cannot build NonZero here, and its TopK sorts no more than 3840 values, so the rows are
# placed by counting. Every size follows from shapes, and no index repeats in the ScatterElements:
# repeated ones race in ONNX Runtime.
#
# BM. The copy of an expert's weight that Gather makes costs as much as some 16 rows of products,
# so few rows share a tile of 16 and a mean expert has one tile. With fewer choices than experts,
# an expert has rarely two of them, and a tile is one row.
TILES_BODY = """
        tokens = Shape <start = 0, end = 1> (ids)
        top = Shape <start = 1, end = 2> (ids)
        choices = Mul (tokens, top)
        less_one = Sub (experts, one)
        choices_up = Add (choices, less_one)
        mean = Div (choices_up, experts)
        sixteen = Constant <value_ints: ints = [16]> ()
        sixteens = Div (mean, sixteen)
        sixteens_up = Add (sixteens, one)
        rounded = Mul (sixteens_up, sixteen)
        mean_less_one = Sub (mean, one)
        several = Min (mean_less_one, one)
        rounded_if_several = Mul (rounded, several)
        no_higher = Min (rounded_if_several, tokens)
        height = Max (no_higher, one)
        height_less_one = Sub (height, one)
        experts_hit_at_most = Min (experts, choices)
        rows_missing_at_most = Mul (experts_hit_at_most, height_less_one)
        slots_at_most = Add (choices, rows_missing_at_most)
        tiles_at_most = Div (slots_at_most, height)
        slots = Mul (tiles_at_most, height)
        trips = Reshape (tiles_at_most, scalar_shape)

        experts_count = Reshape (experts, scalar_shape)
        all_experts = Range (scalar_zero, experts_count, scalar_one)
        flat_ids = Reshape (ids, last)
        column_ids = Unsqueeze (flat_ids, last)
        is_expert = Equal (column_ids, all_experts)
        is_expert_int = Cast <to = 7> (is_expert)
        rows_so_far = CumSum (is_expert_int, scalar_zero)
        rank_column = GatherElements <axis = 1> (rows_so_far, column_ids)
        rank_from_one = Reshape (rank_column, last)
        rank = Sub (rank_from_one, one)
        rows_of_expert = ReduceSum <keepdims = 0> (is_expert_int, zero)
        rows_up = Add (rows_of_expert, height_less_one)
        tiles_of_expert = Div (rows_up, height)
        tiles_end = CumSum (tiles_of_expert, scalar_zero)
        tiles = ReduceSum <keepdims = 0> (tiles_of_expert, zero)
        first_tile = Sub (tiles_end, tiles_of_expert)
        first_slot = Mul (first_tile, height)
        first_slot_here = Gather <axis = 0> (first_slot, flat_ids)
        slot = Add (first_slot_here, rank)

        choices_count = Reshape (choices, scalar_shape)
        all_choices = Range (scalar_zero, choices_count, scalar_one)
        nobody = ConstantOfShape <value = int64[1] {0}> (slots)
        choice_of_slot = ScatterElements <axis = 0> (nobody, slot, all_choices)
        tiles_shape = Concat <axis = 0> (tiles_at_most, height)
        choice_of_tile = Reshape <allowzero = 1> (choice_of_slot, tiles_shape)

        all_trips = Range (scalar_zero, trips, scalar_one)
        last_tile = Sub (tiles, scalar_one)
        tile_of_trip = Min (all_trips, last_tile)
        tile_column = Unsqueeze (tile_of_trip, last)
        ended = LessOrEqual (tiles_end, tile_column)
        ended_int = Cast <to = 7> (ended)
        expert_of_tile = ReduceSum <keepdims = 0> (ended_int, last)
        any_tile = Greater (tiles, scalar_zero)"""
