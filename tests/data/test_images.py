"""Images as tokens and back; every mode of PNG; files that are damaged, or meant to do damage."""

import struct
import zlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from longstride.data import make_kind
from longstride.data.images import SCALED, Images, image_to_tokens, tokens_to_image
from longstride.data.kind import CorruptFileError
from longstride.errors import DataError


def picture(side=4, channels=3, seed=0):
    shape = (side, side, channels) if channels > 1 else (side, side)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def read(path, side=4):
    """(image, changes)."""
    changes = Counter()
    (tokens,) = Images(side).decode(path, changes)
    return tokens_to_image(tokens, side), changes


def shown(path, mode="RGB"):
    with Image.open(path) as image:
        return np.asarray(image.convert(mode))


def save(path, array):
    Image.fromarray(array).save(path)
    return path


def png(width, height, body=b""):
    """A PNG of 8-bit RGB whose header claims the size."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def test_tokens_are_row_then_column_then_channel():
    image = picture(side=5)
    tokens = image_to_tokens(image)
    for t in range(75):
        assert tokens[t] == image[t // 15, t // 3 % 5, t % 3]
    assert Images(5).axes(75) == [5, 5, 3]


@given(st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_image_comes_back_exactly(side, seed):
    image = picture(side, seed=seed)
    assert np.array_equal(tokens_to_image(image_to_tokens(image), side), image)


def test_png_of_the_right_size_goes_through_files_exactly(tmp_path):
    image = picture()
    save(tmp_path / "in.png", image)
    (tokens,) = Images(4).decode(tmp_path / "in.png", Counter())
    Images(4).write(tokens.astype(np.int64), tmp_path / "out.png")
    assert np.array_equal(shown(tmp_path / "out.png"), image)


def test_jpeg_is_read(tmp_path):
    flat = np.full((8, 8, 3), 120, np.uint8)
    save(tmp_path / "a.jpg", flat)
    image, changes = read(tmp_path / "a.jpg", side=8)
    assert np.abs(image.astype(int) - 120).max() <= 2
    assert not changes


def test_jpeg_is_turned_as_its_camera_says(tmp_path):
    halves = np.zeros((16, 16, 3), np.uint8)
    halves[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # taken upside down
    Image.fromarray(halves).save(tmp_path / "a.jpg", exif=exif, quality=95)
    image, _ = read(tmp_path / "a.jpg", side=16)
    assert image[:7].max() < 30
    assert image[9:].min() > 225


def test_alpha_lies_on_white(tmp_path):
    image = picture(channels=4)
    image[..., 3] = 0
    image[0, 0] = (10, 20, 30, 255)
    seen, _ = read(save(tmp_path / "a.png", image))
    assert seen[0, 0].tolist() == [10, 20, 30]
    assert np.delete(seen.reshape(-1, 3), 0, axis=0).min() == 255


def test_palette_is_looked_up_and_its_transparent_entry_lies_on_white(tmp_path):
    palette = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8)).convert("P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    palette.save(tmp_path / "a.png")
    palette.save(tmp_path / "b.png", transparency=2)
    assert read(tmp_path / "a.png", 2)[0].tolist() == [[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [0, 255, 0]]]
    assert read(tmp_path / "b.png", 2)[0].tolist() == [[[255, 0, 0], [0, 255, 0]], [[255, 255, 255], [0, 255, 0]]]


def test_16_bit_grey_keeps_its_upper_eight_bits(tmp_path):
    values = np.array([[0, 255, 256], [32768, 65535, 1000], [1, 2, 3]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode.startswith("I")
    seen, _ = read(tmp_path / "a.png", 3)
    assert seen[..., 0].tolist() == (values >> 8).tolist()
    assert np.array_equal(seen[..., 0], seen[..., 2])


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
def test_grey_is_repeated(tmp_path, mode):
    Image.fromarray(picture(channels=1)).convert("L").convert(mode).save(tmp_path / "a.png")
    seen, _ = read(tmp_path / "a.png")
    assert np.array_equal(seen[..., 0], seen[..., 1])
    assert np.array_equal(seen[..., 0], shown(tmp_path / "a.png", "L"))


def test_other_sizes_are_cropped_to_the_centre_averaged_and_counted(tmp_path):
    wide = np.zeros((4, 8, 3), np.uint8)
    wide[:, 2:6] = np.array([[10, 30], [50, 70]]).repeat(2, axis=0).repeat(2, axis=1)[..., None]
    wide[:, :2] = 255
    seen, changes = read(save(tmp_path / "a.png", wide), side=2)
    assert seen[..., 0].tolist() == [[10, 30], [50, 70]]
    assert changes == {SCALED: 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a sound PNG or JPEG"),
        (b"not an image at all", "not a sound PNG or JPEG"),
        (b"GIF89a" + bytes(50), "not a sound PNG or JPEG"),
        (png(4, 4)[:60], "not a sound PNG or JPEG"),
        (png(100_000, 100_000, bytes(1000)), "it claims .*pixels, more than 67,108,864"),
        (png(12_000, 12_000, bytes(1000)), "it claims 12,000 x 12,000 pixels, more than 67,108,864"),
        (png(0, 4), "not a sound PNG or JPEG"),
    ],
    ids=["empty", "text", "gif", "truncated", "huge bomb", "bomb", "no pixels"],
)
def test_corrupt_file_says_what_is_wrong(tmp_path, content, message):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(CorruptFileError, match=rf"a\.png: {message}"):
        read(tmp_path / "a.png")


def test_every_truncation_of_a_sound_png_is_refused(tmp_path):
    save(tmp_path / "whole.png", picture())
    whole = (tmp_path / "whole.png").read_bytes()
    # Pillow does not miss the last chunk, which says nothing.
    for length in range(len(whole) - 24):
        (tmp_path / "a.png").write_bytes(whole[:length])
        with pytest.raises(CorruptFileError):
            read(tmp_path / "a.png")


def test_context_is_one_square_image():
    assert make_kind("images", 3072, {}) == Images(32)
    assert make_kind("images", 12288, {}) == Images(64)
    for context in (512, 2, 3 * 32 * 31):
        with pytest.raises(DataError, match=r"--context .* give --context 3072 \(32 x 32\)"):
            make_kind("images", context, {})


def test_wrong_number_of_tokens_is_refused(tmp_path):
    with pytest.raises(DataError, match="47 tokens: an image of side 4 has 48"):
        Images(4).write(np.zeros(47, np.int64), tmp_path / "a.png")
    with pytest.raises(DataError, match="token 256 is not one of the 256 of --kind images"):
        Images(4).write(np.full(48, 256), tmp_path / "a.png")
    with pytest.raises(DataError, match="give uint8"):
        image_to_tokens(np.zeros((4, 4, 4), np.uint8))
