"""Windows of a split: seeded, stateless, everywhere."""

import numpy as np
import pytest

from longstride.data import EvenWindows, RandomWindows
from longstride.errors import ArgumentError

SPLIT = np.arange(200, dtype=np.uint8)


def test_item_is_the_window_at_its_start_as_input_and_labels():
    windows = RandomWindows(SPLIT, length=16, count=10, seed=3)
    for index in range(10):
        item = windows[index]
        start = windows.start(index)
        assert item["input_ids"].tolist() == list(range(start, start + 16))
        assert item["labels"].tolist() == item["input_ids"].tolist()


def test_starts_are_pinned():
    # Another hash would make a resumed run see other windows after an upgrade.
    windows = RandomWindows(np.zeros(1_000_000, dtype=np.uint8), length=1024, count=4, seed=7)
    assert [windows.start(index) for index in range(4)] == [199268, 33097, 279376, 242241]


def test_start_depends_on_seed_and_index_alone():
    first = RandomWindows(SPLIT, length=16, count=100, seed=1)
    again = RandomWindows(SPLIT, length=16, count=5000, seed=1)
    other = RandomWindows(SPLIT, length=16, count=100, seed=2)
    backwards = [again.start(index) for index in reversed(range(100))][::-1]
    assert [first.start(index) for index in range(100)] == backwards
    assert sum(first.start(index) == other.start(index) for index in range(100)) < 10


def test_every_start_is_drawn_about_equally_often():
    windows = RandomWindows(SPLIT[:25], length=16, count=10_000, seed=0)
    counts = np.bincount([windows.start(index) for index in range(10_000)], minlength=10)
    assert len(counts) == 10
    assert counts.min() > 850
    assert counts.max() < 1150


def test_even_windows_span_the_split_and_do_not_repeat_bytes_when_it_is_short():
    windows = EvenWindows(SPLIT, length=16, count=5)
    assert [int(windows[index]["input_ids"][0]) for index in range(len(windows))] == [0, 46, 92, 138, 184]
    short = EvenWindows(SPLIT[:50], length=16, count=5)
    assert [int(short[index]["input_ids"][0]) for index in range(len(short))] == [0, 17, 34]


@pytest.mark.parametrize("kind", [lambda: RandomWindows(SPLIT, 201, 1, 0), lambda: EvenWindows(SPLIT, 201, 1)])
def test_window_longer_than_the_split_is_refused(kind):
    with pytest.raises(ArgumentError, match="a window of 201 tokens does not fit into 200"):
        kind()


def test_end_of_a_data_set_is_an_index_error():
    assert len(list(RandomWindows(SPLIT, 16, 7, 0))) == 7
    assert len(list(EvenWindows(SPLIT, 16, 7))) == 7


def test_windows_of_records_start_where_records_do():
    windows = RandomWindows(SPLIT[:197], length=12, count=500, seed=0, record=12)
    assert {windows.start(index) for index in range(500)} == set(range(0, 192, 12))
    longer = RandomWindows(SPLIT, length=30, count=500, seed=0, record=12)
    assert {longer.start(index) for index in range(500)} == set(range(0, 171, 12))
    even = EvenWindows(SPLIT[:60], length=12, count=3, record=12)
    assert [int(even[index]["input_ids"][0]) for index in range(3)] == [0, 24, 48]
    assert len(EvenWindows(SPLIT[:60], length=12, count=9, record=12)) == 5
