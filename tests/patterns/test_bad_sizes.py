"""Illegal sizes: an error that names the pattern, the value and what is allowed."""

import pytest

import longstride as ls

CASES = [
    (lambda: ls.Local(0), r"Local\(window=0\): window must be at least 1"),
    (lambda: ls.Local(-4), r"Local\(window=-4\): window must be at least 1"),
    (lambda: ls.Local(4, lookahead=-1), r"Local\(lookahead=-1\): lookahead must be at least 0"),
    (lambda: ls.Local(2.5), r"Local\(window=2.5\): window must be a whole number"),
    (lambda: ls.Local("4"), r"Local\(window='4'\): window must be a whole number"),
    (lambda: ls.Local(True), r"Local\(window=True\): window must be a whole number"),
    (lambda: ls.Dilated(3, 0), r"Dilated\(dilation=0\): dilation must be at least 1"),
    (lambda: ls.Dilated(0, 3), r"Dilated\(window=0\): window must be at least 1"),
    (lambda: ls.Dilated(2, 3, -1), r"Dilated\(lookahead=-1\): lookahead must be at least 0"),
    (lambda: ls.Strided(0), r"Strided\(stride=0\): stride must be at least 1"),
    (lambda: ls.Strided(-2), r"Strided\(stride=-2\): stride must be at least 1"),
    (lambda: ls.Strided(3, causal=1), r"Strided\(causal=1\): causal must be True or False"),
    (lambda: ls.BlockLocal(0), r"BlockLocal\(block=0\): block must be at least 1"),
    (lambda: ls.BlockLocal(3, causal="no"), r"BlockLocal\(causal='no'\): causal must be True or False"),
    (lambda: ls.Summary(0, 1), r"Summary\(block=0\): block must be at least 1"),
    (lambda: ls.Summary(4, 0), r"Summary\(count=0\): count must be at least 1"),
    (lambda: ls.Summary(4, 1, -1), r"Summary\(offset=-1\): offset must be at least 0"),
    (lambda: ls.Summary(4, 3, 2), r"Summary\(block=4, count=3, offset=2\): count \+ offset must be at most block"),
    (lambda: ls.Fixed(4, 0), r"Fixed\(summary=0\): summary must be at least 1"),
    (lambda: ls.Fixed(4, 3, 2), r"Fixed\(block=4, summary=3, offset=2\): summary \+ offset must be at most block"),
    (lambda: ls.LogSparse(1), r"LogSparse\(base=1\): base must be at least 2"),
    (lambda: ls.LogSparse(causal=None), r"LogSparse\(causal=None\): causal must be True or False"),
    (lambda: ls.Global(0), r"Global\(tokens=0\): tokens must be at least 1"),
    (lambda: ls.Global(()), r"Global\(tokens=\(\)\): tokens must be a whole number or a tuple of positions"),
    (lambda: ls.Global((3, -1)), r"Global\(token=-1\): token must be at least 0"),
    (lambda: ls.Global("3"), r"Global\(tokens='3'\): tokens must be a whole number or a tuple of positions"),
    (lambda: ls.Causal().mask(0), r"q_len=0: must be a whole number of at least 1"),
    (lambda: ls.Causal().mask(3.5), r"q_len=3.5: must be a whole number"),
    (lambda: ls.Causal().mask(5, 4), r"q_len=5, kv_len=4: the queries are the last q_len positions"),
    (lambda: ls.Causal().pairs(5, 4), r"q_len=5, kv_len=4: the queries are the last q_len positions"),
    (lambda: ls.Causal().pairs(0), r"q_len=0"),
    (lambda: ls.Causal().density(0), r"q_len=0|length=0"),
    (lambda: ls.plan(ls.Causal(), 0), r"q_len=0"),
    (lambda: ls.plan(ls.Causal(), 5, 4), r"q_len=5, kv_len=4: the queries are the last q_len positions"),
    (lambda: ls.plan(ls.Causal(), 3.5), r"q_len=3.5"),
]


@pytest.mark.parametrize(("make", "message"), CASES, ids=[message for _, message in CASES])
def test_illegal_sizes_are_named(make, message):
    with pytest.raises(ls.PatternError, match=message):
        make()


@pytest.mark.parametrize("exponent", [40, 62, 63, 70, 300])
def test_sizes_beyond_any_length_are_refused_or_mean_what_they_say(exponent):
    size = 10**exponent
    makers = (ls.Local, ls.Strided, ls.BlockLocal, lambda n: ls.Fixed(n, 1), lambda n: ls.Dilated(2, n), ls.LogSparse)
    for make in makers:
        try:
            pattern = make(size)
        except ls.PatternError:
            continue
        assert pattern.pairs(9) == int(pattern.mask(9).sum())
        assert ls.plan(pattern, 9).pairs == int(pattern.mask(9).sum())
