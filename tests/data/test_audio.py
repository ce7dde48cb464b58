"""Recordings as tokens and back, resampling, and files that are damaged or claim nonsense."""

import struct
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from longstride.data import make_kind
from longstride.data.audio import CLIPPED, Audio
from longstride.data.companding import compress, expand, largest_error
from longstride.data.kind import CorruptFileError
from longstride.data.resampling import resample
from longstride.errors import DataError

soundfile = pytest.importorskip("soundfile")

NOISE = np.random.default_rng(0).uniform(-0.9, 0.9, 4000)


def decode(path, rate_hz=8000):
    """(tokens, changes)."""
    changes = Counter()
    (tokens,) = Audio(rate_hz).decode(path, changes)
    return tokens, changes


@given(arrays(np.float64, 50, elements=st.floats(-1, 1)))
def test_mu_law_is_within_its_error(samples):
    assert (np.abs(expand(compress(samples)) - samples) <= largest_error(samples) + 1e-12).all()


def test_mu_law_levels_come_back_and_are_the_published_ones():
    levels = np.arange(256)
    assert compress(expand(levels)).tolist() == levels.tolist()
    assert expand(levels)[[0, 255]].tolist() == pytest.approx([-1, 1])
    assert compress(np.array([0.0, 2.0, -2.0])).tolist() == [128, 255, 0]
    # ln(1 + 255 * 0.1) / ln(256) = 0.5910
    assert compress(np.array([0.1, -0.1])).tolist() == [round(1.5910 * 127.5), round(0.4090 * 127.5)]
    assert largest_error(np.array([1.0])) < 0.0225


def test_mu_law_refuses_what_is_no_number():
    with pytest.raises(DataError, match="not a number"):
        compress(np.array([0.0, np.nan]))


@pytest.mark.parametrize(
    ("suffix", "subtype"),
    [("wav", "PCM_16"), ("wav", "PCM_24"), ("wav", "FLOAT"), ("wav", "PCM_U8"), ("flac", "PCM_24")],
)
def test_file_to_tokens_to_file_is_within_mu_law_s_error(tmp_path, suffix, subtype):
    soundfile.write(tmp_path / f"a.{suffix}", NOISE, 8000, subtype=subtype)
    tokens, changes = decode(tmp_path / f"a.{suffix}")
    assert (tokens.dtype, len(tokens)) == (np.uint8, 4000)
    assert not changes
    Audio(8000).write(tokens.astype(np.int64), tmp_path / "b.wav")
    back, rate_hz = soundfile.read(tmp_path / "b.wav")
    assert rate_hz == 8000
    step = 1 / 128 if subtype == "PCM_U8" else 1 / 32768
    assert (np.abs(back - NOISE) <= largest_error(NOISE) + 2 * step).all()


def test_16_and_24_bits_give_the_same_tokens_but_for_rounding(tmp_path):
    for subtype in ("PCM_16", "PCM_24"):
        soundfile.write(tmp_path / f"{subtype}.wav", NOISE, 8000, subtype=subtype)
    narrow, wide = (decode(tmp_path / f"{subtype}.wav")[0].astype(int) for subtype in ("PCM_16", "PCM_24"))
    assert np.abs(narrow - wide).max() <= 1
    assert (narrow == wide).mean() > 0.99


def test_ogg_sounds_alike(tmp_path):
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 8000)
    soundfile.write(tmp_path / "a.ogg", tone, 8000)
    tokens, _ = decode(tmp_path / "a.ogg")
    assert len(tokens) == 16000
    assert np.abs(expand(tokens)[1000:-1000] - tone[1000:-1000]).mean() < 0.03


def test_channels_are_averaged(tmp_path):
    left, right = NOISE[:2000], NOISE[2000:]
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], axis=1), 8000, subtype="FLOAT")
    assert decode(tmp_path / "a.wav")[0].tolist() == compress(((left + right) / 2).astype(np.float32)).tolist()


def test_louder_than_full_scale_is_clipped_and_counted(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.array([0.0, 1.5, -3.0, 0.1]), 8000, subtype="FLOAT")
    tokens, changes = decode(tmp_path / "a.wav")
    assert tokens[1:3].tolist() == [255, 0]
    assert changes == {CLIPPED: 2}


def blocks_of(samples, lengths):
    start = 0
    for length in lengths:
        yield samples[start : start + length]
        start += length
    yield samples[start:]


@pytest.mark.parametrize(("from_hz", "to_hz"), [(44100, 16000), (8000, 12000), (48000, 8000), (44100, 44101)])
def test_tone_is_the_same_tone_at_another_rate(from_hz, to_hz):
    samples = np.sin(2 * np.pi * 1000 * np.arange(from_hz) / from_hz)
    resampled = np.concatenate(list(resample([samples], from_hz, to_hz)))
    assert len(resampled) == to_hz
    expected = np.sin(2 * np.pi * 1000 * np.arange(to_hz) / to_hz)
    assert np.abs(resampled - expected)[200:-200].max() < 1e-3


