"""The suite catches broken code: each mistake below, made on purpose, fails the checks that the suite runs.

Every check passes on the code as it is (else it would prove nothing) and fails with the mistake in it.
"""

import importlib
import sys
from dataclasses import replace

import pytest
import torch
from tests.interpreted import WHY_NOT, interpreter
from tests.oracle import (
    assert_as_precise_as_plain,
    assert_blind,
    assert_counts_its_pairs,
    assert_keeps_what_is_read,
    assert_mask_is,
    assert_parts_are_the_pattern,
    assert_plan_is_sound,
    assert_same,
    assert_scores_what_it_says,
    assert_torch_is_reference,
    attend,
    make_inputs,
    results,
)

import longstride as ls
from longstride.backends import torch as torch_backend
from longstride.backends.torch import fused
from longstride.backends.triton import lowering, sources
from longstride.patterns import counting
from longstride.patterns.regions import Band
from longstride.plan import Dense, Listed, Masked, Window

# `longstride.plan.tiles` is a function; these are the modules.
TILES = importlib.import_module("longstride.plan.tiles")
PARTS = importlib.import_module("longstride.plan.parts")


def everywhere(patch: pytest.MonkeyPatch, name: str, broken: object) -> None:
    """Replace a function in every module of the torch backend that has imported it."""
    owners = [module for path, module in sys.modules.items() if path.startswith("longstride.backends.torch")]
    owners = [module for module in owners if hasattr(module, name)]
    assert owners, f"no module has {name}"
    for module in owners:
        patch.setattr(module, name, broken)


def change_tiles(patch: pytest.MonkeyPatch, change: object) -> None:
    """Let `change` loose on the tiles of every part, as the plan counts them and as the backend runs them."""
    whole = TILES.tiles

    def broken(part, q_len, kv_len):
        return tuple(change(list(whole(part, q_len, kv_len))))

    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith(("longstride.", "tests.")):
            for name, value in list(vars(module).items()):
                if value is whole:
                    patch.setattr(module, name, broken)


def each(kind: type, **changes: object) -> object:
    """A change of every tile of a kind; a callable value is given the tile."""

    def change(cut):
        for tile in cut:
            if isinstance(tile, kind):
                values = {name: value(tile) if callable(value) else value for name, value in changes.items()}
                yield replace(tile, **values)
            else:
                yield tile

    return change


# ---- the checks, as the suite runs them ----------------------------------------------------------------------------


def local_formula():
    assert_mask_is(ls.Local(5), lambda i, j: 0 <= i - j < 5)


def local_counts():
    assert_counts_its_pairs(ls.Local(5), 37, 37)


def local_cache():
    assert_keeps_what_is_read(ls.Local(5), 20, 64)


def local_plan():
    assert_plan_is_sound(ls.Local(5), 37, 37)


def local_blind():
    for row in (3, 17, 36):
        assert_blind(ls.Local(5), 37, 37, row, "torch", 1e30)


def local_numbers():
    assert_torch_is_reference(ls.Local(5), 37, 37)


def shared_parts():
    assert_parts_are_the_pattern(ls.Local(5) | ls.Fixed(8, 2), 37, 37)


def shared_numbers():
    assert_torch_is_reference(ls.Local(5) | ls.Fixed(8, 2), 37, 37)


def strided_plan():
    assert_plan_is_sound(ls.Strided(5), 37, 37)


def strided_numbers():
    assert_torch_is_reference(ls.Strided(5), 37, 37)


def strided_blind():
    assert_blind(ls.Strided(5), 37, 37, 11, "torch", 1e30)


def merged_numbers():
    assert_torch_is_reference(ls.Local(4) | ls.Strided(4), 37, 37)


def decode_numbers():
    assert_torch_is_reference(ls.Local(4) | ls.Strided(4), 1, 37)


def fixed_plan():
    assert_plan_is_sound(ls.Fixed(8, 2), 300, 300)


def fixed_numbers():
    assert_torch_is_reference(ls.Fixed(8, 2), 300, 300, heads=1, kv_heads=1)


def table_plan():
    assert_plan_is_sound(ls.RandomBlocks(4, 2), 37, 37)


def table_numbers():
    assert_torch_is_reference(ls.RandomBlocks(4, 2), 37, 37)


def grouped_numbers():
    assert_torch_is_reference(ls.Local(4), 37, 37, heads=4, kv_heads=2)


