"""ImageNet-64's npz files, as Chrabaszcz et al. published them: read in pieces, without unpickling.

``train_data_batch_1.npz`` to ``_10.npz`` and ``val_data.npz`` hold an array ``data``, uint8[images, 12288]: all red
values of an image in raster order, then all green ones, then all blue ones. Files of the 8, 16 and 32-pixel versions
look the same. An npz is a zip of npy files; only ``data.npy`` is touched, and never as a whole.

Source: Chrabaszcz, Loshchilov, Hutter 2017, "A Downsampled Variant of ImageNet as an Alternative to CIFAR".
"""

import math
import re
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import IO

import numpy as np

from longstride.data.kind import CorruptFileError

NAMES = re.compile(r"(train_data(_batch_\d+)?|val_data)\.npz")

IMAGES_AT_ONCE = 256

# What zipfile and NumPy's reader of headers raise; the header is a Python literal, which NumPy tokenizes.
UNSOUND = (
    zipfile.BadZipFile,
    zlib.error,
    tokenize.TokenError,
    SyntaxError,
    EOFError,
    ValueError,
    NotImplementedError,
    RuntimeError,
)

# Photographs hardly shrink; a file that is a thousand times its compressed size was made to fill a disk.
MOST_INFLATION = 100
SMALLEST_BOMB_BYTES = 1 << 26


def is_imagenet64(file: PurePath) -> bool:
    """Whether a file has one of the data set's names."""
    return NAMES.fullmatch(file.name) is not None


def read_imagenet64(path: Path) -> Iterator[np.ndarray]:
    """uint8[images, 3, side, side], a few images at a time.

    Raises:
        CorruptFileError: not a zip, no such array, another shape or dtype, a bomb, or too short.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            member = archive.getinfo("data.npy")
            if member.file_size > max(SMALLEST_BOMB_BYTES, MOST_INFLATION * member.compress_size):
                raise CorruptFileError(
                    path,
                    f"its data would grow from {member.compress_size:,} to {member.file_size:,} bytes, which no images "
                    "do",
                )
            with archive.open(member) as data:
                images, side = _read_header(path, data, member.file_size)
                for first in range(0, images, IMAGES_AT_ONCE):
                    count = min(IMAGES_AT_ONCE, images - first)
                    read = data.read(count * 3 * side * side)
                    yield np.frombuffer(read, dtype=np.uint8).reshape(count, 3, side, side)
                # The checksum is compared at the end of the data.
                data.read(1)
    except KeyError:
        raise CorruptFileError(path, "it holds no array called data: not one of ImageNet-64's npz files") from None
    except UNSOUND as error:
        if isinstance(error, CorruptFileError):
            raise
        raise CorruptFileError(path, f"not a sound npz ({error})") from error


def _read_header(path: Path, data: IO[bytes], member_bytes: int) -> tuple[int, int]:
    """(images, side) of the npy file that begins in ``data``."""
    major, _ = np.lib.format.read_magic(data)
    read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}.get(major)
    if read is None:
        raise ValueError(f"npy version {major}")
    shape, column_major, dtype = read(data)
    side = math.isqrt(shape[1] // 3) if len(shape) == 2 else 0
    if dtype != np.uint8 or column_major or side < 1 or shape[1] != 3 * side * side:
        raise CorruptFileError(
            path, f"its data are {dtype}{list(shape)}: they must be uint8[images, 3 * side * side], row by row"
        )
    if data.tell() + shape[0] * shape[1] != member_bytes:
        raise CorruptFileError(path, f"its header promises {shape[0]:,} images, but {member_bytes:,} bytes are there")
    return shape[0], side
