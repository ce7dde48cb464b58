"""Decoding into the cache: once for the same content, whole or not at all, corrupt files out and named."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from longstride.data import PreparedData, decode_source, guess_kind, prepare, split_source
from longstride.data.images import Images
from longstride.data.kind import CorruptFileError
from longstride.errors import ArgumentError, DataError


def picture(path, value, side=2):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((side, side, 3), value, np.uint8)).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """30 images of 2 x 2, whose value is their number, and a text that is none of them."""
    for number in range(30):
        picture(tmp_path / "in" / f"{number:02}.png", number)
    (tmp_path / "in" / "notes.txt").write_text("no image")
    return tmp_path / "in"


@pytest.fixture
def decodings(monkeypatch):
    """The files that were decoded, as they are."""
    decoded = []
    original = Images.decode
    monkeypatch.setattr(Images, "decode", lambda self, path, c: (decoded.append(path.name), original(self, path, c))[1])
    return decoded


def test_files_are_joined_in_order(folder):
    source = decode_source(folder, Images(2))
    assert [file.name for file in source.files] == [f"{number:02}.png" for number in range(30)]
    assert source.read().tolist() == np.arange(30).repeat(12).tolist()
    assert source.read(13).tolist() == [0] * 12 + [1]
    assert source.describe() == []


def test_same_content_is_decoded_once_wherever_it_lies(folder, tmp_path, decodings):
    first = decode_source(folder, Images(2))
    assert len(decodings) == 30
    shutil.copytree(folder, tmp_path / "copy")
    assert decode_source(tmp_path / "copy", Images(2)).folder == first.folder
    assert len(decodings) == 30


def test_other_content_name_or_setting_is_decoded_anew(folder, decodings):
    folders = {decode_source(folder, Images(2)).folder, decode_source(folder, Images(1)).folder}
    picture(folder / "00.png", 99)
    source = decode_source(folder, Images(2))
    assert source.read(1).tolist() == [99]
    folders.add(source.folder)
    (folder / "00.png").rename(folder / "31.png")
    folders.add(decode_source(folder, Images(2)).folder)
    assert len(folders) == 4
    assert len(decodings) == 120


def test_interrupted_decoding_leaves_nothing_and_is_done_again(folder, cache, monkeypatch):
    original = Images.decode

    def interrupted(self, path, changes):
        if path.name == "20.png":
            raise KeyboardInterrupt
        return original(self, path, changes)

    with monkeypatch.context() as patch:
        patch.setattr(Images, "decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            decode_source(folder, Images(2))
    assert list(cache.iterdir()) == []
    assert len(decode_source(folder, Images(2)).files) == 30


def test_two_processes_at_once_both_have_it(folder, monkeypatch):
    """The second one finds the first one's folder when it comes to give its own the same name."""
    original = Images.decode
    inner = []

    def decode(self, path, changes):
        if path.name == "29.png" and not inner:
            inner.append(None)
            inner.append(decode_source(folder, Images(2)))
        return original(self, path, changes)

    monkeypatch.setattr(Images, "decode", decode)
    outer = decode_source(folder, Images(2))
    assert outer == inner[1]
    assert len(list(outer.folder.parent.iterdir())) == 1


def test_corrupt_files_are_left_out_named_and_counted(folder, tmp_path):
    (folder / "03.png").write_bytes((folder / "03.png").read_bytes()[:50])
    (folder / "07.png").write_bytes(b"")
    source = decode_source(folder, Images(2))
    assert source.read(60)[::12].tolist() == [0, 1, 2, 4, 5]
    lines = source.describe()
    assert lines[0].startswith("Skipped 03.png: not a sound PNG or JPEG")
    assert lines[1].startswith("Skipped 07.png: not a sound PNG or JPEG")
    assert lines[2:] == ["2 of 30 files were corrupt and are left out."]
    assert decode_source(folder, Images(2)).describe() == lines, "from the cache, too"
    prepared = prepare(source, tmp_path / "run", context=12)
    assert sum(prepared.tokens.values()) == 28 * 12


@pytest.mark.parametrize("before", ["nothing", "cached"])
def test_corrupt_file_stops_if_asked(folder, before):
    (folder / "03.png").write_bytes(b"x")
    if before == "cached":
        decode_source(folder, Images(2))
    with pytest.raises(CorruptFileError, match=r"03\.png: not a sound .*with --on-corrupt skip$"):
        decode_source(folder, Images(2), on_corrupt="stop")