def per_head_numbers():
    assert_torch_is_reference(ls.per_head(ls.Local(4), ls.Strided(4)), 37, 37)


def scale_numbers():
    assert_torch_is_reference(ls.Local(4), 37, 37, scale=0.0)


def negative_scale_numbers():
    assert_torch_is_reference(ls.Strided(4), 37, 37, scale=-0.5)


def empty_row_numbers():
    assert_torch_is_reference(ls.Summary(6, 2), 37, 37)


def honest_windows():
    assert_scores_what_it_says(ls.Local(20), 200, 200)


def precise_windows():
    assert_as_precise_as_plain(ls.Local(5), 37, 37, torch.float32, "torch")


def precise_strides():
    assert_as_precise_as_plain(ls.Strided(4), 37, 37, torch.bfloat16, "torch")


# ---- the mistakes ---------------------------------------------------------------------------------------------------


def wider_window(patch):
    patch.setattr(ls.Local, "band", lambda self: Band(1, -self.lookahead, self.window))


def forgetful_window(patch):
    kept = ls.Local.retained
    patch.setattr(ls.Local, "retained", lambda self, now: kept(self, now).logical_and(torch.arange(now) != now - 3))


def one_pair_too_many_counted(patch):
    count = counting._count_band
    patch.setattr(counting, "_count_band", lambda *some: count(*some) + 1)


def window_tiles_one_short(patch):
    change_tiles(patch, each(Window, window=lambda tile: tile.window - 1))


def window_tiles_one_long(patch):
    change_tiles(patch, each(Window, window=lambda tile: tile.window + 1))


def parts_that_overlap(patch):
    patch.setattr(PARTS, "_overlap", lambda *_: False)


def tile_left_out(patch):
    change_tiles(patch, lambda cut: cut[:-1])


def tile_run_twice(patch):
    change_tiles(patch, lambda cut: [*cut, cut[-1]])


def triangle_forgotten(patch):
    change_tiles(patch, each(Dense, causal=False))


def dense_keys_one_late(patch):
    change_tiles(patch, each(Dense, k_start=lambda tile: max(0, tile.k_start - 1)))


def table_block_left_out(patch):
    change_tiles(patch, each(Listed, k_blocks=lambda tile: tile.k_blocks.index_fill(1, torch.tensor([0]), -1)))


def near_summaries_by_one_less(patch):
    stairs = TILES._staircase
    patch.setattr(TILES, "_staircase", lambda group, near, *lengths: stairs(group, near - 1, *lengths))


def plain_average_of_parts(patch):
    def broken(out, lse, part_out, part_lse):
        some = lse != -torch.inf
        out.copy_(torch.where(some[..., None], (out + part_out) / 2, part_out))
        lse.copy_(torch.logaddexp(lse, part_lse))

    everywhere(patch, "merge", broken)


def first_part_not_rescaled(patch):
    def broken(out, lse, part_out, part_lse):
        merged = torch.logaddexp(lse, part_lse)
        out.add_(part_out * (part_lse - merged.masked_fill(merged == -torch.inf, 0.0)).exp()[..., None])
        lse.copy_(merged)

    everywhere(patch, "merge", broken)


def wrong_merged_log_sum_exp(patch):
    merge = torch_backend.engine.merge

    def broken(out, lse, part_out, part_lse):
        most = torch.maximum(lse, part_lse)
        merge(out, lse, part_out, part_lse)
        lse.copy_(most)

    everywhere(patch, "merge", broken)


def gradient_through_the_log_sum_exp_lost(patch):
    backward = torch_backend.backward
    patch.setattr(torch_backend, "backward", lambda grad_out, _, *others: backward(grad_out, None, *others))


def gradient_of_queries_a_little_off(patch):
    backward = torch_backend.backward

    def broken(*some):
        grad_q, grad_k, grad_v = backward(*some)
        return grad_q * (1 + 1e-8), grad_k, grad_v

    patch.setattr(torch_backend, "backward", broken)


def delta_without_the_output(patch):
    backward = fused.fused_backward

    def broken(grad_out, q, k, v, out, *others, **options):
        return backward(grad_out, q, k, v, torch.zeros_like(out), *others, **options)

    everywhere(patch, "fused_backward", broken)


