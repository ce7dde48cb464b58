"""The suite catches a broken cache: each mistake below, made on purpose, fails checks that the suite runs."""

import importlib

import pytest
import torch
from tests.interpreted import WHY_NOT, interpreter
from tests.test_attention_cached import EXACT, cache_for, decode, make

import longstride as ls
from longstride.backends.torch import decode as torch_decode
from longstride.backends.triton import decode as triton_decode
from longstride.backends.triton import decode_lowering
from longstride.backends.triton.decode import DecodeShape
from longstride.plan import reads, storage
from longstride.plan.layout import Layout
from longstride.plan.reads import Columns, Read, Steps
from longstride.plan.storage import Placed

# `longstride.plan.layout` is a function too; this is the module.
LAYOUT = importlib.import_module("longstride.plan.layout")
TABLE = ls.BlockSparse(torch.eye(12, dtype=torch.bool).roll(-1, 0) | torch.eye(12, dtype=torch.bool), 4) & ls.Causal()


def forget() -> None:
    LAYOUT.layout.cache_clear()
    storage._placed.cache_clear()
    reads._block_lists.cache_clear()
    decode_lowering.lower_layout.cache_clear()


def check(pattern, steps, kv_heads=2, backend=None, headroom=0, tolerance=EXACT):
    q, k, v = make(kv_heads, batch=2, dtype=torch.float32 if backend == "triton" else torch.float64)
    cache = cache_for(pattern, kv_heads, 2, dtype=q.dtype, headroom=headroom)
    decode(*(x[:, :, : steps[0]] for x in (q, k, v)), pattern, cache, steps[:1])
    out = decode(q, k, v, pattern, cache, steps[1:], backend=backend)
    wanted = ls.attention(q.double(), k.double(), v.double(), pattern, backend="reference")
    torch.testing.assert_close(out.double(), wanted[:, :, steps[0] : sum(steps)], rtol=tolerance, atol=tolerance)


# ---- the checks ---------------------------------------------------------------------------------------------------


def window():
    check(ls.Local(5), [20] + [1] * 28)


def window_in_chunks():
    check(ls.Local(5), [20, 7, 7, 14])


def window_several_at_once():
    check(ls.Local(5), [20] + [4] * 7, headroom=3)


def blocks():
    check(ls.Fixed(8, 2), [20] + [1] * 28)


def blocks_in_chunks():
    check(ls.Fixed(8, 2), [20, 7, 7, 14])


def summaries_in_a_window():
    check(ls.Summary(6, 2) & ls.Local(15), [20] + [1] * 28)


def table():
    check(TABLE, [3] + [1] * 45)


def table_in_chunks():
    check(TABLE, [3, 20, 25])


def ragged():
    pattern = ls.Strided(5)
    q, k, v = make(2, batch=2)
    cache = cache_for(pattern, 2, 2)
    ls.attention_cached(*(x[:, :, :20] for x in (q, k, v)), pattern, cache, counts=torch.tensor([20, 13]))
    cache.advance()
    turn = cache.lengths[:, None, None, None]
    token = [x.gather(2, turn.expand(-1, x.shape[1], 1, x.shape[3])) for x in (q, k, v)]
    out = ls.attention_cached(*token, pattern, cache)
    wanted = ls.attention(q, k, v, pattern, backend="reference")
    torch.testing.assert_close(out, wanted.gather(2, turn.expand(-1, 4, 1, wanted.shape[3])), rtol=EXACT, atol=EXACT)


def kernel():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_decode, "decode_shape", lambda *_: DecodeShape(16, 4, 64))  # several splits
        check(ls.Local(18) | ls.Strided(3), [40, 1, 1, 1], kv_heads=4, backend="triton", tolerance=2e-5)


def kernel_blocks():
    check(ls.Fixed(8, 2), [20, 1, 1, 1, 1, 1], backend="triton", tolerance=2e-5)


def kernel_table():
    check(ls.RandomBlocks(4, 2), [20, 1, 1], kv_heads=4, backend="triton", tolerance=2e-5)


# ---- the mistakes -------------------------------------------------------------------------------------------------


