"""`repeats_every`: the shift along the diagonal that a memory of earlier tokens may be cut by."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.strategies import ATOMS, Thirds, joined, per_head_mixes

import longstride as ls


@settings(max_examples=100)
@given(joined() | per_head_mixes() | st.sampled_from(ATOMS), st.integers(0, 40))
def test_a_pattern_that_repeats_is_the_same_from_there(pattern, length):
    every = pattern.repeats_every
    if every is None:
        return
    i = torch.arange(length + 1)
    assert torch.equal(pattern.allows(i[:, None] + every, i + every), pattern.allows(i[:, None], i))


def test_what_repeats_and_what_does_not():
    shifts = {str(pattern): pattern.repeats_every for pattern in ATOMS}
    assert shifts["Local(5)"] == shifts["Strided(5)"] == shifts["LogSparse()"] == shifts["Dilated(3, 4)"] == 1
    assert (shifts["BlockLocal(6)"], shifts["Summary(5, 2, offset=1)"], shifts["Fixed(8, 2)"]) == (6, 5, 8)
    for pattern in (ls.Global(3), ls.RandomBlocks(4, 2), Thirds(), ls.BlockSparse(torch.ones(2, 2).bool(), 4)):
        assert pattern.repeats_every is None
        assert (ls.Local(3) | pattern).repeats_every is None
    assert ls.per_head(ls.BlockLocal(6), ls.BlockLocal(4)).repeats_every == 12