def mask_by_a_large_number(patch):
    tile = torch_backend.tile_math.tile_forward

    def broken(q, k, v, scale, allowed):
        if allowed is None:
            return tile(q, k, v, scale, allowed)
        scores = (q * scale) @ k.transpose(-1, -2) + torch.where(allowed, 0.0, -1e9)
        lse = scores.logsumexp(-1)
        return (scores - lse[..., None]).exp() @ v, lse

    everywhere(patch, "tile_forward", broken)


def empty_rows_divided_by_zero(patch):
    tile = torch_backend.tile_math.tile_forward

    def broken(q, k, v, scale, allowed):
        out, lse = tile(q, k, v, scale, allowed)
        return out.masked_fill((lse == -torch.inf)[..., None], float("nan")), lse

    everywhere(patch, "tile_forward", broken)


def scale_zero_taken_for_none(patch):
    forward = torch_backend.forward
    patch.setattr(torch_backend, "forward", lambda q, k, v, p, scale: forward(q, k, v, p, scale or q.shape[3] ** -0.5))


def sign_of_the_scale_lost(patch):
    forward = fused.fused_forward
    everywhere(patch, "fused_forward", lambda q, k, v, scale, causal: forward(q, k, v, abs(scale), causal))


def key_heads_in_another_order(patch):
    inputs = torch_backend._inputs

    def broken(q, k, v, members, scale):
        return inputs(q, k.flip(1), v.flip(1), members, scale)

    patch.setattr(torch_backend, "_inputs", broken)


def heads_of_another_group(patch):
    heads = torch_backend._heads
    patch.setattr(torch_backend, "_heads", lambda members: heads(tuple(3 - head for head in reversed(members))))


def windows_that_hide_what_they_score(patch):
    patch.setattr(Window, "scored_pairs", property(lambda tile: tile.q_len * tile.window))


def scores_in_half_precision(patch):
    tile = torch_backend.tile_math.tile_forward

    def broken(q, k, v, scale, allowed):
        return tile(q.bfloat16().to(q.dtype), k, v, scale, allowed)

    everywhere(patch, "tile_forward", broken)


def output_rounded_twice_too_coarsely(patch):
    forward = fused.fused_forward

    def broken(*some):
        out, lse = forward(*some)
        return out.to(torch.float8_e5m2).to(out.dtype), lse

    everywhere(patch, "fused_forward", broken)


def masked_rule_forgotten(patch):
    positions = Masked.positions

    def broken(tile, first, last, device):
        q, k = positions(tile, first, last, device)
        return q, torch.where(k >= 0, (k + 1) % 30, k)

    patch.setattr(Masked, "positions", broken)


CAUGHT = [
    (wider_window, local_formula),
    (forgetful_window, local_cache),
    (one_pair_too_many_counted, local_counts),
    (one_pair_too_many_counted, local_plan),
    (window_tiles_one_short, local_plan),
    (window_tiles_one_short, local_numbers),
    (window_tiles_one_short, decode_numbers),
    (window_tiles_one_long, local_plan),
    (window_tiles_one_long, local_numbers),
    (window_tiles_one_long, local_blind),
    (parts_that_overlap, shared_parts),
    (parts_that_overlap, shared_numbers),
    (tile_left_out, local_plan),
    (tile_left_out, strided_plan),
    (tile_left_out, strided_numbers),
    (tile_left_out, fixed_plan),
    (tile_left_out, fixed_numbers),
    (tile_run_twice, local_plan),
    (tile_run_twice, strided_plan),
    (tile_run_twice, strided_numbers),
    (tile_run_twice, table_numbers),
    (triangle_forgotten, strided_plan),
    (triangle_forgotten, strided_numbers),
    (triangle_forgotten, strided_blind),
    (dense_keys_one_late, strided_plan),
    (dense_keys_one_late, strided_numbers),
    (table_block_left_out, table_plan),
    (table_block_left_out, table_numbers),
    (near_summaries_by_one_less, fixed_plan),
    (near_summaries_by_one_less, fixed_numbers),
    (masked_rule_forgotten, fixed_plan),
    (plain_average_of_parts, merged_numbers),
    (first_part_not_rescaled, merged_numbers),
    (wrong_merged_log_sum_exp, merged_numbers),
    (gradient_through_the_log_sum_exp_lost, local_numbers),
    (gradient_of_queries_a_little_off, local_numbers),
    (delta_without_the_output, strided_numbers),
    (mask_by_a_large_number, local_blind),
    (empty_rows_divided_by_zero, empty_row_numbers),
    (scale_zero_taken_for_none, scale_numbers),
    (sign_of_the_scale_lost, negative_scale_numbers),
    (key_heads_in_another_order, grouped_numbers),
    (heads_of_another_group, per_head_numbers),
    (windows_that_hide_what_they_score, honest_windows),
    (scores_in_half_precision, precise_windows),
    (output_rounded_twice_too_coarsely, precise_strides),
]


