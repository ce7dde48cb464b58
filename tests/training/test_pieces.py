"""Documents as pieces: what a batch holds, and what is hidden in it."""

import torch

from longstride.data import Labelled
from longstride.training.pieces import BEGINNING, MASK, MaskedPieces, RandomPieces, collate, pieces_of

DOCUMENTS = [Labelled(b"short", 1), Labelled(bytes(range(200)), 0)]


def test_a_piece_is_a_beginning_and_bytes_in_a_row():
    pieces = RandomPieces(DOCUMENTS, context=16, count=300, seed=0)
    starts, labels = set(), []
    for index in range(len(pieces)):
        item = pieces[index]
        tokens = item["input_ids"].tolist()
        assert tokens[0] == BEGINNING
        if item["labels"] == 1:
            assert bytes(tokens[1:]) == b"short"
        else:
            assert len(tokens) == 16
            assert tokens[1:] == list(range(tokens[1], tokens[1] + 15))
            starts.add(tokens[1])
        labels.append(int(item["labels"]))
    assert min(starts) == 0
    assert max(starts) == 200 - 15
    assert 100 < sum(labels) < 200  # documents are drawn alike, whatever their length


def test_an_item_depends_on_the_seed_and_its_number_alone():
    first, again = (RandomPieces(DOCUMENTS, 16, 50, seed=3) for _ in range(2))
    assert all(torch.equal(first[n]["input_ids"], again[n]["input_ids"]) for n in (7, 0, 49))
    other = RandomPieces(DOCUMENTS, 16, 50, seed=4)
    assert any(not torch.equal(first[n]["input_ids"], other[n]["input_ids"]) for n in range(50))


def test_masked_pieces_hide_bytes_and_ask_for_them():
    plain = RandomPieces(DOCUMENTS, 64, 400, seed=0)
    masked = MaskedPieces(DOCUMENTS, 64, 400, seed=0)
    asked, hidden, other, same, total = 0, 0, 0, 0, 0
    for index in range(400):
        before, item = plain[index]["input_ids"], masked[index]
        now, labels = item["input_ids"], item["labels"]
        chosen = labels != -100
        assert chosen.any()
        assert not chosen[0]
        assert torch.equal(labels[chosen], before[chosen])
        assert torch.equal(now[~chosen], before[~chosen])
        total += len(before) - 1
        asked += int(chosen.sum())
        hidden += int((now[chosen] == MASK).sum())
        same += int((now[chosen] == before[chosen]).sum())
        other += int(((now[chosen] != before[chosen]) & (now[chosen] != MASK)).sum())
    assert abs(asked / total - 0.15) < 0.03
    assert abs(hidden / asked - 0.8) < 0.05
    assert abs(other / asked - 0.1) < 0.03
    assert abs(same / asked - 0.1) < 0.03


def test_batches_are_padded_on_the_right():
    items = [{"input_ids": torch.arange(n), "labels": torch.tensor(n)} for n in (3, 5)]
    batch = collate(items)
    assert batch["input_ids"].tolist() == [[0, 1, 2, 0, 0], [0, 1, 2, 3, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [3, 5]
    tokens = collate([{"input_ids": torch.arange(n), "labels": torch.arange(n)} for n in (1, 2)])
    assert tokens["labels"].tolist() == [[0, -100], [0, 1]]


def test_pieces_side_by_side_read_every_byte_and_are_full():
    text = bytes(range(100))
    pieces = [bytes(piece[1:].tolist()) for piece in pieces_of(text, 8, most=99)]
    assert b"".join(pieces[:-1]) == text[:98]
    assert pieces[-1] == text[-7:]
    assert [bytes(piece[1:].tolist()) for piece in pieces_of(text[:98], 8, most=99)] == pieces[:-1]
    assert [len(piece) for piece in pieces_of(b"abc", 8, most=9)] == [4]
    some = pieces_of(text, 8, most=3)
    assert [int(piece[1]) for piece in some] == [0, 49, 93]  # from the first to the last
    assert [int(piece[1]) for piece in pieces_of(text, 8, most=1)] == [0]
