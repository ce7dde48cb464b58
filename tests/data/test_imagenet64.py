"""ImageNet-64's npz files, sound and otherwise."""

import io
import struct
import zipfile
from collections import Counter
from pathlib import PurePath

import numpy as np
import pytest

from longstride.data import imagenet64
from longstride.data.imagenet64 import read_imagenet64
from longstride.data.images import Images
from longstride.data.kind import CorruptFileError

PLANES = np.random.default_rng(0).integers(0, 256, (700, 3 * 8 * 8), dtype=np.uint8)


def npy(header: dict, body: bytes = b"") -> bytes:
    """An npy file, whatever its header claims."""
    output = io.BytesIO()
    np.lib.format.write_array_header_1_0(output, header)
    return output.getvalue() + body


def archive(path, content: bytes, name="data.npy", compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr(name, content)
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_planes_are_read_in_pieces_and_interleaved(tmp_path, save):
    path = tmp_path / "train_data_batch_1.npz"
    save(path, labels=np.arange(700), data=PLANES, mean=np.zeros(192))
    pieces = list(read_imagenet64(path))
    assert [len(piece) for piece in pieces] == [256, 256, 188]
    assert np.array_equal(np.concatenate(pieces).reshape(700, -1), PLANES)
    tokens = list(Images(8).decode(path, Counter()))
    assert tokens[650].tolist() == PLANES[650].reshape(3, 64).T.reshape(-1).tolist()


def test_side_that_is_not_the_context_s_says_which_context(tmp_path):
    np.savez(tmp_path / "val_data.npz", data=PLANES)
    with pytest.raises(CorruptFileError, match="images are 8 x 8, not 32 x 32: use --context 192"):
        list(Images(32).decode(tmp_path / "val_data.npz", Counter()))


U1 = {"descr": "|u1", "fortran_order": False}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy({**U1, "shape": (10**9, 192)}, bytes(1000)), "promises 1,000,000,000 images"),
        (npy({**U1, "shape": (5, 192)}, bytes(5 * 192 - 1)), "promises 5 images"),
        (npy({**U1, "shape": (5, 100)}, bytes(500)), r"uint8\[5, 100\]: they must be"),
        (npy({**U1, "shape": (192,)}, bytes(192)), r"uint8\[192\]: they must be"),
        (npy({"descr": "<f4", "fortran_order": False, "shape": (1, 192)}, bytes(768)), "float32"),
        (npy({"descr": "|O", "fortran_order": False, "shape": (1, 192)}, b"cos\nsystem\n"), "object"),
        (npy({"descr": "|u1", "fortran_order": True, "shape": (2, 192)}, bytes(384)), "row by row"),
        (b"\x93NUMPY\x01\x00\x20\x00" + b"{'descr': '|u1', 'shape': (3, 192" + bytes(10), "not a sound npz"),
        (b"not npy", "not a sound npz"),
        (b"", "not a sound npz"),
    ],
    ids=[
        "claims too much",
        "too short",
        "not square",
        "flat",
        "floats",
        "objects",
        "columns",
        "open bracket",
        "magic",
        "empty",
    ],
)
def test_corrupt_array(tmp_path, content, message):
    with pytest.raises(CorruptFileError, match=message):
        list(read_imagenet64(archive(tmp_path / "val_data.npz", content)))


def test_zip_bomb_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    images = 400_000
    path = archive(tmp_path / "val_data.npz", npy({**U1, "shape": (images, 192)}, bytes(images * 192)))
    assert path.stat().st_size < 200_000
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *_: pytest.fail("it was opened"))
    with pytest.raises(CorruptFileError, match=r"would grow from [\d,]+ to 76,800,128 bytes"):
        list(read_imagenet64(path))


def test_bomb_that_lies_about_its_size_is_cut_off(tmp_path):
    """The directory of the zip says 1,088 bytes; the data would go on."""
    content = npy({**U1, "shape": (5, 192)}, bytes(5 * 192))
    path = archive(tmp_path / "val_data.npz", content + bytes(10**6))
    written = path.read_bytes()
    path.write_bytes(written.replace(struct.pack("<I", len(content) + 10**6), struct.pack("<I", len(content))))
    with pytest.raises(CorruptFileError, match="not a sound npz"):
        list(read_imagenet64(path))


def test_flipped_bit_is_found(tmp_path):
    path = archive(tmp_path / "val_data.npz", npy({**U1, "shape": (700, 192)}, PLANES.tobytes()), compression=0)
    damaged = bytearray(path.read_bytes())
    damaged[5000] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(CorruptFileError, match="CRC"):
        list(read_imagenet64(path))


@pytest.mark.parametrize("content", [b"", b"PK", b"x" * 1000])
def test_no_zip(tmp_path, content):
    (tmp_path / "val_data.npz").write_bytes(content)
    with pytest.raises(CorruptFileError, match="not a sound npz"):
        list(read_imagenet64(tmp_path / "val_data.npz"))


def test_other_array(tmp_path):
    np.savez(tmp_path / "val_data.npz", images=PLANES)
    with pytest.raises(CorruptFileError, match="no array called data"):
        list(read_imagenet64(tmp_path / "val_data.npz"))


def test_names():
    for name in ("train_data_batch_10.npz", "train_data.npz", "val_data.npz"):
        assert imagenet64.is_imagenet64(PurePath(name))
    assert not imagenet64.is_imagenet64(PurePath("train_data_batch_1.npy"))
