"""`PatternCache` itself: its bytes, taking tokens back, rows of the batch, memory that does not grow."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.strategies import LONGEST
from tests.test_attention_cached import CAUSAL, EXACT, HEADS, cache_for, decode, make
from torch.profiler import ProfilerActivity

import longstride as ls

SIZES = {"num_heads": 4, "head_dim": 16}
#: Bytes that a row of the batch takes beside keys and values: its length, and four heads' arrivals.
BESIDE = 8 + 4 * 4


# ---- bytes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [*CAUSAL, ls.per_head(ls.Local(4), ls.Fixed(8, 2))], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_takes_the_bytes_that_were_said_beforehand(pattern, dtype):
    sizes = {**SIZES, "num_kv_heads": 2, "v_head_dim": 8, "batch": 3, "headroom": 2, "dtype": dtype}
    said = ls.cache_bytes(pattern, LONGEST, **sizes)  # and the layout is made
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profile:
        cache = ls.PatternCache(pattern, capacity=LONGEST, **sizes)
    taken = sum(event.self_cpu_memory_usage for event in profile.events())
    assert cache.nbytes == taken == said


def test_bytes_of_layers_add_up():
    one, other = ls.Local(32), ls.Fixed(32, 4)
    both = ls.cache_bytes([one, other], 1000, **SIZES)
    assert both == ls.cache_bytes(one, 1000, **SIZES) + ls.cache_bytes(other, 1000, **SIZES) - BESIDE


def test_windows_take_the_same_at_any_length_and_fixed_a_small_share():
    assert ls.cache_bytes(ls.Local(128), 2**12, **SIZES) == ls.cache_bytes(ls.Local(128), 2**20, **SIZES)
    dense = ls.cache_bytes(ls.Causal(), 2**16, **SIZES)
    assert ls.cache_bytes(ls.Fixed(128, 8), 2**16, **SIZES) <= 0.07 * dense
    assert dense == 2 * 4 * 4 * 16 * 2**16 + 2 * 4 * 16 * 2 + BESIDE


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's account of a process's memory")
def test_a_hundred_thousand_tokens_at_constant_memory():
    """Decoded one by one at first, then eight at a time, which takes less long."""
    pattern, length = ls.Fixed(512, 2), 100_000
    cache = ls.PatternCache(pattern, capacity=length, num_heads=1, head_dim=8, headroom=7)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, length, 8, generator=generator) for _ in range(3))
    places = [x.data_ptr() for x in (*cache.keys, *cache.values, cache.lengths)]
    decode(q, k, v, pattern, cache, [1] * 2_000)
    before = resident_bytes()
    while cache.longest < length:
        part = slice(cache.longest, cache.longest + 8)
        out = ls.attention_cached(q[:, :, part], k[:, :, part], v[:, :, part], pattern, cache)
        cache.advance()
    assert resident_bytes() - before < 4 << 20
    assert places == [x.data_ptr() for x in (*cache.keys, *cache.values, cache.lengths)]
    assert cache.nbytes == ls.cache_bytes(pattern, length, num_heads=1, head_dim=8, headroom=7)
    wanted = ls.attention(q[:, :, -8:], k, v, pattern, backend="reference")
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)


# ---- taking tokens back -------------------------------------------------------------------------------------------


@settings(max_examples=80)
@given(
    st.sampled_from(CAUSAL), st.integers(0, 4), st.integers(1, 30), st.lists(st.integers(0, 5), min_size=1, max_size=30)
)
def test_tokens_taken_back_leave_no_trace(pattern, headroom, prompt, rights):
    """As in speculative decoding: guesses are decoded several at a time, and the wrong ones are taken back, or all."""
    q, k, v = make(2)
    guesses = make(2, seed=1)
    wanted = ls.attention(q, k, v, pattern, backend="reference")
    cache = cache_for(pattern, 2, headroom=headroom)
    decode(q, k, v, pattern, cache, [prompt])
    for right in rights:
        start, tokens = cache.longest, min(headroom + 1, LONGEST - cache.longest)
        right = min(right, tokens)
        mixed = [
            torch.cat([x[:, :, start : start + right], y[:, :, start + right : start + tokens]], 2)
            for x, y in zip((q, k, v), guesses, strict=True)
        ]
        if not tokens:
            break
        out = ls.attention_cached(*mixed, pattern, cache)
        cache.advance()
        torch.testing.assert_close(out[:, :, :right], wanted[:, :, start : start + right], rtol=EXACT, atol=EXACT)
        cache.crop(tokens - right)


def test_more_than_the_headroom_can_be_taken_back_where_nothing_was_evicted():
    pattern = ls.Local(5) | ls.Strided(4)
    q, k, v = make()
    cache = cache_for(pattern)
    decode(q, k, v, pattern, cache, [40])
    cache.crop(33)
    out = decode(q, k, v, pattern, cache, [1] * 20)
    wanted = ls.attention(q, k, v, pattern, backend="reference")
    torch.testing.assert_close(out, wanted[:, :, 7:27], rtol=EXACT, atol=EXACT)
    # A ring that was never full has evicted nothing either.
    young = cache_for(ls.Local(30))
    decode(q, k, v, ls.Local(30), young, [20])
    young.crop(15)
    assert young.longest == 5


def test_what_was_evicted_cannot_come_back():
    q, k, v = make()
    cache = cache_for(ls.Local(5), headroom=1)
    decode(q, k, v, ls.Local(5), cache, [20])
    cache.crop(1)
    message = (
        r"Local\(5\) would read keys again that were evicted .* at most 1 tokens .* make the cache with headroom=2"
    )
    with pytest.raises(ls.ArgumentError, match=message):
        cache.crop(2)
    cache.crop(1)
    with pytest.raises(ls.ArgumentError, match="at most 0 tokens"):
        cache.crop(1)
    decode(q, k, v, ls.Local(5), cache, [1, 1])
    cache.crop(2)
    cache.crop(18)  # all of them: the cache is empty again
    assert cache.longest == 0
    out = decode(q, k, v, ls.Local(5), cache, [1] * 10)
    wanted = ls.attention(q, k, v, ls.Local(5), backend="reference")
    torch.testing.assert_close(out, wanted[:, :, :10], rtol=EXACT, atol=EXACT)


def test_more_tokens_than_there_are_cannot_be_taken_back():
    q, k, v = make()
    cache = cache_for(ls.Causal())
    decode(q, k, v, ls.Causal(), cache, [3])
    for tokens in (4, -1):
        with pytest.raises(ls.ArgumentError, match="from 0 to 3 tokens can be taken back"):
            cache.crop(tokens)


def test_a_table_s_slot_that_was_given_away_cannot_come_back():
    diagonal = ls.BlockSparse(torch.eye(12, dtype=torch.bool), 4) & ls.Causal()
    q, k, v = make()
    cache = cache_for(diagonal)
    decode(q, k, v, diagonal, cache, [9])
    with pytest.raises(ls.ArgumentError, match="evicted"):
        cache.crop(3)


# ---- rows of the batch --------------------------------------------------------------------------------------------


def test_rows_change_places_as_beams_do():
    pattern = ls.per_head(ls.Fixed(8, 2), ls.Strided(3))
    q, k, v = make(batch=3)
    cache = cache_for(pattern, batch=3)
    memory = [x.data_ptr() for x in cache.keys]
    counts = torch.tensor([12, 7, 9])
    ls.attention_cached(*(x[:, :, :12] for x in (q, k, v)), pattern, cache, counts=counts)
    cache.advance()
    order = torch.tensor([2, 2, 0])
    cache.select(order)
    assert cache.lengths.tolist() == [9, 9, 12]
    assert [x.data_ptr() for x in cache.keys] == memory
    wanted = ls.attention(q, k, v, pattern, backend="reference")
    turn = cache.lengths[:, None, None, None]
    token = [x[order].gather(2, turn.expand(-1, x.shape[1], 1, x.shape[3])) for x in (q, k, v)]
    out = ls.attention_cached(*token, pattern, cache)
    expected = wanted[order].gather(2, turn.expand(-1, HEADS, 1, wanted.shape[3]))
    torch.testing.assert_close(out, expected, rtol=EXACT, atol=EXACT)


def test_one_prompt_serves_several_samples():
    pattern = ls.Fixed(8, 2)
    q, k, v = make()
    cache = cache_for(pattern)
    decode(q, k, v, pattern, cache, [10])
    cache.repeat(3)
    assert cache.batch == 3
    others = make(batch=3, seed=5)
    out = decode(*others, pattern, cache, [1, 1])
    for row in range(3):
        whole = [
            torch.cat([x[:, :, :10], y[row : row + 1, :, 10:12]], 2) for x, y in zip((q, k, v), others, strict=True)
        ]
        wanted = ls.attention(*whole, pattern, backend="reference")[:, :, 10:]
        torch.testing.assert_close(out[row : row + 1], wanted, rtol=EXACT, atol=EXACT)
    cache.select(torch.tensor([1]))
    assert (cache.batch, cache.longest) == (1, 12)


def test_nothing_happens_within_a_step():
    q, k, v = make(length=1)
    cache = cache_for([ls.Local(5), ls.Local(5)])
    ls.attention_cached(q, k, v, ls.Local(5), cache)
    for act in (lambda: cache.crop(0), lambda: cache.repeat(2), lambda: cache.select(torch.tensor([0]))):
        with pytest.raises(ls.ArgumentError, match="within a step"):
            act()
    cache.reset()
    cache.crop(0)


def test_a_replayed_step_is_counted_and_has_its_room():
    cache = cache_for(ls.Local(5), capacity=3)
    cache.passed(2)
    assert (cache.shortest, cache.longest) == (2, 2)
    with pytest.raises(ls.ArgumentError, match="2 tokens and 2 more: this cache has room for 3"):
        cache.passed(2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 0}, "batch=0: it must be a whole number of at least 1"),
        ({"head_dim": 0}, "head_dim=0"),
        ({"v_head_dim": 1.5}, "v_head_dim=1.5"),
        ({"patterns": []}, "a cache of no layers"),
    ],
    ids=str,
)
def test_sizes_that_make_no_cache(changes, message):
    arguments = {"patterns": ls.Local(5), "capacity": 10, **SIZES, **changes}
    with pytest.raises(ls.ArgumentError, match=message):
        ls.PatternCache(arguments.pop("patterns"), **arguments)


def test_copies_that_make_no_cache():
    with pytest.raises(ls.ArgumentError, match=r"repeat\(0\)"):
        cache_for(ls.Local(5)).repeat(0)


def test_it_says_what_it_is():
    assert "1 layers, 1 rows of at most 48 tokens, 0 there" in repr(cache_for(ls.Local(5)))
