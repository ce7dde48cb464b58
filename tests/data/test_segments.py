"""Segments: every row of a batch goes on where it ended, and begins anew where a document does."""

import numpy as np
import pytest
import torch

from longstride.data import Segments
from longstride.errors import ArgumentError

SPLIT = np.arange(200, dtype=np.uint8)


def walk(data, row):
    return [data[index] for index in range(row, len(data), data.rows)]


def test_a_row_follows_the_text_and_predicts_every_token_once():
    data = Segments(SPLIT, length=16, rows=3, count=3 * 13)
    assert data.total == 13  # the last of them of 199 - 12 * 16 predictions
    for row in range(3):
        items = walk(data, row)
        begins = row * 13 // 3
        starts = [(begins + step) % 13 * 16 for step in range(13)]
        assert [int(item["input_ids"][0]) for item in items] == starts
        assert [item["starts"] for item in items] == [step == 0 or start == 0 for step, start in enumerate(starts)]
        targets = torch.cat([item["shift_labels"] for item in items])
        assert sorted(targets[targets != -100].tolist()) == list(range(1, 200))


def test_a_target_is_the_token_after_its_input():
    for item in Segments(SPLIT, length=16, rows=2, count=26):
        tokens, following = item["input_ids"], item["shift_labels"]
        counted = following != -100
        assert torch.equal(following[counted], tokens[counted] + 1)
        assert not tokens[~counted].any()
        # What is filled up stands at the end.
        assert torch.equal(counted, counted.sort(descending=True).values)


def test_no_segment_reaches_into_another_document():
    records = np.array([0, 1, 34, 34, 84, 117, 200])
    document = np.repeat(np.arange(6), np.diff(records))
    data = Segments(SPLIT, length=16, rows=2, count=2 * 13, records=records)
    # Documents of 1, 33, 0, 50, 33 and 83 tokens have one fewer predictions each.
    assert data.total == 0 + 2 + 0 + 4 + 2 + 6
    seen = []
    for row in range(2):
        before = None
        for item in walk(data, row):
            real = item["input_ids"][item["shift_labels"] != -100]
            assert len({document[token] for token in real.tolist()}) == 1
            first = int(real[0])
            assert item["starts"] == (first in records or before is None)
            if not item["starts"]:
                assert first == before + 1
            before = int(real[-1])
            seen += item["shift_labels"][item["shift_labels"] != -100].tolist()
    # Two rows of 13 of 14 segments each: all but the first tokens of documents, and nothing else.
    assert set(seen) == set(range(200)) - set(records.tolist()[:-1])


def test_collate_keeps_starts_on_the_host():
    data = Segments(SPLIT, length=16, rows=2, count=4)
    batch = Segments.collate([data[2], data[3]])
    assert batch["starts"] == [False, False]
    assert batch["input_ids"].shape == batch["shift_labels"].shape == (2, 16)
    assert torch.equal(batch["labels"], batch["shift_labels"])
    assert Segments.collate([data[0], data[1]])["starts"] == [True, True]


def test_item_depends_on_its_index_alone():
    short, long = Segments(SPLIT, 16, rows=2, count=8), Segments(SPLIT, 16, rows=2, count=200)
    for index in (7, 3, 0):
        assert torch.equal(short[index]["input_ids"], long[index]["input_ids"])
    with pytest.raises(IndexError):
        short[8]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"count": 5}, "5 segments in batches of 2 rows: give a multiple of 2"),
        ({"records": np.array([0, 9])}, r"documents from 0 to 9 in a split of 200 tokens"),
        ({"records": np.arange(201)}, "200 tokens without a document of two or more"),
    ],
)
def test_refusals(options, match):
    with pytest.raises(ArgumentError, match=match):
        Segments(SPLIT, **({"length": 16, "rows": 2, "count": 4} | options))
