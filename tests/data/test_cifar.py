"""CIFAR-10's two versions, and pickles that would do something."""

import os
import pickle
from collections import Counter
from pathlib import PurePath

import numpy as np
import pytest

from longstride.data.cifar import is_cifar, read_cifar
from longstride.data.images import Images
from longstride.data.kind import CorruptFileError

PLANES = np.random.default_rng(0).integers(0, 256, (3, 3072), dtype=np.uint8)


def batch(**changed):
    return {
        b"batch_label": b"training batch 1 of 5",
        b"labels": [6, 9, 300_000],
        b"data": PLANES,
        b"filenames": [b"a.png", b"b.png", b"c.png"],
        **{key.encode(): value for key, value in changed.items()},
    }


def python_2_pickle() -> bytes:
    """As the official files are: protocol 2, Python 2's texts, numpy.core; written out by hand."""

    def text(content: bytes) -> bytes:
        return (
            b"T" + len(content).to_bytes(4, "little") + content
            if len(content) > 255
            else b"U" + bytes([len(content)]) + content
        )

    dtype = b"cnumpy\ndtype\nq\x07U\x02u1K\x00K\x01\x87Rq\x08(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x04cnumpy\nndarray\nq\x05K\x00\x85U\x01b\x87Rq\x06(K\x01K\x03M\x00\x0c\x86"
        + dtype
        + b"\x89"
        + text(PLANES.tobytes())
        + b"tb"
    )
    labels = b"]q\x02(K\x06K\x09K\x09e"
    return b"\x80\x02}q\x01(U\x04data" + array + b"U\x06labels" + labels + b"u."


def pickled(path, content: bytes):
    path.write_bytes(content)
    return path


def test_names():
    for name in ("data_batch_1", "data_batch_5.bin", "test_batch", "test_batch.bin"):
        assert is_cifar(PurePath("x", name)), name
    for name in ("batches.meta", "data_batch_1.bak", "data_batch_x", "mytest_batch"):
        assert not is_cifar(PurePath(name)), name


def test_binary_version_has_planes_after_a_label(tmp_path):
    rows = np.concatenate([np.array([[6], [9], [0]], np.uint8), PLANES], axis=1)
    (images,) = read_cifar(pickled(tmp_path / "data_batch_1.bin", rows.tobytes()))
    assert np.array_equal(images.reshape(3, -1), PLANES)
    tokens = list(Images(32).decode(tmp_path / "data_batch_1.bin", Counter()))
    # Red of the first pixel, green of the first, blue of the first, red of the second.
    assert tokens[1][:4].tolist() == PLANES[1][[0, 1024, 2048, 1]].tolist()


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_python_version_as_python_3_writes_it(tmp_path, protocol):
    (images,) = read_cifar(pickled(tmp_path / "data_batch_1", pickle.dumps(batch(), protocol)))
    assert np.array_equal(images.reshape(3, -1), PLANES)


def test_python_version_as_the_official_files_are(tmp_path):
    content = python_2_pickle()
    assert np.array_equal(pickle.loads(content, encoding="bytes")[b"data"], PLANES), "the test's own pickle is sound"
    (images,) = read_cifar(pickled(tmp_path / "test_batch", content))
    assert np.array_equal(images.reshape(3, -1), PLANES)


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickle_that_runs_code_is_named_and_does_not_run(tmp_path, protocol):
    content = pickle.dumps(batch(labels=RunsCode(tmp_path / "made")), protocol)
    with pytest.raises(CorruptFileError, match=r"data_batch_1: the pickle names (posix|nt)\.mkdir, .*it was not run"):
        list(read_cifar(pickled(tmp_path / "data_batch_1", content)))
    assert not (tmp_path / "made").exists()
    pickle.loads(content)
    assert (tmp_path / "made").exists(), "the test's own pickle does run code when it is let"


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"cbuiltins\neval\n(S'1'\ntR.", "names builtins.eval"),
        (b"(S'1'\nibuiltins\neval\n.", "uses the instruction INST"),
        (b"cnumpy\nndarray\n(I1000000\ntR.", "calls numpy.ndarray"),
        (b"c_codecs\nencode\n(Vx\nVrot13\ntR.", "calls _codecs.encode"),
        (b"\x80\x02cnumpy\nndarray\n)\x81.", "uses the instruction NEWOBJ"),
        (b"cnumpy\nndarray\n}S'x'\nI1\nsb.", "gives a state"),
        (b"\x80\x02\x82\x01.", "uses the instruction EXT1"),
        (b"Pname\n.", "uses the instruction PERSID"),
    ],
)
def test_forbidden_instructions_are_named(tmp_path, program, message):
    with pytest.raises(CorruptFileError, match=f"{message}.*no batch of CIFAR-10 needs"):
        list(read_cifar(pickled(tmp_path / "data_batch_1", program)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a sound pickle"),
        (b"\x00\x01", "not a sound pickle"),
        (pickle.dumps(batch(), 2)[:500], "not a sound pickle"),
        (pickle.dumps([1, 2], 2), "no array called data"),
        (pickle.dumps({"data": "text"}, 2), "no array called data"),
        (pickle.dumps(batch(data=PLANES.astype(np.int16)), 2), "not of uint8"),
        (pickle.dumps(batch(data=PLANES[:, :100]), 2), r"shape \[3, 100\]"),
        (pickle.dumps(batch(data=np.array([None, 1])), 2), "not of uint8"),
        (b"\x80\x02" + b"r\xff\xff\xff\x7f" * 3 + b".", "not a sound pickle"),
    ],
    ids=["empty", "noise", "truncated", "list", "text", "int16", "narrow", "objects", "memo"],
)
def test_corrupt_python_version(tmp_path, content, message):
    with pytest.raises(CorruptFileError, match=message):
        list(read_cifar(pickled(tmp_path / "data_batch_1", content)))


def test_every_truncation_of_a_pickle_is_refused(tmp_path):
    content = pickle.dumps(batch(), 2)
    for length in [*range(200), *range(len(content) - 100, len(content))]:
        with pytest.raises(CorruptFileError):
            list(read_cifar(pickled(tmp_path / "data_batch_1", content[:length])))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes are not a whole number of images of 3,073"),
        (bytes(3072), "3,072 bytes are not a whole number"),
        (b"\x0a" + bytes(3072), "the label 10"),
    ],
)
def test_corrupt_binary_version(tmp_path, content, message):
    with pytest.raises(CorruptFileError, match=message):
        list(read_cifar(pickled(tmp_path / "test_batch.bin", content)))
