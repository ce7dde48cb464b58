"""CSV files as binned values and back; files that are none."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longstride.data import decode_source, restore_kind
from longstride.data.kind import CorruptFileError
from longstride.data.series import NO_NUMBERS, Series
from longstride.errors import DataError


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def fit(path, bins=4, binning="quantile"):
    return Series(bins, binning).fitted([path])


def decode(kind, path):
    """(tokens, changes)."""
    changes = Counter()
    (tokens,) = kind.decode(path, changes)
    return tokens, changes


def test_rows_are_tokens_in_the_order_of_the_columns(tmp_path):
    path = write(tmp_path / "a.csv", "t,u\n0,30\n1,20\n2,10\n3,0\n")
    kind = fit(path)
    assert kind.columns == ("t", "u")
    assert (kind.record, kind.vocab_size) == (2, 5)
    tokens, changes = decode(kind, path)
    assert tokens.tolist() == [1, 4, 2, 3, 3, 2, 4, 1]
    assert not changes
    assert kind.values(tokens).tolist() == [[0, 30], [1, 20], [2, 10], [3, 0]]


def test_uniform_bins_are_equally_wide_and_come_back_as_their_middles(tmp_path):
    path = write(tmp_path / "a.csv", "x\n0\n0.9\n1\n8\n4\n")
    kind = fit(path, binning="uniform")
    tokens, _ = decode(kind, path)
    assert tokens.tolist() == [1, 1, 1, 4, 3]
    assert kind.values(tokens)[:, 0].tolist() == [1, 1, 1, 7, 5]


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60),
    st.integers(2, 20),
    st.sampled_from(["quantile", "uniform"]),
)
def test_values_keep_their_order_and_centres_are_in_their_bins(tmp_path_factory, values, bins, binning):
    path = write(tmp_path_factory.mktemp("csv") / "a.csv", "x\n" + "\n".join(map(repr, values)) + "\n")
    kind = fit(path, bins, binning)
    tokens, _ = decode(kind, path)
    assert tokens.min() >= 1
    assert tokens.max() <= bins
    order = np.argsort(values, kind="stable")
    assert (np.diff(tokens[order].astype(int)) >= 0).all()
    centres = kind.values(tokens)[:, 0]
    if binning == "uniform":
        width = (max(values) - min(values)) / bins
        assert (np.abs(centres - values) <= width / 2 + 1e-9 * (1 + np.abs(values))).all()
    else:
        assert set(centres) <= set(values)
    # What is written reads back as the same tokens.
    kind.write(tokens, path)
    assert decode(kind, path)[0].tolist() == tokens.tolist()


def test_quantile_bins_have_equally_many_values_and_a_frequent_value_comes_back(tmp_path):
    values = np.random.default_rng(0).lognormal(size=1000)
    path = write(tmp_path / "a.csv", "x\n" + "\n".join(map(str, values)))
    tokens, _ = decode(fit(path, 10), path)
    assert np.bincount(tokens).tolist() == [0] + [100] * 10
    path = write(tmp_path / "a.csv", "x\n" + "0\n" * 70 + "\n".join(map(str, range(1, 31))))
    kind = fit(path, 10)
    tokens, _ = decode(kind, path)
    assert kind.values(tokens[:70])[:, 0].tolist() == [0.0] * 70


def test_missing_values_and_columns_that_are_no_series(tmp_path):
    path = write(tmp_path / "a.csv", "date,x,note\n2024-01-01,1,a\n2024-01-02,,b\n2024-01-03,NA,3\n2024-01-04,2,\n")
    kind = fit(path, 2)
    assert kind.columns == ("x",)
    tokens, changes = decode(kind, path)
    assert tokens.tolist() == [1, 0, 0, 2]
    assert changes == {
        "files have a column that is no series of numbers and was left out: date": 1,
        "files have a column that is no series of numbers and was left out: note": 1,
        NO_NUMBERS: 2,
    }
    kind.write(np.array([2, 0]), tmp_path / "b.csv")
    assert (tmp_path / "b.csv").read_text().split() == ["x", "2.0", '""']
    with pytest.raises(DataError, match="token 3 is not one of the 3"):
        kind.values(np.array([3]))


@pytest.mark.parametrize(
    "text", ["1;2\n3;4\n", "a\tb\n1\t2\n3\t4\n", "\ufeffa|b\n1|2\n\n3|4\n", '"a","b,c"\r\n1,2\r\n3,4\r\n']
)
def test_dialects(tmp_path, text):
    path = write(tmp_path / "a.csv", text)
    kind = fit(path, 2)
    assert len(kind.columns) == 2
    assert kind.values(decode(kind, path)[0]).tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is empty"),
        ("\n\n", "it is empty"),
        ("x,y\n", "it has no rows of values"),
        ("x,y\n1,2\n3\n", "line 3 has 1 cells, and not 2"),
        (b"x\n\xff\xfe\n", "it is no text in UTF-8"),
        (b"x\n1\x00\n" + b'"' + b"2" * 200_000, "it is no sound CSV"),
        ('x\n"1\n', "it is no sound CSV"),
        ("x,x\n1,2\n", "two of its columns have the same name"),
        ("1," * 5000, "it has 5,001 columns, more than 4,096"),
        ("y\n1\n", "its columns are y, but those of the files before it x"),
    ],
)
def test_corrupt_file_says_what_is_wrong(tmp_path, text, message):
    kind = fit(write(tmp_path / "sound.csv", "x\n1\n2\n"))
    path = write(tmp_path / "a.csv", text)
    with pytest.raises(CorruptFileError, match=rf"a\.csv: {message}"):
        decode(kind, path)
    # It does not change what is learnt from sound ones.
    assert Series(4, "quantile").fitted([tmp_path / "sound.csv", path]) == kind


def test_huge_numbers_do_not_overflow(tmp_path):
    path = write(tmp_path / "a.csv", "x\n1e999\n-1e308\n1e300\n-1e300\ninf\n0\n1\n")
    kind = fit(path, 4, "uniform")
    tokens, changes = decode(kind, path)
    assert tokens.tolist() == [0, 0, 4, 1, 0, 3, 3]
    assert changes == {NO_NUMBERS: 3}


def test_no_series_at_all(tmp_path):
    with pytest.raises(DataError, match="none of the columns a, b is a series of numbers"):
        decode_source(write(tmp_path / "a.csv", "a,b\nx,y\n"), Series(4, "quantile"))


def test_bins_are_kept_with_the_tokens_and_used_for_other_files(tmp_path):
    source = decode_source(write(tmp_path / "a.csv", "x\n0\n1\n2\n3\n"), Series(4, "uniform"))
    assert restore_kind("csv", json.loads(json.dumps(source.kind.settings()))) == source.kind
    other = decode_source(write(tmp_path / "b.csv", "x\n3\n100\n"), source.kind)
    assert other.kind == source.kind
    assert other.read().tolist() == [4, 4]


def test_settings_are_checked():
    with pytest.raises(DataError, match="1 bins for the values of a CSV file: take 2 to 65,535"):
        Series(1, "quantile")
    with pytest.raises(DataError, match="binning 'log': it must be one of quantile, uniform"):
        Series(4, "log")
    assert Series(300, "uniform").dtype == np.uint16
