"""Documents with their boundaries, from files to packed attention."""

import json

import numpy as np
import pytest
import torch

import longstride
from longstride.data import PackedWindows, RandomWindows, decode_source, open_source, prepare
from longstride.data.documents import EMPTY, Documents
from longstride.data.kind import CorruptFileError
from longstride.errors import ArgumentError, DataError


@pytest.fixture
def folder(tmp_path):
    """Documents of 5, 0, 300, 40 and 7 bytes."""
    (tmp_path / "in").mkdir()
    for name, length in (("a", 5), ("b", 0), ("c", 300), ("d", 40), ("e", 7)):
        (tmp_path / "in" / name).write_bytes(name.encode() * length)
    return tmp_path / "in"


def test_bytes_are_joined_and_boundaries_kept(folder, tmp_path):
    source = decode_source(folder, Documents())
    assert source.read().tobytes() == b"a" * 5 + b"c" * 300 + b"d" * 40 + b"e" * 7
    assert source.describe() == [f"1 {EMPTY}."]
    prepared = prepare(source, tmp_path / "run", context=10)
    # 316 bytes, then 18, then 18: cut within d, whose parts are documents of their own.
    assert prepared.tokens == {"train": 316, "validation": 18, "test": 18}
    assert prepared.records("train").tolist() == [0, 5, 305, 316]
    assert prepared.records("validation").tolist() == [0, 18]
    assert prepared.records("test").tolist() == [0, 11, 18]


def test_plain_bytes_keep_none_and_say_so(folder, tmp_path):
    prepared = prepare(open_source(folder), tmp_path / "run", context=10)
    with pytest.raises(DataError, match="keeps no boundaries: plain bytes are joined; use --kind documents"):
        prepared.records("train")


def test_lines_of_jsonl_are_documents(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "één"}\n\n{"text": "", "id": 3}\n{"id": 4, "text": "zwei\\n"}')
    source = decode_source(path, Documents())
    assert source.read().tobytes().decode() == "éénzwei\n"
    assert np.load(source.folder / "records.npy").tolist() == [0, 5, 10]
    assert source.describe() == [f"1 {EMPTY}."]


@pytest.mark.parametrize(
    "line", ['{"text": 3}', '{"content": "x"}', "[1]", "{", '"x"', '{"text": "\\ud800"}', "[" * 100_000]
)
def test_line_that_is_no_document(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "fine"}) + "\n" + line)
    with pytest.raises(CorruptFileError, match=r"a\.jsonl: line 2 is no JSON object with a field text"):
        decode_source(path, Documents(), on_corrupt="stop")


def test_nothing_but_empty_documents(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(DataError, match=r"a is empty \(0 bytes\)"):
        decode_source(tmp_path / "a", Documents())


def test_packed_windows_carry_the_boundaries_in_them():
    records = np.array([0, 5, 305, 316])
    split = np.repeat(np.array([1, 2, 3], np.uint8), np.diff(records))
    windows = PackedWindows(RandomWindows(split, length=20, count=300, seed=0), records)
    seen = set()
    for item in windows:
        ids, bounds = item["input_ids"], item["cu_seqlens"].tolist()
        changes = [place for place in range(1, 20) if ids[place] != ids[place - 1]]
        assert bounds == [0, *changes, 20]
        ignored = [place for place in range(20) if item["labels"][place] == -100]
        assert ignored == bounds[:-1]
        assert torch.equal(item["labels"][item["labels"] != -100], ids[item["labels"] != -100])
        seen.add(len(bounds))
    assert seen == {2, 3}
    assert item["cu_seqlens"].dtype == torch.int32
    # From a window that begins with a document.
    whole = PackedWindows(RandomWindows(split[5:305], length=300, count=1, seed=0), np.array([0, 20, 300]))
    assert whole[0]["cu_seqlens"].tolist() == [0, 20, 300]


def test_boundaries_of_another_split_are_refused():
    with pytest.raises(ArgumentError, match=r"documents from 0 to 9 in a split of 10 tokens"):
        PackedWindows(RandomWindows(np.zeros(10, np.uint8), 5, 1, 0), np.array([0, 9]))


def test_boundaries_are_those_that_packed_attention_takes():
    split = np.arange(40, dtype=np.uint8)
    item = PackedWindows(RandomWindows(split, length=40, count=1, seed=0), np.array([0, 13, 40]))[0]
    q, k, v = torch.randn(3, 40, 2, 8, generator=torch.Generator().manual_seed(0)).unbind()
    pattern = longstride.Local(4)
    packed = longstride.attention_varlen(q, k, v, item["cu_seqlens"], pattern)
    alone = [
        longstride.attention(*(x[part].transpose(0, 1)[None] for x in (q, k, v)), pattern)[0].transpose(0, 1)
        for part in (slice(0, 13), slice(13, 40))
    ]
    torch.testing.assert_close(packed, torch.cat(alone))