@pytest.fixture(autouse=True)
def _nothing_is_remembered():
    """Plans and tiles are cached: neither a broken one may outlive its test nor a sound one hide the mistake."""
    ls.plan.cache_clear()
    TILES.tiles.cache_clear()
    yield
    ls.plan.cache_clear()
    TILES.tiles.cache_clear()


@pytest.mark.parametrize(("mistake", "check"), CAUGHT, ids=lambda function: function.__name__)
def test_the_mistake_is_caught(mistake, check):
    check()
    ls.plan.cache_clear()
    TILES.tiles.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        mistake(patch)
        with pytest.raises(AssertionError):
            check()


# ---- the Triton kernels, in the interpreter -------------------------------------------------------------------------


def triton_module(name):
    return importlib.import_module(f"longstride.backends.triton.{name}")


def in_triton(patch: pytest.MonkeyPatch, name: str, broken: object) -> None:
    """Replace a function in every module of the Triton backend that has it; kernels call plain functions as well."""
    owners = [
        triton_module(path)
        for path in ("geometry", "forward_kernel", "backward_kernels", "cell_kernel", "prepare", "launch")
    ]
    owners = [module for module in owners if hasattr(module, name)]
    assert owners, f"no module has {name}"
    for module in owners:
        patch.setattr(module, name, broken)


def forget_launches():
    lowering.lowered.cache_clear()
    if not WHY_NOT:
        triton_module("prepare").forget()


def triton_numbers(pattern, q_len=40, kv_len=40, heads=1, kv_heads=1, scale=None):
    inputs = make_inputs(1, heads, kv_heads, q_len, kv_len, 4, dtype=torch.float32)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    got = results(attend(pattern, "triton", scale), inputs)
    assert_same(
        {name: x.double() for name, x in got.items()}, results(attend(pattern, "reference", scale), exact), 2e-5
    )


def triton_window():
    triton_numbers(ls.Local(20), 70, 70)  # more rows than one closed cell takes


def triton_causal():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_module("tuning"), "LONG", 0)  # with a stretch that runs without a mask
        triton_numbers(ls.Causal(), 70, 70)


def triton_window_blind():
    assert_blind(ls.Local(20), 40, 40, 30, "triton", 1e30, heads=1, kv_heads=1)


def triton_classes():
    triton_numbers(ls.Strided(5))


def triton_decoded_classes():
    triton_numbers(ls.Strided(4), 10)


def triton_blocks():
    triton_numbers(ls.BlockLocal(36), heads=2, kv_heads=2)


def triton_merged():
    triton_numbers(ls.Local(4) | ls.Strided(4))


def triton_summaries():
    triton_numbers(ls.Fixed(8, 2))


def triton_distances():
    triton_numbers(ls.LogSparse(4))


def triton_shared_keys():
    triton_numbers(ls.Local(5), heads=2)


def triton_tables():
    triton_numbers(ls.RandomBlocks(8, 2), heads=2, kv_heads=2)


def triton_negative_scale():
    triton_numbers(ls.Local(5), scale=-0.5)


def queries_see_one_key_too_many(patch):
    holds = triton_module("geometry")._holds

    def broken(i, j, kind, *others):
        return holds(i + 1 if kind == sources.LEAST else i, j, kind, *others)

    in_triton(patch, "_holds", broken)


def windows_of_one_key_less(patch):
    holds = triton_module("geometry")._holds

    def broken(i, j, kind, *others):
        return holds(i + 1 if kind == sources.MOST else i, j, kind, *others)

    in_triton(patch, "_holds", broken)


def packed_classes_mixed(patch):
    holds = triton_module("geometry")._holds

    def broken(i, j, kind, *others):
        return (i == i) & (j == j) if kind == sources.OWN_CLASS else holds(i, j, kind, *others)

    in_triton(patch, "_holds", broken)


