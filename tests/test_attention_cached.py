"""Decoding equals the rows of the whole sequence's attention, whatever the pattern, the steps and the batch."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.oracle import TIMES_PLAIN
from tests.strategies import ATOMS, LONGEST, Thirds, patterns

import longstride as ls

HEADS, DIM, V_DIM = 4, 6, 5
EXACT = 1e-10

CAUSAL = [pattern if pattern.is_causal else pattern & ls.Causal() for pattern in ATOMS]
CAUSAL = [pattern for pattern in CAUSAL if pattern.bind(LONGEST) == pattern]
# A walk along one region of a kind says nothing of another of the same kind.
CAUSAL += [
    ls.LogSparse(2) & ls.LogSparse(3),
    ls.LogSparse(3) & ls.LogSparse(2),
    ls.Summary(6, 3) & ls.Summary(4, 2),
    ls.Global((2, 7, 11)) & ls.Global((7, 20)),
    ls.BlockLocal(6) & ls.BlockLocal(4),
    ls.RandomBlocks(4, 3) & ls.RandomBlocks(6, 3),
]


def make(kv_heads=HEADS, batch=1, length=LONGEST, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((HEADS, DIM), (kv_heads, DIM), (kv_heads, V_DIM))
    return [
        torch.randn(batch, heads, length, dim, generator=generator, dtype=torch.float64).to(dtype)
        for heads, dim in shapes
    ]


def cache_for(pattern, kv_heads=HEADS, batch=1, capacity=LONGEST, dtype=torch.float64, **changes):
    sizes = {"num_heads": HEADS, "num_kv_heads": kv_heads, "head_dim": DIM, "v_head_dim": V_DIM}
    return ls.PatternCache(pattern, capacity=capacity, batch=batch, dtype=dtype, **sizes, **changes)


def decode(q, k, v, pattern, cache, steps, **options):
    """The outputs of consecutive steps, side by side."""
    outs, start = [], cache.longest
    for tokens in steps:
        part = slice(start, start + tokens)
        outs.append(ls.attention_cached(q[:, :, part], k[:, :, part], v[:, :, part], pattern, cache, **options))
        cache.advance()
        start += tokens
    return torch.cat(outs, 2)


@st.composite
def steps_of(draw, length=LONGEST):
    """Sizes of steps that make up `length` tokens: single tokens, a few, chunks."""
    steps = []
    while sum(steps) < length:
        steps.append(min(draw(st.sampled_from([1, 1, 1, 2, 3, 7, 20])), length - sum(steps)))
    return steps


@settings(max_examples=120)
@given(patterns(), st.sampled_from([1, 2, 4]), st.integers(0, 4), steps_of(), st.integers(1, 2))
def test_any_steps_give_the_rows_of_the_whole(pattern, kv_heads, headroom, steps, batch):
    pattern = pattern if pattern.is_causal else pattern & ls.Causal()
    assume(pattern.bind(LONGEST) == pattern)
    q, k, v = make(kv_heads, batch)
    cache = cache_for(pattern, kv_heads, batch, headroom=headroom)
    out = decode(q, k, v, pattern, cache, steps)
    torch.testing.assert_close(out, ls.attention(q, k, v, pattern, backend="reference"), rtol=EXACT, atol=EXACT)


@settings(max_examples=80)
@given(patterns(), st.sampled_from([1, 2, 4]), st.integers(0, 3), st.data())
def test_rows_of_different_lengths_are_as_if_alone(pattern, kv_heads, headroom, data):
    pattern = pattern if pattern.is_causal else pattern & ls.Causal()
    assume(pattern.bind(LONGEST) == pattern)
    q, k, v = make(kv_heads, batch=3)
    wanted = ls.attention(q, k, v, pattern, backend="reference")
    cache = cache_for(pattern, kv_heads, batch=3, headroom=headroom)
    lengths = torch.zeros(3, dtype=torch.int64)
    for _ in range(data.draw(st.integers(1, 6))):
        tokens = min(data.draw(st.sampled_from([1, 1, 2, 8, 15])), LONGEST - int(lengths.max()))
        if not tokens:
            break
        counts = torch.tensor([data.draw(st.integers(0, tokens)) for _ in range(3)])
        counts = counts if data.draw(st.booleans()) else torch.full((3,), tokens)
        turn = (lengths[:, None] + torch.arange(tokens)).clamp(max=LONGEST - 1)
        given_ = [x.gather(2, turn[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])) for x in (q, k, v)]
        # What stands behind a row's tokens must not matter.
        beyond = (torch.arange(tokens) >= counts[:, None])[:, None, :, None]
        given_ = [x.masked_fill(beyond, 1e3) for x in given_]
        everything = bool((counts == tokens).all())
        out = ls.attention_cached(*given_, pattern, cache, counts=None if everything else counts)
        cache.advance()
        for row in range(3):
            start, count = int(lengths[row]), int(counts[row])
            torch.testing.assert_close(
                out[row, :, :count], wanted[row, :, start : start + count], rtol=EXACT, atol=EXACT
            )
        lengths += counts
        assert torch.equal(cache.lengths, lengths)
        assert cache.shortest <= int(lengths.min())
        assert cache.longest >= int(lengths.max())


@pytest.mark.parametrize("pattern", CAUSAL, ids=str)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_every_pattern_by_every_backend(pattern, backend):
    q, k, v = make(2)
    out = decode(q, k, v, pattern, cache_for(pattern, 2), [20] + [1] * 28, backend=backend)
    torch.testing.assert_close(out, ls.attention(q, k, v, pattern, backend="reference"), rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pattern", [ls.Causal(), ls.Fixed(8, 2), ls.Local(5) | ls.Strided(5)], ids=str)
def test_as_precise_as_the_whole_forward(pattern, dtype):
    q, k, v = make(2, length=40, dtype=dtype)
    truth = ls.attention(q.double(), k.double(), v.double(), pattern, backend="reference")
    plain = ls.attention(q, k, v, pattern, backend="reference")
    out = decode(q, k, v, pattern, cache_for(pattern, 2, dtype=dtype), [10] + [1] * 30)
    assert out.dtype == dtype
    error, allowed = ((x.double() - truth).norm() / truth.norm() for x in (out, plain))
    assert error <= TIMES_PLAIN["out"] * allowed + torch.finfo(dtype).eps


@pytest.mark.parametrize("pattern", [ls.Causal(), ls.Fixed(8, 2), Thirds() & ls.Causal(), ls.Strided(5)], ids=str)
def test_a_scale_of_ones_own(pattern):
    q, k, v = make()
    for scale in (0.0, 0.7):
        out = decode(q, k, v, pattern, cache_for(pattern), [7] + [1] * 41, scale=scale)
        wanted = ls.attention(q, k, v, pattern, scale=scale, backend="reference")
        torch.testing.assert_close(out, wanted, rtol=EXACT, atol=EXACT)


def test_a_query_that_reads_nothing_gets_zeros():
    pattern = ls.BlockSparse(torch.ones(4, 4, dtype=torch.bool).tril(-1), 12)
    q, k, v = make()
    out = decode(q, k, v, pattern, cache_for(pattern), [3] + [1] * 45)
    assert (out[:, :, :12] == 0).all()
    torch.testing.assert_close(out, ls.attention(q, k, v, pattern, backend="reference"), rtol=EXACT, atol=EXACT)


def test_layers_share_a_step():
    schedule = [ls.Local(5), ls.Strided(5), ls.Local(5)]
    inputs = [make(seed=seed) for seed in range(3)]
    cache = cache_for(schedule)
    wanted = [ls.attention(*x, pattern, backend="reference") for x, pattern in zip(inputs, schedule, strict=True)]
    for position in range(LONGEST):
        for layer, (x, pattern) in enumerate(zip(inputs, schedule, strict=True)):
            token = [each[:, :, position : position + 1] for each in x]
            out = ls.attention_cached(*token, pattern, cache, layer=layer)
            torch.testing.assert_close(out, wanted[layer][:, :, position : position + 1], rtol=EXACT, atol=EXACT)
        cache.advance()


def test_under_autocast_what_is_kept_stays_in_the_cache_s_dtype():
    q, k, v = make(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = (x.bfloat16() for x in (q, k, v))
        out = decode(*narrow, ls.Local(5), cache_for(ls.Local(5), dtype=torch.float32), [1] * 9)
    assert out.dtype == torch.float32


@pytest.mark.parametrize(
    ("pattern", "most"),
    [
        (ls.Local(64), 64),
        (ls.Strided(64), 64),
        (ls.Fixed(64, 4), 64 + 4 * 64),
        (ls.LogSparse(), 14),
        (ls.Global(2), 2 * 2),
    ],
    ids=str,
)
def test_a_step_looks_at_what_the_pattern_reads(pattern, most):
    made = cache_for(pattern, capacity=4096).layouts[0]
    assert max(made.reads(position, position) for position in range(4096)) <= most
    assert math.isqrt(4096) == 64


# ---- refusals -----------------------------------------------------------------------------------------------------


def test_another_pattern_than_the_cache_s():
    q, k, v = make(length=1)
    with pytest.raises(
        ls.ArgumentError, match=r"pattern Local\(4\): layer 0 of this cache keeps what Local\(5\) reads"
    ):
        ls.attention_cached(q, k, v, ls.Local(4), cache_for(ls.Local(5)))


def test_a_refused_call_can_be_made_again():
    q, k, v = make(length=1)
    cache = cache_for(ls.Local(5))
    with pytest.raises(ls.ArgumentError):
        ls.attention_cached(q, k, v, ls.Local(4), cache)
    ls.attention_cached(q, k, v, ls.Local(5), cache)
    cache.advance()
    assert cache.longest == 1


def test_no_room():
    q, k, v = make(length=12)
    cache = cache_for(ls.Local(5), capacity=10)
    with pytest.raises(ls.ArgumentError, match=r"0 tokens and 12 more: .* room for 10; make one with a capacity of at"):
        ls.attention_cached(q, k, v, ls.Local(5), cache)
    decode(q, k, v, ls.Local(5), cache, [9, 1])
    with pytest.raises(ls.ArgumentError, match="10 tokens and 1 more: this cache has room for 10"):
        decode(q, k, v, ls.Local(5), cache, [1])


def test_tokens_twice_and_too_few_layers():
    q, k, v = make(length=1)
    cache = cache_for([ls.Local(5), ls.Local(5)])
    ls.attention_cached(q, k, v, ls.Local(5), cache, layer=0)
    with pytest.raises(ls.ArgumentError, match="layer 0 is given tokens twice in one step: call advance"):
        ls.attention_cached(q, k, v, ls.Local(5), cache, layer=0)
    with pytest.raises(ls.ArgumentError, match=r"advance\(\) before layers 1 were given tokens"):
        cache.advance()
    q, k, v = make(length=2)
    with pytest.raises(ls.ArgumentError, match="layer 1 is given 2 tokens in a step of 1"):
        ls.attention_cached(q, k, v, ls.Local(5), cache, layer=1)
    with pytest.raises(ls.ArgumentError, match=r"layer 2: this cache has layers 0 \.\. 1"):
        ls.attention_cached(q, k, v, ls.Local(5), cache, layer=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q, k[:, :2], v[:, :2]), r"are \(1, 4, 2, 6, 5\): this cache was made for \(1, 4, 4, 6, 5\)"),
        (lambda q, k, v: (q.repeat(2, 1, 1, 1), k.repeat(2, 1, 1, 1), v.repeat(2, 1, 1, 1)), r"are \(2, 4"),
        (lambda q, k, v: (q.float(), k.float(), v.float()), "this cache is torch.float64"),
        (lambda q, k, v: (q[:, :, :1], k, v), "1 queries and 2 keys: give the queries and keys of the same tokens"),
        (lambda q, k, v: (q, k.float(), v), "k is torch.float32, q is torch.float64"),
        (lambda q, k, v: (q.tolist(), k, v), "q is list"),
    ],
)
def test_tensors_that_do_not_fit(change, message):
    with pytest.raises(ls.ArgumentError, match=message):
        ls.attention_cached(*change(*make(length=2)), ls.Local(5), cache_for(ls.Local(5)))


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (torch.tensor([1, 2]), r"it must be int64 \[batch\] = \[1\]"),
        (torch.tensor([1.0]), r"counts is torch.float32"),
        (torch.tensor([3]), "counts run from 3 to 3: each must be from 0 to the 2 given"),
        (torch.tensor([-1]), "counts run from -1"),
    ],
    ids=str,
)
def test_counts_that_do_not_fit(counts, message):
    with pytest.raises(ls.ArgumentError, match=message):
        ls.attention_cached(*make(length=2), ls.Local(5), cache_for(ls.Local(5)), counts=counts)


def test_gradients_and_backends():
    q, k, v = make(length=1)
    cache = cache_for(ls.Local(5))
    with pytest.raises(ls.UnsupportedError, match="a cache keeps no gradients"):
        ls.attention_cached(q.requires_grad_(), k, v, ls.Local(5), cache)
    with pytest.raises(ls.ArgumentError, match="backend='abacus'"):
        ls.attention_cached(q.detach(), k, v, ls.Local(5), cache, backend="abacus")
    with pytest.raises(ls.ArgumentError, match="cache is NoneType"):
        ls.attention_cached(q.detach(), k, v, ls.Local(5), None)
