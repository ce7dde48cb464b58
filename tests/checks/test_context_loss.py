"""Loss by context: what it is the mean of, and what a pattern that reaches less does to it."""

import math

import numpy as np
import pytest
import torch

from longstride.checks import ContextRange, attending, context_table, loss_by_context, read_schedule
from longstride.checks.context_loss import context_ranges
from longstride.errors import ArgumentError, DataError

RANDOM = np.random.default_rng(0)
# A permutation of 31 bytes, over and over: a byte is known once its predecessor was seen before.
REPEATING = np.tile(RANDOM.permutation(31).astype(np.uint8), 40)


def test_ranges_cover_every_context_once():
    for longest in (1, 2, 7, 8, 100):
        covered = [number for fewest, most in context_ranges(longest) for number in range(fewest, most + 1)]
        assert covered == list(range(1, longest + 1))


def test_bits_are_the_cross_entropy_of_each_range(subject):
    data = RANDOM.integers(0, 256, 300, dtype=np.uint8)
    measured = loss_by_context(subject.predictor(), data, context=20, batch_size=3)
    windows = torch.from_numpy(np.stack([data[start : start + 21] for start in range(0, 280, 21)]).astype(np.int64))
    with torch.no_grad():
        logits = subject.model(windows[:, :-1]).logits.double()
    bits = torch.nn.functional.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none") / math.log(2)
    assert measured.windows == 14
    assert [(entry.fewest, entry.most) for entry in measured.ranges] == [
        (1, 1),
        (2, 2),
        (3, 4),
        (5, 8),
        (9, 16),
        (17, 20),
    ]
    for entry in measured.ranges:
        columns = bits[:, entry.fewest - 1 : entry.most]
        assert entry.tokens == columns.numel()
        assert entry.bits == pytest.approx(columns.mean().item(), abs=1e-5)
        assert entry.perplexity == pytest.approx(2**entry.bits)
        assert entry.standard_error_bits == pytest.approx(columns.mean(1).std().item() / 14**0.5, abs=1e-5)


def test_copying_pays_from_the_period_on_and_a_shorter_window_forgets_it(subject):
    measured = {"as it is": loss_by_context(subject.predictor(), REPEATING, context=63)}
    for pattern in ("Local(30)", "Local(31)"):
        with attending(subject, read_schedule(["OnlyPrevious()", pattern], subject)) as tried:
            measured[pattern] = loss_by_context(tried.predictor(), REPEATING, context=63)
    # The byte to come stood 31 places before it, which is 30 before the query.
    assert measured["as it is"].ranges[-1].bits < 0.01
    assert measured["Local(31)"].ranges[-1].bits < 0.01
    assert measured["Local(30)"].ranges[-1].bits > 4
    for short in range(5):
        assert measured["as it is"].ranges[short].bits > 4
    table = context_table(measured).splitlines()
    assert table[0].split()[:5] == ["context", "bytes", "bits", "+/-", "perplexity"]
    assert table[0].split()[5:] == ["bits", "Local(30)", "more", "bits", "Local(31)", "more"]
    assert table[-1].split()[:3] == ["33", "to", "63"]


def test_records_begin_windows(subject):
    measured = loss_by_context(subject.predictor(), REPEATING[:300], context=12, record=12, unit="byte")
    assert measured.windows == 25
    assert measured.ranges[-1].most == 11


def test_perplexity_that_no_float_holds():
    assert ContextRange(1, 1, 1, 1023.0, None).perplexity == 2.0**1023
    assert ContextRange(1, 1, 1, 5000.0, None).perplexity == math.inf


def test_one_window_has_no_error(subject):
    measured = loss_by_context(subject.predictor(), REPEATING[:64], context=63)
    assert measured.windows == 1
    assert all(entry.standard_error_bits is None for entry in measured.ranges)
    assert "nan" not in str(measured)


def test_refusals(subject):
    with pytest.raises(DataError, match="63 bytes are too few: not one window with 63 bytes of context fits in"):
        loss_by_context(subject.predictor(), REPEATING[:63], context=63)
    with pytest.raises(ArgumentError, match="--context 0: it must be at least 1"):
        loss_by_context(subject.predictor(), REPEATING, context=0)