def last_tile_of_a_stretch_skipped(patch):
    stretch = triton_module("geometry").stretch

    def broken(*some):
        start, clear_start, clear_stop, stop = stretch(*some)
        return start, clear_start, clear_stop, stop - 16

    in_triton(patch, "stretch", broken)


def masks_left_out_to_the_end(patch):
    stretch = triton_module("geometry").stretch

    def broken(*some):
        start, clear_start, _, stop = stretch(*some)
        return start, clear_start, stop, stop

    in_triton(patch, "stretch", broken)


def last_tile_never_launched(patch):
    for name in ("_job", "_cell_job"):
        make = getattr(triton_module("prepare"), name)
        patch.setattr(
            triton_module("prepare"), name, lambda *some, make=make, **more: _one_tile_less(make(*some, **more))
        )


def _one_tile_less(job):
    return replace(job, tiles=job.tiles - 1)


def merging_forgotten(patch):
    patch.setattr(triton_module("prepare"), "_order", lambda launches, *_: ([False] * len(launches), False))


def delta_not_subtracted(patch):
    scores = triton_module("backward_kernels").scores
    in_triton(patch, "scores", lambda q, do, lse, delta, *others: scores(q, do, lse, delta * 0.0, *others))


def sums_not_rescaled(patch):
    absorb = triton_module("forward_kernel").absorb

    def broken(acc, top, total, *others):
        _, new_top, new_total = absorb(acc, top, total, *others)
        return absorb(acc, new_top, total, *others)[0], new_top, new_total

    in_triton(patch, "absorb", broken)


def log_sum_exp_in_base_2(patch):
    in_triton(patch, "LN_2", 1.0)


def second_reader_forgotten(patch):
    make = triton_module("prepare")._job
    patch.setattr(triton_module("prepare"), "_job", lambda *some, **more: replace(make(*some, **more), readers=1))


def tables_of_the_first_head(patch):
    table = sources._table
    patch.setattr(sources, "_table", lambda *some: (table(*some)[0], 0))


def distances_one_off(patch):
    put = sources.Writer.put_list
    patch.setattr(sources.Writer, "put_list", lambda self, values: put(self, values + 1))


def sign_lost_in_the_launch(patch):
    scales = triton_module("launch")._scales
    patch.setattr(triton_module("launch"), "_scales", lambda scale: scales(abs(scale)))


CAUGHT_IN_TRITON = [
    (queries_see_one_key_too_many, triton_window),
    (queries_see_one_key_too_many, triton_window_blind),
    (queries_see_one_key_too_many, triton_blocks),
    (windows_of_one_key_less, triton_window),
    (packed_classes_mixed, triton_classes),
    (packed_classes_mixed, triton_decoded_classes),
    (last_tile_of_a_stretch_skipped, triton_window),
    (last_tile_of_a_stretch_skipped, triton_summaries),
    (last_tile_of_a_stretch_skipped, triton_tables),
    (masks_left_out_to_the_end, triton_causal),
    (last_tile_never_launched, triton_window),
    (last_tile_never_launched, triton_blocks),
    (merging_forgotten, triton_merged),
    (delta_not_subtracted, triton_window),
    (delta_not_subtracted, triton_blocks),
    (sums_not_rescaled, triton_window),
    (log_sum_exp_in_base_2, triton_window),
    (second_reader_forgotten, triton_shared_keys),
    (tables_of_the_first_head, triton_tables),
    (distances_one_off, triton_distances),
    (sign_lost_in_the_launch, triton_negative_scale),
]


@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("mistake", "check"), CAUGHT_IN_TRITON, ids=lambda function: function.__name__)
def test_the_mistake_in_a_kernel_is_caught(mistake, check):
    with interpreter(), pytest.MonkeyPatch.context() as patch:
        forget_launches()
        check()
        forget_launches()
        mistake(patch)
        with pytest.raises(AssertionError):
            check()
    forget_launches()


@pytest.mark.parametrize("name", ["out", "lse", "grad_q", "grad_k", "grad_v"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e-9], ids=str)
def test_one_wrong_number_is_caught(name, value):
    """One number of one result: not a number, infinite, or off by ten times the tolerance."""
    right = results(attend(ls.Local(4), "reference"), make_inputs(1, 2, 2, 9, 9))
    assert_same(right, right)
    wrong = {key: x.clone() for key, x in right.items()}
    wrong[name][0, 1, 3] += value
    with pytest.raises(AssertionError, match=name):
        assert_same(wrong, right)