def rings_one_row_short(patch):
    rows_for = storage.rows_for
    patch.setattr(storage, "rows_for", lambda need, capacity: rows_for(need, capacity) - (need.window is not None))


def no_headroom(patch):
    need = LAYOUT.need
    patch.setattr(LAYOUT, "need", lambda term, capacity, _headroom: need(term, capacity, 0))


def evicted_rows_taken_for_held(patch):
    held = Layout.held_rows
    patch.setattr(Layout, "held_rows", lambda self, kv_len, length: held(self, kv_len, length - 3))


def pairs_counted_twice(patch):
    patch.setattr(Read, "dropped", ())


def conditions_forgotten(patch):
    patch.setattr(Read, "open", storage.Term())


def unread_rows_read(patch):
    patch.setattr(torch_decode, "UNREAD", 0.0)


def one_key_too_few(patch):
    count = Steps.count
    patch.setattr(Steps, "count", lambda self, longest: max(0, count(self, longest) - 1))


def one_summary_too_few(patch):
    count = Columns.count
    patch.setattr(Columns, "count", lambda self, longest: max(0, count(self, longest) - 1))


def slots_given_away_too_soon(patch):
    placed = storage._placed

    def broken(table, capacity, headroom):
        made = placed(table, capacity, headroom)
        return Placed(made.block, 1, made.slot.clamp(max=0), made.until, made.turn)

    patch.setattr(storage, "_placed", broken)


def lengths_of_the_first_row(patch):
    addresses = torch_decode.addresses

    def broken(layout, rows, batch, tokens, dtype):
        same = type(rows)(**{**vars(rows), "lengths": rows.lengths[:1].expand(batch), "shortest": rows.longest})
        return addresses(layout, same, batch, tokens, dtype)

    patch.setattr(torch_decode, "addresses", broken)


def nothing_written(patch):
    lower = triton_decode.lower_layout

    def broken(layout, device):
        lowered = lower(layout, device)
        for launch in lowered.launches:
            launch.lanes[:, 3] = 0
        return lowered

    patch.setattr(triton_decode, "lower_layout", broken)


def splits_not_joined(patch):
    kernels = importlib.import_module("longstride.backends.triton.decode_kernel")
    patch.setattr(kernels, "_join", lambda *_: None)


def tables_of_the_first_lane(patch):
    lower = triton_decode.lower_layout

    def broken(layout, device):
        lowered = lower(layout, device)
        for launch in lowered.launches:
            launch.spots[:] = launch.spots[:1].clone()
        return lowered

    patch.setattr(triton_decode, "lower_layout", broken)


CAUGHT = [
    (rings_one_row_short, window),
    (rings_one_row_short, blocks),
    (no_headroom, window_several_at_once),
    (evicted_rows_taken_for_held, window_in_chunks),
    (evicted_rows_taken_for_held, blocks_in_chunks),
    (pairs_counted_twice, blocks),
    (conditions_forgotten, summaries_in_a_window),
    (unread_rows_read, blocks),
    (one_key_too_few, window),
    (one_summary_too_few, blocks),
    (slots_given_away_too_soon, table),
    (slots_given_away_too_soon, table_in_chunks),
    (lengths_of_the_first_row, ragged),
]
CAUGHT_IN_THE_KERNEL = [
    (pairs_counted_twice, kernel_blocks),
    (nothing_written, kernel),
    (nothing_written, kernel_blocks),
    (splits_not_joined, kernel),
    (tables_of_the_first_lane, kernel_table),
]


def assert_caught(mistake, check) -> None:
    forget()
    check()
    with pytest.MonkeyPatch.context() as patch:
        forget()
        mistake(patch)
        with pytest.raises(AssertionError):
            check()
    forget()


@pytest.mark.parametrize(("mistake", "check"), CAUGHT, ids=lambda function: function.__name__)
def test_the_mistake_is_caught(mistake, check):
    assert_caught(mistake, check)


@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("mistake", "check"), CAUGHT_IN_THE_KERNEL, ids=lambda function: function.__name__)
def test_the_mistake_in_the_kernel_is_caught(mistake, check):
    with interpreter():
        assert_caught(mistake, check)