def test_what_the_lower_rate_cannot_carry_is_gone_and_a_constant_stays():
    high = np.sin(2 * np.pi * 5000 * np.arange(48000) / 48000)
    assert np.abs(np.concatenate(list(resample([high], 48000, 8000)))[200:-200]).max() < 1e-4
    constant = np.concatenate(list(resample([np.ones(5000)], 44100, 16000)))
    assert np.abs(constant[100:-100] - 1).max() < 1e-12


@given(
    st.lists(st.integers(0, 700), max_size=8),
    st.sampled_from([(44100, 16000), (8000, 12000), (9000, 8000), (16000, 1000)]),
)
def test_blocks_make_no_difference(lengths, rates):
    whole = np.concatenate(list(resample([NOISE], *rates)))
    parts = np.concatenate(list(resample(blocks_of(NOISE, lengths), *rates)))
    assert len(whole) == -(-4000 * rates[1] // rates[0])
    assert parts == pytest.approx(whole, abs=1e-12)


def test_file_of_another_rate_is_resampled(tmp_path):
    soundfile.write(tmp_path / "a.wav", NOISE, 16000, subtype="FLOAT")
    tokens, _ = decode(tmp_path / "a.wav")
    assert tokens.tolist() == compress(np.concatenate(list(resample([NOISE.astype(np.float32)], 16000, 8000)))).tolist()


def wav(rate_hz=8000, samples=NOISE) -> bytes:
    """A 16-bit WAV with any rate in its header."""
    body = (samples * 32767).astype("<i2").tobytes()
    form = struct.pack("<IHHIIHH", 16, 1, 1, rate_hz, rate_hz * 2 % 2**32, 2, 16)
    header = b"RIFF" + struct.pack("<I", 36 + len(body)) + b"WAVEfmt " + form + b"data" + struct.pack("<I", len(body))
    return header + body


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not sound audio"),
        (b"hello", "not sound audio"),
        (wav()[:2000], "it ends after 2,000 of 8,044 bytes"),
        (wav(samples=NOISE[:0]), "it holds no samples"),
        (wav(rate_hz=0), "not sound audio"),
        (wav(rate_hz=2**31 - 1), "a sampling rate of 2,147,483,647 Hz"),
        (wav(rate_hz=7), "a sampling rate of 7 Hz"),
        (b"RIFF" + bytes(4) + b"WAVE" + bytes(20), "not sound audio"),
    ],
    ids=["empty", "text", "truncated", "no samples", "0 Hz", "2 GHz", "7 Hz", "no format"],
)
def test_corrupt_file_says_what_is_wrong(tmp_path, content, message):
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(CorruptFileError, match=rf"a\.wav: {message}"):
        decode(tmp_path / "a.wav")


def test_wav_from_a_pipe_has_no_length_and_is_read(tmp_path):
    content = wav()
    (tmp_path / "a.wav").write_bytes(content[:4] + b"\xff\xff\xff\xff" + content[8:])
    assert len(decode(tmp_path / "a.wav")[0]) == 4000


@pytest.mark.parametrize("suffix", ["ogg", "flac"])
def test_truncated_compressed_file(tmp_path, suffix):
    soundfile.write(tmp_path / f"a.{suffix}", np.random.default_rng(1).uniform(-0.5, 0.5, 100_000), 8000)
    whole = (tmp_path / f"a.{suffix}").read_bytes()
    for share in (0.01, 0.3, 0.7, 0.99):
        (tmp_path / f"a.{suffix}").write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(CorruptFileError):
            decode(tmp_path / f"a.{suffix}")


def test_samples_that_are_no_numbers(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.array([0.0, np.nan, 0.0]), 8000, subtype="FLOAT")
    with pytest.raises(CorruptFileError, match=r"a\.wav: a sample is infinite or not a number"):
        decode(tmp_path / "a.wav")


def test_other_container(tmp_path):
    soundfile.write(tmp_path / "a.aiff", NOISE, 8000)
    (tmp_path / "a.aiff").rename(tmp_path / "a.wav")
    with pytest.raises(CorruptFileError, match="not WAV, FLAC or OGG"):
        decode(tmp_path / "a.wav")


def test_missing_package_is_named_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(DataError, match=r"needs the package soundfile .*pip install 'longstride\[audio\]'"):
        decode(tmp_path / "a.wav")


def test_rate_of_the_recipe_is_checked():
    with pytest.raises(DataError, match="a sampling rate of 0 Hz: it must be from 1,000 to 384,000 Hz"):
        Audio(0)


def test_kind_is_sure_of_its_suffixes_and_has_its_rate_from_the_recipe():
    assert make_kind("audio", 64, {"sample_rate_hz": 12_000}) == Audio(12_000)
    assert Audio.surely(Path("a.FLAC"))
    assert not Audio.surely(Path("a.mp3"))