@pytest.mark.parametrize("damaged", [1, 2, 3])
def test_damage_after_sound_records_takes_the_whole_file_out(tmp_path, damaged):
    """An npz whose checksum, at its end, is wrong: the images that were read before go, too."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number in (1, 2, 3):
        # The damaged one is the longest, so that nothing written later covers it.
        images = 900 if number == damaged else 600
        np.savez(folder / f"train_data_batch_{number}.npz", data=np.full((images, 12), number, np.uint8))
    path = folder / f"train_data_batch_{damaged}.npz"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    source = decode_source(folder, Images(2))
    left = [number for number in (1, 2, 3) if number != damaged]
    assert source.read().tolist() == np.repeat(left, 7200).tolist()
    assert np.load(source.folder / "records.npy").tolist() == list(range(0, 14401, 12))
    assert path.name in source.describe()[0]


def test_nothing_sound_or_nothing_at_all(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"no sound file for --kind images: 1 are corrupt, the first being .*a\.png"):
        decode_source(tmp_path / "a.png", Images(2))
    (tmp_path / "in").mkdir()
    with pytest.raises(DataError, match="no file that --kind images reads: point --data elsewhere"):
        decode_source(tmp_path / "in", Images(2))
    with pytest.raises(DataError, match=r"no file or folder .*nowhere"):
        decode_source(tmp_path / "nowhere", Images(2))
    with pytest.raises(ArgumentError, match="--on-corrupt ignore: it must be one of skip, stop"):
        decode_source(tmp_path / "a.png", Images(2), on_corrupt="ignore")


def test_damaged_cache_is_named(folder):
    source = decode_source(folder, Images(2))
    with (source.folder / "tokens.bin").open("ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match=r"the cache .* is damaged .*delete that folder"):
        decode_source(folder, Images(2))


def test_splits_begin_with_an_image_and_keep_boundaries(tmp_path):
    for number in range(7):
        picture(tmp_path / "in" / f"{number}.png", number)
    source = decode_source(tmp_path / "in", Images(2))
    method, splits = split_source(source, shortest=0)
    assert method == "contiguously"
    assert [[(str(piece.file), piece.start) for piece in splits[name]] for name in splits] == [
        [(f"{number}.png", 0) for number in range(6)],
        [],
        [("6.png", 0)],
    ]
    prepared = prepare(source, tmp_path / "run", context=0)
    assert prepared.records("train").tolist() == [12 * number for number in range(7)]
    assert prepared.split("test").tolist() == [6] * 12
    assert PreparedData.open(tmp_path / "run").decoded_as == Images(2)


def test_cifar_s_own_test_batch_is_the_test_split_and_validation_ends_the_training(tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(1, 6):
        rows = np.full((20, 3073), number, np.uint8)
        (tmp_path / "in" / f"data_batch_{number}.bin").write_bytes(rows.tobytes())
    (tmp_path / "in" / "test_batch.bin").write_bytes(np.full((9, 3073), 9, np.uint8).tobytes())
    prepared = prepare(decode_source(tmp_path / "in", Images(32)), tmp_path / "run", context=3072)
    assert prepared.method == "as named"
    assert prepared.tokens == {"train": 95 * 3072, "validation": 5 * 3072, "test": 9 * 3072}
    assert set(prepared.split("test").tolist()) == {9}
    assert set(prepared.split("validation").tolist()) == {5}


def test_folders_that_name_splits_are_taken_at_their_word(tmp_path):
    for split, value in (("train", 1), ("val", 2)):
        for number in range(20):
            picture(tmp_path / "in" / split / f"{number}.png", value)
    prepared = prepare(decode_source(tmp_path / "in", Images(2)), tmp_path / "run", context=12)
    # As with ImageNet: what is called validation there is what is reported.
    assert {name: set(prepared.split(name).tolist()) for name in prepared.tokens} == {
        "train": {1}, "validation": {1}, "test": {2},
    }  # fmt: skip
    assert prepared.tokens == {"train": 19 * 12, "validation": 12, "test": 240}
    for number in range(20):
        picture(tmp_path / "in" / "test" / f"{number}.png", 3)
    prepared = prepare(decode_source(tmp_path / "in", Images(2)), tmp_path / "run", context=12)
    assert [set(prepared.split(name).tolist()) for name in prepared.tokens] == [{1}, {2}, {3}]


def test_guess_is_images_only_where_every_file_is_one(folder, tmp_path):
    assert guess_kind(folder)[0] == "bytes"
    (folder / "notes.txt").unlink()
    (folder / "README.md").write_text("a companion")
    assert guess_kind(folder) == ("images", "by the names of its files, such as 00.png")
    assert guess_kind(folder / "00.png")[0] == "images"
    assert guess_kind(folder / "README.md")[0] == "bytes"
    assert guess_kind(tmp_path / "nowhere")[0] == "bytes"


def test_too_few_images_are_refused_without_naming_a_context_that_would_cut_them(tmp_path):
    source = decode_source(picture(tmp_path / "a.png", 1), Images(2))
    with pytest.raises(DataError, match=r"12 dims, of which the train split gets 0: .*of 12; give more data$"):
        split_source(source, shortest=12)


def test_splits_json_says_the_kind(folder, tmp_path):
    prepare(decode_source(folder, Images(2)), tmp_path / "run", context=12)
    written = json.loads((tmp_path / "run" / "splits.json").read_text())
    assert (written["kind"], written["settings"]) == ("images", {"side": 2})
